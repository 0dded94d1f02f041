"""The core imports no framework and the LangChain classes no torch; without LangChain the error says what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded(statement: str, names: tuple[str, ...]) -> str:
    code = f"import sys\n{statement}\nprint([name for name in {names!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        (
            "from lloco_engine import Engine; import lloco_integrations.session",
            ("langchain_core", "llama_index", "torch"),
        ),
        ("import lloco_integrations.langchain", ("torch", "transformers", "faiss", "llama_index", "langchain_classic")),
    ],
)
def test_importing_loads_no_more_than_is_needed(statement, names):
    assert loaded(statement, names) == "[]"


def test_without_langchain_the_error_names_the_extra():
    code = "import sys; sys.modules['langchain_core'] = None; import lloco_integrations.langchain"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "ImportError: lloco_integrations.langchain needs langchain-core: pip install 'lloco[langchain]'" in run.stderr
    )
