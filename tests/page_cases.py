"""Documents that a page must show as they are: with markup in all that they say of themselves, and with pages."""

from __future__ import annotations

from lloco_engine import Document
from lloco_engine.types import Page, Span

# The quote stands behind letters that JavaScript counts twice, and everything that is shown holds markup.
MARKUP = "<img src=x onerror='window.ran=1'><script>window.ran=2</script>"
FOXES = Document(
    f"{MARKUP}/foxes.md",
    "🦊🦊🦊 " + " ".join(f"The fox number {number} {MARKUP} ate &lt;b&gt;cheese&lt;/b&gt;." for number in range(9)),
    title=f"Foxes {MARKUP}",
    source=f"{MARKUP}.md",
    metadata={"group": "<img src=x onerror='window.ran=3'>"},
)
_LEAF = "The lock of gate number seven was oiled by Ida Moor. "
LOCKS = Document(
    "locks.md",
    _LEAF * 30,
    title="Locks",
    source="locks.md",
    pages=tuple(
        Page(number + 1, label, Span(number * 10 * len(_LEAF), (number + 1) * 10 * len(_LEAF)))
        for number, label in enumerate(("iv", "", ""))
    ),
)
