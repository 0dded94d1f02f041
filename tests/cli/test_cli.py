"""The command line, run against doubles of the engine and the store, and once against a real store."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import store_cases
import typer
from typer.testing import CliRunner

from lloco_engine import __version__
from lloco_engine.cli import app, stores
from lloco_engine.cli.ingest import _progress
from lloco_engine.cli.options import parse_filters, parse_metadata
from lloco_engine.cli.output import human_bytes, safe
from lloco_engine.cluster import RayCluster
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig, PrefixConfig, RetrieveConfig, StoreConfig
from lloco_engine.engine import Engine
from lloco_engine.errors import NotInStore, PromptTooLong, StoreCorrupt, StoreMismatch, StoreNotFound
from lloco_engine.readers import read_paths
from lloco_engine.request import AskRequest
from lloco_engine.store import FORMAT_VERSION, DocumentInfo, Manifest, Problem, Store
from lloco_engine.store.writer import Writer
from lloco_engine.types import Answer, Divergence, Document, Failure, Hit, IngestReport, Span, Turn, Usage

TEXT = "The crane in hall 3 fell in March.\nIt was repaired by Anna Vogt.\x1b[31m"
HIT = Hit("s1", "report.md", 2, Span(10, 10 + len(TEXT)), TEXT, 20, 0.734, (Span(45, 74),), title="The report")
DIVERGENCE = Divergence(0.5, 0.25, 8)
USAGE = Usage(prompt_tokens=31, prompt_slots=96, source_tokens=1536, completion_tokens=5, ttft_s=0.25, decode_s=0.5)
ANSWER = Answer("Anna Vogt repaired it.", (HIT,), USAGE)


class EngineDouble:
    """Answers from a script and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.opened: dict[str, Any] = {}
        self.answer = ANSWER
        self.error: BaseException | None = None
        self.closed = 0
        self.cluster: Any = None

    def __enter__(self) -> EngineDouble:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def _asked(self, name: str, question: str, options: dict[str, Any]) -> None:
        AskRequest(question).but(options)  # refuses what the engine does not take
        self._note(name, question, options)

    def _note(self, name: str, subject: Any, options: dict[str, Any]) -> None:
        self.calls.append((name, subject, options))
        if self.error:
            raise self.error

    def ask(self, question: str, **options: Any) -> Answer:
        self._asked("ask", question, options)
        return self.answer

    def stream(self, question: str, **options: Any) -> StreamDouble:
        self._asked("stream", question, options)
        return StreamDouble(self.answer)

    def compare(self, question: str, **options: Any) -> dict[str, Answer]:
        self._asked("compare", question, options)
        text = replace(self.answer, text="No idea.", hits=(), usage=replace(USAGE, prompt_slots=0, prompt_tokens=6000))
        return {"lloco": self.answer, "in_context": text, "text_retrieval": text}

    def ingest(
        self,
        sources: Any,
        *,
        tenant: str = "",
        metadata: Mapping[str, Any] | None = None,
        prune: bool = False,
        read: Any = None,
        cluster: Any = None,
        progress: Any = None,
    ):
        sources = list(sources)
        assert read is None
        self.cluster = cluster
        self._note("ingest", sources, {"tenant": tenant, "metadata": metadata, "prune": prune})
        skipped: Counter[str] = Counter()
        items = [item for item in sources if isinstance(item, Document)]
        paths = [source for source in sources if not isinstance(source, Document)]
        items += read_paths(paths, tenant=tenant, skipped=skipped)
        documents = [item for item in items if isinstance(item, Document)]
        return IngestReport(
            added=tuple(document.doc_id for document in documents),
            failed=tuple(item for item in items if isinstance(item, Failure)),
            vanished=("gone.md", "lost.md"),
            pruned=("gone.md", "lost.md") if prune else (),
            skipped=dict(skipped),
            source_tokens=1200,
            compress_s=2.0,
        )


class StreamDouble:
    """An answer in pieces."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __iter__(self) -> Iterator[str]:
        head, space, tail = self.answer.text.partition(" ")
        return iter([head, space + tail])


class StoreDouble:
    """A store with two documents."""

    def __init__(self) -> None:
        self.held = {
            "report.md": DocumentInfo(
                "report.md", "", "The report", "in/report.md", {"year": 2024}, 2, "ab", 65, 20, 1, 1, 2, 5000
            ),
            "notes.txt": DocumentInfo("notes.txt", "acme", "notes", "in/notes.txt", {}, 1, "cd", 5, 2, 1, 1, 1, 70),
        }

    def __enter__(self) -> StoreDouble:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def documents(self, tenant: str | None = None) -> list[DocumentInfo]:
        return [info for info in self.held.values() if tenant in (None, info.tenant)]

    def document(self, doc_id: str, tenant: str = "") -> DocumentInfo:
        if doc_id not in self.held or self.held[doc_id].tenant != tenant:
            raise NotInStore(f"the store holds no document {doc_id!r}")
        return self.held[doc_id]

    def document_text(self, doc_id: str, tenant: str = "") -> str:
        return TEXT

    def divergence(self, segment_id: str) -> Divergence | None:
        return DIVERGENCE

    def chunks(self, doc_id: str, tenant: str = "") -> list[Hit]:
        return [HIT]

    def writer(self) -> Any:
        return nullcontext(specced(Writer, self))

    def delete_document(self, doc_id: str, tenant: str = "") -> None:
        self.document(doc_id, tenant)
        del self.held[doc_id]


def specced(kind: type, double: object) -> Any:
    """What takes no more than a class does, and answers as its double; what the double lacks may not be called."""
    made = create_autospec(kind, instance=True, spec_set=True)
    for name, _ in inspect.getmembers(kind, callable):
        if not name.startswith("_") or name in ("__enter__", "__exit__"):
            answer = getattr(double, name, None)
            unexpected = AssertionError(f"{kind.__name__}.{name} was called, and nothing is expected of it")
            getattr(made, name).side_effect = answer if callable(answer) else unexpected
    if hasattr(kind, "__enter__"):
        made.__enter__.side_effect = lambda: made
    return made


@pytest.fixture
def engine(monkeypatch) -> EngineDouble:
    double = EngineDouble()

    def opened(store: Path, **options: Any) -> Any:
        double.opened = {"store": store, **options}
        return specced(Engine, double)

    monkeypatch.setattr(stores, "open_engine", create_autospec(stores.open_engine, side_effect=opened))
    return double


@pytest.fixture
def store(monkeypatch) -> StoreDouble:
    double = StoreDouble()
    opened = create_autospec(stores.open_store, side_effect=lambda store: specced(Store, double))
    monkeypatch.setattr(stores, "open_store", opened)
    return double


COMMANDS = ("ingest", "ask", "compare", "ls", "show", "rm", "verify", "backup", "restore", "stats", "info")


def run(*arguments: str, **options: Any):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


# -- the whole -------------------------------------------------------------------------------------------------------


def test_the_doubles_take_no_more_than_what_they_stand_for():
    engine = specced(Engine, EngineDouble())
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        engine.ingest([], labels={})
    with pytest.raises(TypeError, match="unexpected keyword argument 'topk'"):
        engine.ask("q", topk=2)
    with pytest.raises(AssertionError, match=r"Engine\.backup was called"):
        engine.backup("there")
    with pytest.raises(AttributeError):
        engine.recall("q")


def test_help_in_a_process_lists_the_commands():
    out = subprocess.run([sys.executable, "-m", "lloco_engine", "--help"], capture_output=True, text=True, check=False)
    assert out.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in out.stdout


def test_importing_the_command_line_loads_nothing_heavy():
    code = (
        "import sys, lloco_engine, lloco_engine.cli; "
        "print([m for m in ('torch', 'transformers', 'faiss', 'numpy', 'sentence_transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    result = run(command, "--help", env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert f"lloco {command}" in result.output.split("Examples:")[1]
    assert "--json" in result.output


def test_version_and_no_arguments():
    assert run("--version").output == f"lloco {__version__}\n"
    assert run().exit_code == 2
    assert "Commands" in run().output


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["ask"], ["ask", "q", "--top-k", "0"], ["ask", "q", "--filter", "novalue"],
     ["ask", "q", "--stop", ""], ["ask", "q", "--top-p", "0"], ["ask", "q", "--whole-document", "d", "--filter", "a=b"],
     ["ingest"], ["ingest", "x", "--ratio", "0.5"], ["ingest", "x", "--dtype", "float64"],
     ["ingest", "x", "--meta", "title=x"],
     ["rm", "report.md"], ["rm", "report.md", "--json"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments, engine, store):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "report.md" in store.held
    assert engine.calls == []


@pytest.mark.parametrize(
    "error",
    [StoreMismatch("decoder differs:\n 'a' against 'b'"), NotInStore("no document 'x'"), PromptTooLong("too long")],
)
def test_an_engines_error_is_one_line_and_exit_code_1(error, engine):
    engine.error = error
    result = run("ask", "q")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"error: {' '.join(str(error).split())}\n"
    assert engine.closed == 1


def test_an_interrupt_is_exit_code_130(engine, tmp_path):
    engine.error = KeyboardInterrupt()
    result = run("ask", "q")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    result = run("ingest", tmp_path)
    assert result.exit_code == 130
    assert "goes on from here" in result.stderr


def test_the_store_comes_from_the_option_else_the_environment_else_the_default(engine):
    run("ask", "q", "--store", "mine", env={"LLOCO_STORE": "theirs"})
    assert engine.opened["store"] == Path("mine")
    run("ask", "q", env={"LLOCO_STORE": "theirs"})
    assert engine.opened["store"] == Path("theirs")
    run("ask", "q", env={"LLOCO_STORE": None})
    assert engine.opened["store"] == Path("lloco-store")


# -- ask and compare -------------------------------------------------------------------------------------------------


def test_ask_streams_and_shows_sources_and_cost(engine):
    result = run("ask", "Who repaired it?")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "Anna Vogt repaired it."
    assert '[1] report.md, segment 2, score 0.73  "The report"' in lines
    assert "    | It was repaired by Anna Vogt." in lines
    assert "prompt 31 tokens + 96 slots for 1,536 source tokens, first token 0.25 s, 5 tokens at 8.0/s" in lines[-1]


def test_ask_passes_every_option_on(engine):
    run(
        "ask", "q", "--top-k", "2", "--filter", "year=2024", "--filter", "team=pumps", "--neighbours", "1",
        "--focus", "3",
        "--tenant", "acme", "--max-new-tokens", "9", "--temperature", "0.7", "--top-p", "0.9", "--seed", "3",
        "--stop", "\n", "--adapter", "law", "--decoder", "d", "--embedder", "e", "--device", "cpu", "--compressor", "c",
        "--template", "lloco-nqa", "--no-repeat-ngram", "4", "--min-new-tokens", "2",
        "--min-score", "0.3", "--floor", "0.2", "--refuse", "--hints", "spelling,pointing",
        "--spelling", "0", "--pointing", "1",
    )  # fmt: skip
    assert engine.opened == {
        "store": Path("lloco-store"), "decoder": "d", "embedder": "e", "device": "cpu", "compressor": "c",
        "template": "lloco-nqa",
    }  # fmt: skip
    assert engine.calls == [
        ("stream", "q", {
            "filters": {"$and": [{"year": {"$in": [2024, "2024"]}}, {"team": {"$in": ["pumps"]}}]},
            "whole_document": None, "history": (),
            "retrieve": RetrieveConfig(top_k=2, neighbours=1, min_score=0.3, floor=0.2, when_nothing="refuse"),
            "prefix": PrefixConfig(focus=3),
            "tenant": "acme", "adapter": "law",
            "generate": GenerateConfig(
                max_new_tokens=9, min_new_tokens=2, temperature=0.7, top_p=0.9, stop=("\n",), seed=3, no_repeat_ngram=4,
                hints=("spelling", "pointing"), spelling=0, pointing=1,
            ),
        }),
    ]  # fmt: skip


def test_a_conversation_is_read_from_a_file(engine, tmp_path):
    said = tmp_path / "said.json"
    said.write_text('[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]')
    run("ask", "q", "--history", str(said))
    assert engine.calls[0][2]["history"] == (Turn("user", "Who?"), Turn("assistant", "Anna."))
    for bad in ("{", "[1]", '[{"role": "system", "content": "x"}]', '[{"role": "user", "content": 1}]', "3"):
        said.write_text(bad)
        result = CliRunner().invoke(app, ["ask", "q", "--history", str(said)])
        assert result.exit_code == 2 and "--history" in result.output


@pytest.mark.parametrize("command", ["ask", "compare"])
def test_beams_are_passed_on(engine, command):
    run(command, "q", "--beams", "4")
    _, _, options = engine.calls[0]
    assert options["generate"].beams == 4


def test_ask_about_a_whole_document_and_without_adapter(engine):
    run("ask", "q", "--whole-document", "report.md", "--adapter", "none")
    _, _, options = engine.calls[0]
    assert (options["whole_document"], options["adapter"], options["filters"]) == ("report.md", "none", None)


def test_ask_as_json_is_one_value_with_verbatim_spans(engine):
    result = run("ask", "Who?", "--json")
    value = json.loads(result.stdout)
    assert (value["question"], value["answer"], value["finish"]) == ("Who?", ANSWER.text, "stop")
    assert value["usage"]["prompt_slots"] == 96
    assert value["usage"]["tokens_per_s"] == 8.0
    (source,) = value["sources"]
    assert source["windows"] == [{"start": 45, "end": 74, "text": "It was repaired by Anna Vogt."}]
    assert source["span"] == {"start": 10, "end": 10 + len(TEXT)}


def test_warnings_and_a_cut_off_answer_are_told_on_stderr(engine):
    engine.answer = replace(ANSWER, finish="length", warnings=("segment s9 is damaged and was left out",))
    result = run("ask", "q")
    assert "cut off at --max-new-tokens" in result.stderr
    assert "warning: segment s9 is damaged" in result.stderr
    assert "damaged" not in result.stdout


def test_a_document_cannot_steer_the_terminal(engine):
    engine.answer = replace(ANSWER, text="Red \x1b[31mtext", hits=(replace(HIT, windows=()),))
    result = run("ask", "q", color=True)
    assert "\x1b" not in result.stdout
    assert safe("a\tb\né👍\x07") == "a\tb\né👍\ufffd"


def test_compare_shows_three_answers_and_their_cost(engine):
    result = run("compare", "q", "-k", "1")
    assert engine.calls[0][0] == "compare"
    for heading in ("== lloco\nAnna Vogt", "== in context\nNo idea.", "== text retrieval"):
        assert heading in result.stdout
    assert result.stdout.splitlines()[-1].split() == [
        "text",
        "retrieval",
        "none",
        "6,000",
        "0",
        "1,536",
        "0.25",
        "s",
        "8.0",
    ]


def test_compare_as_json_has_one_entry_per_method(engine):
    value = json.loads(run("compare", "q", "--json").stdout)
    assert list(value) == ["lloco", "in_context", "text_retrieval"]
    assert value["in_context"]["usage"]["prompt_tokens"] == 6000


# -- ingest ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("first text")
    (folder / "b.md").write_text("# second")
    (folder / "pic.png").write_bytes(b"\x89PNG")
    return folder


def test_ingest_reports_what_it_did(engine, corpus):
    result = run("ingest", corpus)
    assert result.exit_code == 0
    rows = {line.rsplit(None, 1)[0].strip(): line.rsplit(None, 1)[1] for line in result.stdout.splitlines()[1:] if line}
    assert rows["added"] == "2"
    assert rows["failed"] == "0"
    assert (rows["vanished"], rows["pruned"]) == ("2", "0")
    assert "vanished: gone.md" in result.stderr and "--prune removes them" in result.stderr
    assert "600 tokens/s" in result.stdout
    assert "skipped in folders: 1 .png" in result.stderr


def test_ingest_names_failures_and_exits_1(engine, corpus):
    (corpus / "bad.txt").write_bytes(b"\0")
    result = run("ingest", corpus, corpus / "gone.txt")
    assert result.exit_code == 1
    assert f"failed: {corpus}/bad.txt: a text must not be binary" in result.stderr
    assert f"failed: {corpus}/gone.txt: no such file or folder" in result.stderr
    assert engine.closed == 1


def test_ingest_says_what_was_pruned(engine, corpus):
    result = run("ingest", corpus, "--prune")
    assert result.exit_code == 0
    assert "pruned: gone.md\npruned: lost.md\n" in result.stdout
    assert "vanished" not in result.stderr
    assert "lloco ingest docs/ --prune" in run("ingest", "--help").stdout


def test_ingest_as_json(engine, corpus):
    (corpus / "bad.txt").write_bytes(b"")
    result = run("ingest", corpus, "--json")
    value = json.loads(result.stdout)
    assert result.exit_code == 1
    assert value["added"] == ["a.txt", "b.md"]
    assert value["failed"][0]["source"] == f"{corpus}/bad.txt"
    assert value["skipped"] == {".png": 1}


def test_ingest_passes_every_option_on(engine, corpus):
    run(
        "ingest", corpus, "--store", "s", "--decoder", "d", "--embedder", "e", "--ratio", "8",
        "--segment-tokens", "512", "--dtype", "int8", "--tenant", "acme", "--meta", "year=2024",
        "--meta", "team=pumps", "--device", "cpu", "--compressor", "c", "--set", "chain=1", "--prune",
    )  # fmt: skip
    assert engine.opened == {
        "store": Path("s"), "create": True, "decoder": "d", "embedder": "e", "ratio": 8.0, "segment_tokens": 512,
        "dtype": "int8", "device": "cpu", "compressor": "c", "settings": {"chain": 1},
    }  # fmt: skip
    assert engine.calls == [
        ("ingest", [corpus], {"tenant": "acme", "metadata": {"year": 2024, "team": "pumps"}, "prune": True})
    ]


@pytest.mark.parametrize(
    ("flags", "address"),
    [(["--ray"], "local"), (["--ray", "--prune"], "local"), (["--ray", "auto"], "auto"), (["--ray=head"], "head"),
     (["--ray", "head.lan:6379"], "head.lan:6379"), (["--ray", "ray://[::1]:10001"], "ray://[::1]:10001")],
    ids=str,
)  # fmt: skip
def test_ray_takes_an_address_or_none(engine, corpus, flags, address):
    assert run("ingest", *flags, corpus).exit_code == 0
    assert (engine.cluster.address, engine.calls[0][1]) == (address, [corpus])
    assert run("ingest", corpus, *flags, "--ray-workers", "2", "--ray-gpus", "0.5").exit_code == 0
    assert engine.cluster == RayCluster(address, 2, 1, 0.5)


def test_no_cluster_makes_segments_without_ray(engine, corpus):
    assert run("ingest", corpus).exit_code == 0
    assert engine.cluster is None
    assert run("ingest", corpus, "--ray-workers", "2").exit_code == 2


def test_an_empty_folder_is_said_to_be_empty(engine, tmp_path):
    result = run("ingest", tmp_path)
    assert result.exit_code == 0
    assert "nothing to ingest" in result.stderr


def test_the_bar_follows_the_engine(corpus, capsys, monkeypatch):
    from rich.progress import Progress as Bar

    from lloco_engine.engine import Progress

    shown, totals = [], []
    monkeypatch.setattr(Bar, "update", lambda self, task, **fields: shown.append(fields))
    monkeypatch.setattr(Bar, "add_task", lambda self, what, total, **fields: totals.append(total))
    with _progress([corpus], show=True) as report:
        assert report is not None
        report(Progress("a.txt", 1, 2, 0, 1500.0, 0, 5))
    assert totals == [18]  # bytes of a.txt and b.md
    assert shown[0]["completed"] == 5
    assert shown[0]["rate"] == "1,500 tokens/s"
    assert capsys.readouterr().out == ""
    with _progress([corpus], show=False) as report:
        assert report is None


# -- the store's commands --------------------------------------------------------------------------------------------


def test_ls_lists_documents(store):
    result = run("ls")
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:]] == [
        ["report.md", "The"],
        ["acme", "notes.txt"],
    ]
    assert "5.0 KB" in result.stdout
    assert "report.md" not in run("ls", "--tenant", "acme").stdout
    assert [info["doc_id"] for info in json.loads(run("ls", "--json").stdout)] == ["report.md", "notes.txt"]


def test_a_long_table_is_not_wrapped_in_a_file(store):
    store.held["x" * 150] = replace(store.held["report.md"], doc_id="x" * 150)
    assert "x" * 150 in run("ls").stdout


def test_show_gives_facts_and_segments(store):
    result = run("show", "report.md")
    assert "metadata year  2024" in result.stdout
    assert "bytes per source token  250.0" in result.stdout
    assert "The crane in hall 3" in result.stdout
    assert run("show", "report.md", "--text").stdout == TEXT
    value = json.loads(run("show", "report.md", "--json").stdout)
    assert value["version"] == 2
    assert value["chunks"][0]["text"] == TEXT
    assert value["chunks"][0]["divergence"] == {"before": 0.5, "after": 0.25, "steps": 8}
    assert "text" not in value
    missing = run("show", "report.md", "--tenant", "acme")
    assert (missing.exit_code, missing.stderr) == (1, "error: the store holds no document 'report.md'\n")


def test_rm_removes_what_is_there_and_names_what_is_not(store):
    result = run("rm", "report.md", "nothing", "report.md", "--yes")
    assert result.exit_code == 1
    assert result.stdout == "removed report.md\n"
    assert "error: the store holds no document 'nothing'" in result.stderr
    assert list(store.held) == ["notes.txt"]
    result = run("rm", "notes.txt", "--tenant", "acme", "--yes", "--json")
    assert json.loads(result.stdout) == {"removed": ["notes.txt"], "missing": []}
    assert result.exit_code == 0


def test_verify_names_problems_and_exits_1(monkeypatch):
    problems = [
        Problem("segment", "segments/ab/x.safetensors", "is truncated", ("report.md",)),
        Problem("orphan", "o", "extra"),
    ]
    monkeypatch.setattr(Store, "verify_path", staticmethod(lambda path, progress=None: problems))
    result = run("verify")
    assert result.exit_code == 1
    assert "segment: segments/ab/x.safetensors: is truncated (documents: report.md)" in result.stderr
    value = json.loads(run("verify", "--json").stdout)
    assert not value["ok"]
    assert value["problems"][0]["doc_ids"] == ["report.md"]
    del problems[0]
    result = run("verify")
    assert result.exit_code == 0
    assert "orphan" in result.stdout
    assert "sound" in result.stdout


def test_verify_repairs_and_compresses_again_from_the_stores_text(monkeypatch, engine, store):
    store.missing_segments = lambda doc_id, tenant="": ["s1"] if doc_id == "notes.txt" else []
    monkeypatch.setattr(Store, "repair", staticmethod(lambda path: ["s1 was damaged"]))
    monkeypatch.setattr(Store, "verify_path", staticmethod(lambda path, progress=None: []))
    engine.ingest = lambda documents, tenant: (
        IngestReport(repaired=tuple(d.doc_id for d in documents))
        if [(d.text, d.tenant, d.source) for d in documents] == [(TEXT, "acme", "in/notes.txt")]
        else IngestReport()
    )
    result = run("verify", "--repair")
    assert result.exit_code == 0
    assert result.stdout == "repaired: s1 was damaged\nrepaired: notes.txt was compressed again\nthe store is sound\n"


@pytest.mark.parametrize(
    "command", [["ls"], ["show", "x"], ["rm", "x", "--yes"], ["verify"], ["verify", "--repair"], ["ask", "q"]]
)
def test_a_store_that_is_not_there_is_named(command, tmp_path):
    result = run(*command, "--store", tmp_path / "none")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: there is no store at {tmp_path}/none")
    assert result.stdout == ""
    assert not (tmp_path / "none").exists()


def test_info_works_without_a_store(tmp_path):
    value = json.loads(run("info", "--store", tmp_path / "none", "--json").stdout)
    assert value["lloco"] == __version__
    assert value["store"] is None
    assert value["libraries"]["torch"][0].isdigit()
    assert value["models"]["device"]
    assert "store: none" in run("info", "--store", tmp_path / "none").stdout


def test_the_stores_commands_on_a_real_store(tmp_path):
    path = tmp_path / "store"
    made = store_cases.make_store(path, store_cases.document("a", year=2024), store_cases.document("b", tenant="acme"))
    damaged = store_cases.segment_file(path, made.chunks("a")[0].segment_id)
    made.close()
    at = ("--store", path)
    assert [info["doc_id"] for info in json.loads(run("ls", *at, "--json").stdout)] == ["a", "b"]
    assert json.loads(run("show", "a", *at, "--json").stdout)["metadata"] == {"year": 2024}
    assert json.loads(run("info", *at, "--json").stdout)["store"]["stats"]["documents"] == 2
    assert run("verify", *at).stdout == "the store is sound\n"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    result = run("verify", *at, "--json")
    assert result.exit_code == 1
    assert [problem["doc_ids"] for problem in json.loads(result.stdout)["problems"]] == [["a"]]
    assert run("rm", "a", *at, "--yes").stdout == "removed a\n"
    assert run("verify", *at).exit_code == 0
    assert [info["doc_id"] for info in json.loads(run("ls", *at, "--json").stdout)] == ["b"]


def test_a_store_is_backed_up_restored_and_counted(tmp_path):
    path, copy, again = tmp_path / "store", tmp_path / "copies" / "monday", tmp_path / "again"
    store_cases.make_store(path, store_cases.document("a"), store_cases.document("b", tenant="acme")).close()
    copy.parent.mkdir()
    assert run("backup", copy, "--store", path).stdout == f"2 document(s) copied from {path} to {copy}\n"
    assert run("rm", "a", "--store", path, "--yes").exit_code == 0
    assert json.loads(run("restore", copy, "--store", again, "--json").stdout) == {
        "from": str(copy),
        "to": str(again),
        "documents": 2,
    }
    assert run("verify", "--store", again).exit_code == 0
    assert [info["doc_id"] for info in json.loads(run("ls", "--store", again, "--json").stdout)] == ["a", "b"]
    linked = run("backup", tmp_path / "linked", "--link", "--store", again)
    assert linked.exit_code == 0 and run("verify", "--store", tmp_path / "linked").exit_code == 0
    assert json.loads(run("stats", "--store", again, "--json").stdout)["documents"] == 2
    assert "documents: 1\n" in run("stats", "--store", path).stdout
    for arguments, reason in (
        (("backup", copy, "--store", path), "missing or empty"),
        (("backup", tmp_path / "x", "--store", tmp_path / "none"), "no store"),
        (("restore", copy, "--store", path), "missing or empty"),
        (("restore", tmp_path / "none", "--store", tmp_path / "x"), "no store"),
        (("stats", "--store", tmp_path / "none"), "no store"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 1 and refused.stdout == "" and reason in refused.stderr, refused.output
        assert "\n" not in refused.stderr.strip() and not (tmp_path / "x").exists()


# -- small things ----------------------------------------------------------------------------------------------------


def test_metadata_values_are_read_as_what_they_look_like():
    pairs = ["a=1", "b=-2.5", "c=true", "d=x=y", "e=", 'f="1"', "g=007", "h=1e5", 'i="', "j=nan"]
    assert parse_metadata(pairs) == {
        "a": 1, "b": -2.5, "c": True, "d": "x=y", "e": "", "f": "1", "g": "007", "h": "1e5", "i": '"', "j": "nan",
    }  # fmt: skip
    for pair in ("novalue", "=x", " =x", "doc_id=x"):
        with pytest.raises(typer.BadParameter):
            parse_metadata([pair])


@pytest.mark.parametrize(
    ("term", "wanted"),
    [
        ("season=autumn", {"season": {"$in": ["autumn"]}}),
        ("season = autumn", {"season": {"$in": ["autumn"]}}),
        ("year=2024", {"year": {"$in": [2024, "2024"]}}),
        ('year="2024"', {"year": {"$in": ["2024"]}}),
        ("ok=true", {"ok": {"$in": [True, "true"]}}),
        ("e=", {"e": {"$in": [""]}}),
        ("a=b=c", {"a": {"$in": ["b=c"]}}),
        ("year!=2024", {"year": {"$nin": [2024, "2024"]}}),
        ("year>=2020", {"year": {"$gte": 2020}}),
        ("share < -1.5", {"share": {"$lt": -1.5}}),
        ('n>"5"', {"n": {"$gt": "5"}}),
        ("date<=2024-01-31", {"date": {"$lte": "2024-01-31"}}),
        ("doc_id>5", {"doc_id": {"$gt": "5"}}),
        ("season in spring, autumn", {"season": {"$in": ["spring", "autumn"]}}),
        ("year in 2020,2021", {"year": {"$in": [2020, "2020", 2021, "2021"]}}),
        ('who not in "Ann, Lee",Bo', {"who": {"$nin": ["Ann, Lee", "Bo"]}}),
        ("season exists", {"season": {"$exists": True}}),
        ("season missing", {"season": {"$exists": False}}),
        ('"note in hand"=1', {"note in hand": {"$in": [1, "1"]}}),
    ],
)
def test_a_filter_is_written_as_people_write_it(term, wanted):
    assert parse_filters([term]) == wanted
    assert parse_filters([term, "a=x"]) == {"$and": [wanted, {"a": {"$in": ["x"]}}]}


def test_no_filter_and_what_is_none():
    assert parse_filters([]) is None
    none = ("novalue", "=x", " = x", "year>=", "ok>true", "$where=1", "a=caf\udce9", "season in", "year=>2020", "a=<b")
    for term in none:
        with pytest.raises(typer.BadParameter):
            parse_filters([term])


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_bytes_are_shown_short(count, text):
    assert human_bytes(count) == text


def test_open_engine_takes_what_is_not_given_from_the_store(monkeypatch, tmp_path):
    seen: dict[str, Any] = {}
    opener = SimpleNamespace(open=lambda store, **options: seen.update(options))
    monkeypatch.setitem(sys.modules, "lloco_engine.engine", SimpleNamespace(Engine=opener))
    named = ("decoder", "embedder", "compress", "chunk", "store_config")
    stores.open_engine(tmp_path, create=True)
    assert [seen[name] for name in named] == [None] * 5  # the engine's defaults, and sizes that fit the decoder
    stores.open_engine(tmp_path, create=True, segment_tokens=64, compressor="c", settings={"a": 1})
    assert (seen["compress"], seen["chunk"]) == (CompressConfig("c", 16, {"a": 1}), ChunkConfig(64, 64, 40))
    prints = dict.fromkeys(("decoder_fingerprint", "tokenizer_fingerprint", "template_fingerprint"), "0" * 16)
    manifest = Manifest(
        FORMAT_VERSION, "d", **prints, layers=1, kv_heads=1, head_dim=8, memory="compact_kv", compressor="c",
        compressor_settings={"a": 1, "b": 2}, ratio=8.0, dtype="int8", embedder="e", embedder_fingerprint="0" * 16,
        embedder_dim=4, chunk={"segment_tokens": 400, "window_tokens": 100, "window_overlap": 20},
    )  # fmt: skip
    (tmp_path / "manifest.json").write_text(manifest.dumps())
    stores.open_engine(tmp_path)
    assert [seen[name] for name in named] == [None] * 5  # as the store was made
    assert seen["create"] is False
    stores.open_engine(tmp_path, ratio=4, segment_tokens=64, dtype="float16", decoder="other", settings={"a": 3})
    assert (seen["decoder"], seen["store_config"]) == ("other", StoreConfig("float16"))
    assert seen["compress"] == CompressConfig("c", 4, {"a": 3, "b": 2})
    assert seen["chunk"] == ChunkConfig(64, 64, 20)
    stores.open_engine(tmp_path, compressor="another")
    assert seen["compress"] == CompressConfig("another")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreCorrupt, match=r"manifest\.json"):
        stores.open_engine(tmp_path)
    with pytest.raises(StoreNotFound):
        stores.open_engine(tmp_path / "none")
