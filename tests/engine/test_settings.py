"""One request: every setting of a question is reached from Python, the command line, LangChain and LlamaIndex."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import langchain_cases
import pytest
from llama_index.core.schema import QueryBundle
from typer.testing import CliRunner

import lloco_integrations.langchain as lc
import lloco_integrations.llama_index as li
from lloco_engine import AskRequest, Engine, GenerateConfig, PrefixConfig, RetrieveConfig
from lloco_engine.cli import app, stores
from lloco_engine.context import ContextBuilder
from lloco_engine.errors import ConfigError
from lloco_engine.request import SETTINGS
from lloco_integrations.handles import Handles
from lloco_integrations.settings import ANSWER, SEARCH

EVERY = [(group, one.name) for group, kind in SETTINGS.items() for one in fields(kind)]
OTHERS = {"hints": ("pointing",), "stop": ("x", "y"), "spelling": 0.0, "pointing": 0.0}


def other(group: str, name: str) -> Any:
    """A value of a setting that is not its default."""
    kind = SETTINGS[group]
    hint, default = get_type_hints(kind)[name], getattr(kind(), name)
    if name in OTHERS:
        return OTHERS[name]
    if get_origin(hint) is Literal:
        return next(value for value in get_args(hint) if value != default)
    if hint is bool:
        return not default
    return (default or 1) + 1 if hint in (int, int | None) else 0.25


def flags(group: str, name: str) -> list[str]:
    """The flags of the command line for that value."""
    value, flag = other(group, name), "--" + name.replace("_", "-")
    if name == "when_nothing":
        return ["--refuse"]
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, tuple):
        return [part for one in value for part in (flag, one)]
    return [flag, str(value)]


class Asked(Exception):
    """An engine was asked this."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with langchain_cases.open_engine(tmp_path_factory.mktemp("store") / "s", langchain_cases.decoder()) as made:
        made.ingest([langchain_cases.fact(topic) for topic in ("pump", "crane")])
        yield made


@pytest.fixture
def asked(engine, monkeypatch) -> list[AskRequest]:
    """What an engine was asked last; it does not answer."""
    seen: list[AskRequest] = []

    def note(self, request):
        seen[:] = [request]
        raise Asked

    monkeypatch.setattr(ContextBuilder, "find", note)
    monkeypatch.setattr(ContextBuilder, "search", note)
    monkeypatch.setattr(stores, "open_engine", lambda store, **options: engine)
    monkeypatch.setattr(Engine, "close", lambda self: None)
    return seen


def value_in(asked: list[AskRequest], group: str, name: str) -> Any:
    return getattr(getattr(asked[0], group), name)


def test_no_two_settings_have_one_name():
    names = [name for _, name in EVERY] + [one.name for one in fields(AskRequest)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_python_and_the_command_line_reach_it(engine, asked, group, name):
    wanted = other(group, name)
    assert wanted != getattr(SETTINGS[group](), name)
    with pytest.raises(Asked):
        engine.ask("Where?", **{name: wanted})
    assert value_in(asked, group, name) == wanted
    with pytest.raises(Asked):
        engine.ask(AskRequest("Where?", **{group: SETTINGS[group]().but({name: wanted})}))
    assert value_in(asked, group, name) == wanted
    asked.clear()
    CliRunner().invoke(app, ["ask", "Where?", *flags(group, name)])
    assert value_in(asked, group, name) == wanted


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_models_of_both_frameworks_reach_it(engine, asked, group, name):
    if name in {one.name for one in fields(RetrieveConfig) if one.metadata.get("only") == "search"}:
        assert name not in {one.name for one in ANSWER.values()}, "a model searches nothing"
        return
    (theirs,) = (key for key, one in ANSWER.items() if one.name == name)
    wanted = other(group, name)
    text = Handles.of(engine).mint(engine.store.chunks("pump.md")) + "\n\nQuestion: Where?"
    given = {theirs: list(wanted) if name == "stop" else wanted}
    calls = [
        lambda: lc.ChatLLoCO(engine=engine, **given).invoke(text),
        lambda: lc.ChatLLoCO(engine=engine).invoke(text, **given),
        lambda: lc.LLoCOLLM(engine=engine, **given).invoke(text),
        lambda: li.LLoCOLLM(engine, **given).complete(text),
        lambda: li.LLoCOLLM(engine).complete(text, **given),
    ]
    for call in calls:
        asked.clear()
        with pytest.raises(Asked):
            call()
        assert value_in(asked, group, name) == wanted


@pytest.mark.parametrize("name", [one.name for one in SEARCH.values()])
def test_retrievers_of_both_frameworks_reach_it(engine, asked, name):
    wanted, theirs = other("retrieve", name), "k" if name == "top_k" else name
    for call in (
        lambda: lc.LLoCORetriever(engine=engine, **{theirs: wanted}).invoke("Where?"),
        lambda: lc.LLoCORetriever(engine=engine).invoke("Where?", **{theirs: wanted}),
        lambda: li.LLoCORetriever(engine, **{name: wanted}).retrieve(QueryBundle("Where?")),
    ):
        asked.clear()
        with pytest.raises(Asked):
            call()
        assert value_in(asked, "retrieve", name) == wanted


def test_what_is_not_said_is_as_the_engine_was_opened(engine, asked, monkeypatch):
    monkeypatch.setattr(engine, "retrieval", RetrieveConfig(top_k=7, floor=0.4))
    monkeypatch.setattr(engine, "prefix", PrefixConfig(focus=5))
    text = Handles.of(engine).mint(engine.store.chunks("pump.md")) + "\n\nQuestion: Where?"
    for call in (
        lambda: engine.ask("Where?", adapter=None, floor=None, prefix=None, generate=None, hits=None),
        lambda: lc.LLoCOLLM(engine=engine).invoke(text),
        lambda: li.LLoCOLLM(engine).complete(text),
    ):
        with pytest.raises(Asked):
            call()
        assert (asked[0].adapter, asked[0].prefix, asked[0].generate) == (
            "auto",
            PrefixConfig(focus=5),
            GenerateConfig(),
        )
        assert asked[0].retrieve == RetrieveConfig(top_k=7, floor=0.4)
    for call in (
        lambda: lc.LLoCORetriever(engine=engine).invoke("Where?"),
        lambda: li.LLoCORetriever(engine).retrieve("Where?"),
    ):
        with pytest.raises(Asked):
            call()
        assert asked[0].retrieve == RetrieveConfig(top_k=7, floor=0.4)


NEW = """
import dataclasses
import lloco_engine.config as config

@dataclasses.dataclass(frozen=True)
class More(config.GenerateConfig):
    boredom: float = config.setting(0.0, "How soon it is bored.", least=0.0)

config.GenerateConfig = More
import lloco_engine, lloco_integrations.langchain as lc, lloco_integrations.llama_index as li
from typer.main import get_command
from lloco_engine.cli import app

assert lloco_engine.AskRequest("q").but({"boredom": 2.0}).generate.boredom == 2.0
for command in ("ask", "compare"):
    (flag,) = (one for one in get_command(app).commands[command].params if one.name == "boredom")
    assert (flag.opts, flag.help) == (["--boredom"], "How soon it is bored.")
for kind in (lc.ChatLLoCO, lc.LLoCOLLM, li.LLoCOLLM):
    assert kind.model_fields["boredom"].description == "How soon it is bored."
"""


def test_a_new_setting_is_one_line():
    out = subprocess.run([sys.executable, "-c", NEW], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("read", ["hits", "whole_document"])
def test_filters_are_not_ignored_where_nothing_is_searched(engine, read):
    given = {"hits": engine.retrieve("pump"), "whole_document": "pump.md"}[read]
    with pytest.raises(ConfigError, match=f"filters say what a search may find, and {read} leaves nothing to search"):
        engine.ask("Where?", **{read: given}, filters={"year": 2020})


def test_hits_that_are_given_are_cut_by_their_scores(engine):
    hits = engine.retrieve("The pump number 0 stands in the hall of pump.", top_k=2)
    assert len(hits) == 2 and hits[0].score > hits[1].score
    least = (hits[0].score + hits[1].score) / 2
    answer = engine.ask("Where?", hits=hits, min_score=least, max_new_tokens=2)
    assert [hit.doc_id for hit in answer.hits] == ["pump.md"]
    assert "1 of 2 segments scored below min_score" in answer.warnings[0]
    assert len(engine.ask("Where?", hits=hits, max_new_tokens=2).hits) == 2


@pytest.mark.parametrize("call", ["ask", "retrieve"])
def test_a_name_that_is_none_is_refused(engine, call):
    with pytest.raises(TypeError, match=rf"{call}\(\) got an unexpected keyword argument 'top_kk'; it takes"):
        getattr(engine, call)("Where?", top_kk=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beams'"):
        engine.retrieve("Where?", beams=3)
