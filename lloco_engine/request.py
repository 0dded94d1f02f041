"""One question, with all that says how it is found, placed and answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from lloco_engine.config import GenerateConfig, PrefixConfig, RetrieveConfig
from lloco_engine.errors import ConfigError
from lloco_engine.filters import Filters, parse_filter
from lloco_engine.types import Hit, Turn
from lloco_engine.unicode import require_unicode

__all__ = ["SETTINGS", "AskRequest"]

# the settings of a request, by the field that holds them
SETTINGS: dict[str, type[RetrieveConfig | PrefixConfig | GenerateConfig]] = {
    "retrieve": RetrieveConfig,
    "prefix": PrefixConfig,
    "generate": GenerateConfig,
}
_OF_A_SEARCH = ("retrieve", "filters", "tenant", "history")


@dataclass(frozen=True)
class AskRequest:
    """A question to an engine. Whoever asks may name each field, and each setting of the three, as a keyword argument.

    Args:
        question: text, not empty.
        retrieve: how segments are found, and what becomes of a question that none answers.
        prefix: how segments are placed and read, and their budget.
        generate: how tokens are chosen.
        hits: segments to read, best first, from `Engine.retrieve`; None searches for them. They are looked up again: of
            a hit only where it points to is believed, and one that is not there any more is left out.
        whole_document: id of a document to read all of, instead of a search; or several, to be read together.
        filters: which documents a search may find, as `lloco_engine.filters` says.
        tenant: whose documents.
        history: earlier turns of the conversation, oldest first: what the user said counts in the search. The
            segments stand before them.
        adapter: ``"auto"`` takes that of the hits' group, as `lloco_engine.adapters.routing` says; ``"none"`` answers
            with the base weights; else a group, or the name of a loaded adapter.
        context: raw text to read after the segments.
        verbatim: the question brings its own instructions, so the engine writes none before it.

    Raises:
        ConfigError: the question is empty or no text, or filters are given where nothing is searched.
    """

    question: str
    retrieve: RetrieveConfig = field(default_factory=RetrieveConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    hits: Sequence[Hit] | None = None
    whole_document: str | Sequence[str] | None = None
    filters: Filters | None = None
    tenant: str = ""
    history: Sequence[Turn] = ()
    adapter: str = "auto"
    context: str = ""
    verbatim: bool = False

    def __post_init__(self) -> None:
        for name in ("question", "tenant", "context", "adapter"):
            if not isinstance(value := getattr(self, name), str):
                raise ConfigError(f"{name} must be text, not {value!r:.80}")
        several = None if isinstance(self.whole_document, str) else self.whole_document
        for name, values, kind in (
            ("history", self.history, Turn),
            ("hits", self.hits, Hit),
            ("whole_document", several, str),
        ):
            if values is not None and not (
                isinstance(values, Sequence) and all(isinstance(one, kind) for one in values)
            ):
                raise ConfigError(f"{name} must be a sequence of {kind.__name__}, not {values!r:.80}")
        names = ("question", "tenant", "whole_document", "context", "adapter")
        require_unicode(**{name: getattr(self, name) for name in names})
        require_unicode(history=[turn.text for turn in self.history])
        parse_filter(self.filters)
        if not self.question.strip():
            raise ConfigError(f"a question must not be empty, not {self.question!r}")
        read = next((name for name in ("hits", "whole_document") if getattr(self, name) is not None), None)
        if self.hits is not None and self.whole_document is not None:
            raise ConfigError("either hits or whole_document may be given, and both were; leave one out")
        if read and self.filters is not None:
            raise ConfigError(
                f"filters say what a search may find, and {read} leaves nothing to search; give the filters to "
                f"retrieve and its hits to ask, or leave {read} out; received {self.filters!r}"
            )

    def but(self, given: Mapping[str, Any], call: str = "ask") -> Self:
        """The request, with what is given in place of its own. None says nothing: it stays as it is.

        Args:
            given: fields of a request, and settings of the three by their own names.
            call: for which it is: ``"retrieve"`` takes only what a search does.

        Raises:
            TypeError: a name is none of these.
            ConfigError: a value breaks its rule.
        """
        known = _OF_A_SEARCH if call == "retrieve" else [one.name for one in fields(self) if one.name != "question"]
        own = {name: given[name] for name in known if given.get(name) is not None}
        settings = {name: own.get(name, getattr(self, name)) for name in SETTINGS}
        names = {one.name for name in SETTINGS if name in known for one in fields(settings[name])}
        if unknown := sorted(set(given) - set(known) - names):
            raise TypeError(
                f"{call}() got an unexpected keyword argument {unknown[0]!r}; it takes {sorted({*known, *names})}"
            )
        return replace(self, **own | {name: config.but(given) for name, config in settings.items()})
