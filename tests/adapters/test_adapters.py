"""Adapters by group: what a store keeps, which one answers, and what is refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from adapter_cases import adapter
from safetensors.torch import load_file
from store_cases import set_back
from typer.testing import CliRunner

from lloco_engine import Document, Engine
from lloco_engine.adapters import loading, routing
from lloco_engine.adapters.interpolate import average
from lloco_engine.adapters.manifest import WEIGHTS, AdapterManifest
from lloco_engine.adapters.registry import Registry
from lloco_engine.adapters.routing import group_of
from lloco_engine.cli import app
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import AdapterError, ConfigError, StoreFull
from lloco_engine.store import Store, adapters, schema
from lloco_engine.testing import HashingEmbedder
from lloco_engine.types import Hit, IngestReport, Span

SHORT = GenerateConfig(max_new_tokens=4)
BEFORE_ADAPTERS = next(n for n, step in enumerate(schema.MIGRATIONS) if "CREATE TABLE adapters" in step)


@pytest.fixture(scope="module")
def made(tmp_path_factory, decoder) -> Path:
    return adapter(tmp_path_factory.mktemp("made") / "law", decoder)


@pytest.fixture(scope="module")
def filled(tmp_path_factory, decoder_folder) -> Path:
    path = tmp_path_factory.mktemp("filled") / "store"
    chunk, whole = ChunkConfig(64, 24, 4), CompressConfig("uncompressed", 1)
    with Engine.open(
        path, decoder=str(decoder_folder), embedder=HashingEmbedder(), chunk=chunk, compress=whole
    ) as engine:
        engine.ingest([Document("law.md", "The court of Orne sat in May.")], metadata={"group": "law"})
        engine.ingest([Document("pump.md", "The pump of hall nine needs oil.")], metadata={"group": "pumps"})
        engine.ingest([Document("free.md", "Trams are green on Sundays.")])
    return path


@pytest.fixture
def store(filled, tmp_path) -> Path:
    return shutil.copytree(filled, tmp_path / "store")


@pytest.fixture
def engine(store, decoder):
    with Engine.open(store, decoder=decoder, embedder=HashingEmbedder()) as opened:
        yield opened
    for name in decoder.adapters:
        decoder.drop_adapter(name)


@pytest.fixture
def registry(store):
    with Store.open(store) as opened:
        yield Registry(opened)


def cli(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words])


# -- the registry ------------------------------------------------------------------------------------------------------


def test_versions_are_added_rolled_back_and_removed(registry, made):
    assert registry.kept() == []
    assert registry.current("law") is None
    assert [registry.add(made, "law").version for _ in range(3)] == [1, 2, 3]
    assert [(one.version, one.current) for one in registry.kept()] == [(1, False), (2, False), (3, True)]
    assert registry.rollback("law") == 2
    version, folder = registry.current("law")
    assert version == 2 and folder.parent.name == "law"
    assert registry.rollback("law", 3) == 3
    assert registry.remove("law", 3) == [3]
    assert registry.current("law")[0] == 2  # the newest that is left
    assert registry.add(made, "law").version == 4  # a number is never given twice
    assert registry.remove("law") == [1, 2, 4]
    assert registry.groups() == []
    assert registry.current("law") is None
    assert registry.add(made, "law").version == 5
    with pytest.raises(AdapterError, match=r"no earlier version; it has versions: 5"):
        registry.rollback("law")
    with pytest.raises(AdapterError, match=r"no version 9; it has versions: 5"):
        registry.rollback("law", 9)
    with pytest.raises(AdapterError, match=r"'poems' has no adapter"):
        registry.remove("poems")


def test_what_is_added_is_the_adapter_whole_and_nothing_else(registry, made):
    (made / "stranger.bin").write_bytes(b"x")
    kept = registry.add(made, "law").folder
    assert sorted(file.name for file in kept.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lloco.json", "owner.json",
    ]  # fmt: skip
    assert (kept / "adapter_model.safetensors").read_bytes() == (made / "adapter_model.safetensors").read_bytes()
    (made / "stranger.bin").unlink()


@pytest.mark.parametrize("name", ["", "..", "a/b", "none", "auto", ".work", "x" * 65, "a.b"])
def test_a_groups_name_cannot_be_a_path(store, registry, made, name):
    with pytest.raises(ConfigError, match="group's name"):
        registry.add(made, name)
    assert not (store / "adapters").exists()


def test_an_addition_that_fails_leaves_the_group_as_it_was(store, registry, made, monkeypatch):
    before = registry.add(made, "law").folder
    write = adapters.write_atomic

    def full(path, data, temporary):
        if path.name == WEIGHTS:
            raise StoreFull("no room")
        write(path, data, temporary)

    monkeypatch.setattr(adapters, "write_atomic", full)
    with pytest.raises(StoreFull):
        registry.add(made, "law")
    with pytest.raises(StoreFull):
        registry.add(made, "pumps")
    assert [(one.group, one.version) for one in registry.kept()] == [("law", 1)]
    assert [path for path in (store / "adapters").rglob("*") if path.is_dir()] == [before.parent, before]


def test_what_a_killed_addition_left_is_cleared_and_a_run_at_work_is_not(store, registry, made):
    left, work = store / "adapters" / "law" / "1-00000000", store / "adapters" / ".work-law"
    for folder in (left, work):
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"half")
    assert registry.current("law") is None
    registry.add(made, "law")
    assert not left.exists()
    assert work.exists()


KILLED = """
import os, sys
from pathlib import Path
from lloco_engine.adapters.registry import Registry
from lloco_engine.store import Store

steps = int(sys.argv[4])

def watch(frame, event, argument):
    global steps
    if "lloco_engine" in frame.f_code.co_filename:
        steps -= event == "line"
        if steps == 0:
            os._exit(9)
    return watch

with Store.open(sys.argv[2]) as store:
    registry = Registry(store)
    sys.settrace(watch)
    {"add": lambda: registry.add(Path(sys.argv[3]), "law"), "rm": lambda: registry.remove("law", 2),
     "rollback": lambda: registry.rollback("law")}[sys.argv[1]]()
"""


@pytest.mark.parametrize("change", ["add", "rm", "rollback"])
def test_a_change_that_is_killed_anywhere_is_made_or_not_made(tmp_path, filled, made, change):
    """Killed after some line, wherever that is; many places under `tests/torture`."""
    store = shutil.copytree(filled, tmp_path / "store")
    with Store.open(store) as opened:
        for _ in range(2):
            Registry(opened).add(made, "law")
    before, after = {
        "add": ([(1, False), (2, True)], [(1, False), (2, False), (3, True)]),
        "rm": ([(1, False), (2, True)], [(1, True)]),
        "rollback": ([(1, False), (2, True)], [(1, True), (2, False)]),
    }[change]
    seen = []
    for step in (10, 90, 10_000):
        trial = shutil.copytree(store, tmp_path / str(step))
        command = [sys.executable, "-c", KILLED, change, str(trial), str(made), str(step)]
        code = subprocess.run(command, check=False).returncode
        assert code == (0 if step == 10_000 else code)
        with Store.open(trial) as opened:
            registry = Registry(opened)
            state = [(one.version, one.current) for one in registry.kept()]
            assert state in (before, after)
            assert opened.verify() == []
            assert registry.open("law") is not None
            if len(state) > 1 and not state[0][1]:
                registry.rollback("law")
                assert registry.open("law") is not None
            registry.add(made, "law")
            folders = [folder for home in (trial / "adapters").iterdir() for folder in home.iterdir()]
            assert sorted(folders) == sorted(one.folder for one in registry.kept())  # nothing is left over
        seen.append(state)
    assert seen[0] == before and seen[-1] == after


def test_every_byte_of_an_adapter_is_watched(store, engine, made):
    folder = engine.adapters.registry.add(made, "law").folder
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damaged in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            problems = engine.verify()
            assert [problem.kind for problem in problems] == ["adapter"]
            assert path.name in problems[0].detail
            with pytest.raises(AdapterError, match=path.name):
                engine.ask("The court of Orne sat in May.", generate=SHORT, top_k=1)
            path.write_bytes(whole)
    assert engine.verify() == []


def test_repair_removes_a_damaged_adapter_and_says_so(store, made):
    with Store.open(store) as opened:
        registry = Registry(opened)
        registry.add(made, "law")
        (registry.add(made, "law").folder / "lloco.json").write_bytes(b"{}")
    assert any("version 2 of group 'law' was removed" in line for line in Store.repair(store))
    with Store.open(store) as opened:
        assert Registry(opened).current("law")[0] == 1
        assert opened.verify() == []


def test_adapters_outlive_a_catalogue_that_is_lost_with_their_tenant(store, made):
    with Store.open(store) as opened:
        Registry(opened).add(made, "law", "ada")
    (store / "catalogue.sqlite").write_bytes(b"damaged")
    for suffix in ("-wal", "-shm"):
        (store / f"catalogue.sqlite{suffix}").unlink(missing_ok=True)
    Store.repair(store)
    with Store.open(store) as opened:
        assert [(one.tenant, one.group, one.version, one.current) for one in Registry(opened).kept()] == [
            ("ada", "law", 1, True)
        ]


def test_adapters_of_former_stores_answer_as_they_did(store, made):
    """Until then ``current.json`` said which version answers, for every tenant, and a kill could leave half of one."""
    for version in ("1", "2"):
        shutil.copytree(made, store / "adapters" / "law" / version)
    (store / "adapters" / "law" / "current.json").write_text('{"current": 1, "newest": 4}')
    (store / "adapters" / "pumps" / "1").mkdir(parents=True)
    (store / "adapters" / "pumps" / "1" / "adapter_config.json").write_text("{}")
    set_back(store, BEFORE_ADAPTERS)
    with closing(sqlite3.connect(store / "catalogue.sqlite", isolation_level=None)) as connection:
        connection.execute("UPDATE documents SET tenant = 'ada' WHERE doc_id = 'law.md'")
    with Store.open(store) as opened:
        registry = Registry(opened)
        assert [(one.tenant, one.group, one.version, one.current) for one in registry.kept()] == [
            ("", "law", 1, True), ("", "law", 2, False), ("ada", "law", 1, True), ("ada", "law", 2, False),
        ]  # fmt: skip
        assert registry.remove("law", tenant="ada") == [1, 2]
        assert registry.open("law") is not None  # the files that both had are still there
        assert registry.add(made, "law").version == 5


def test_a_folder_without_a_sound_adapter_is_not_added(registry, made, tmp_path):
    with pytest.raises(AdapterError, match=r"lloco\.json"):
        registry.add(tmp_path, "law")
    damaged = shutil.copytree(made, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged"):
        registry.add(damaged, "law")


def test_a_manifest_of_a_newer_engine_or_another_form_is_refused(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "made")
    values = json.loads((folder / "lloco.json").read_text())
    for change, message in (({"format_version": 99}, "format_version"), ({"memory": 3}, "memory"), ({"x": 1}, "'x'")):
        (folder / "lloco.json").write_text(json.dumps(values | change))
        with pytest.raises(AdapterError, match=message):
            AdapterManifest.load(folder)
    (folder / "lloco.json").write_text("[]")
    with pytest.raises(AdapterError, match="JSON object"):
        AdapterManifest.load(folder)


# -- which one answers ----------------------------------------------------------------------------------------------


def hit(group: str | None, score: float) -> Hit:
    metadata = {} if group is None else {"group": group}
    return Hit("s", "d", 0, Span(0, 1), "t", 1, score, metadata=metadata)


def test_the_best_hits_group_answers_and_ties_go_to_the_commonest_then_the_first():
    assert group_of([]) == "default"
    assert group_of([hit(None, 0.9), hit("law", 0.5)]) == "default"
    assert group_of([hit("law", 0.9), hit("pumps", 0.8), hit("pumps", 0.8)]) == "law"
    assert group_of([hit("law", 0.9), hit("pumps", 0.9), hit("pumps", 0.2)]) == "pumps"
    assert group_of([hit("pumps", 1.0), hit("law", 1.0)]) == "law"


def test_each_question_is_answered_by_the_adapter_of_its_hits(engine, made, decoder, tmp_path):
    ask = {"generate": SHORT, "top_k": 1}
    assert engine.ask("The court of Orne sat in May.", **ask).adapter == "none"
    engine.adapters.registry.add(made, "law")
    assert engine.ask("The court of Orne sat in May.", **ask).adapter == "law@1"
    assert engine.ask("The pump of hall nine needs oil.", **ask).adapter == "none"
    engine.adapters.registry.add(adapter(tmp_path / "two", decoder, seed=2), "default")
    assert engine.ask("The pump of hall nine needs oil.", **ask).adapter == "default@1"  # of no group's own
    assert engine.ask("Trams are green on Sundays.", **ask).adapter == "default@1"
    assert engine.ask("The court of Orne sat in May.", **ask, adapter="none").adapter == "none"
    assert engine.ask("Trams are green on Sundays.", **ask, adapter="law").adapter == "law@1"
    assert engine.ask("Trams are green on Sundays.", **ask, adapter=None).adapter == "default@1"
    engine.adapters.registry.add(made, "law")
    assert engine.ask("The court of Orne sat in May.", **ask).adapter == "law@2"
    engine.adapters.registry.rollback("law")
    assert engine.ask("The court of Orne sat in May.", **ask).adapter == "law@1"
    with pytest.raises(AdapterError, match="'poems' is none of them; there is none, default, law"):
        engine.ask("Trams?", adapter="poems")


def test_a_tenants_adapter_answers_nobody_else(engine, made):
    engine.ingest([Document("law.md", "The court of Orne sat in May.")], tenant="ada", metadata={"group": "law"})
    ask = {"generate": SHORT, "top_k": 1}
    engine.adapters.registry.add(made, "law", "ada")
    name = engine.ask("The court of Orne sat in May.", **ask, tenant="ada").adapter
    assert name.startswith("law@1-")
    assert engine.ask("The court of Orne sat in May.", **ask).adapter == "none"
    for stolen in ("law", name):
        with pytest.raises(AdapterError, match=r"is none of them; there is none$"):
            engine.ask("The court of Orne sat in May.", **ask, adapter=stolen)
    assert engine.adapters.registry.groups() == []
    assert engine.adapters.registry.groups("ada") == ["law"]
    engine.load_adapter(made, "mine")  # what the caller loads is for whom the caller says
    assert engine.ask("The court of Orne sat in May.", **ask, adapter="mine").adapter == "mine"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_fingerprint", "0" * 16),
        ("tokenizer_fingerprint", "1" * 16),
        ("template_fingerprint", "2" * 16),
        ("memory", "summary"),
    ],
)
def test_an_adapter_made_for_something_else_is_refused_by_name(engine, store, decoder, tmp_path, field, value):
    other = adapter(tmp_path / "other", decoder, **{field: value})
    result = cli("adapters", "add", other, "--group", "law", "--store", store)
    assert result.exit_code == 1
    assert field in result.stderr
    assert value in result.stderr
    assert engine.adapters.registry.kept() == []
    engine.adapters.registry.add(other, "law")  # or the decoder has changed since
    with pytest.raises(AdapterError, match=f"{field} '{value}'"):
        engine.ask("The court of Orne sat in May.", generate=SHORT, top_k=1)
    assert engine.ask("The court of Orne sat in May.", generate=SHORT, top_k=1, adapter="none").text is not None


def test_another_ratio_or_other_settings_of_the_compressor_are_no_mismatch(engine, decoder, tmp_path):
    other = adapter(tmp_path / "other", decoder, ratios=[2.0], compressor="other", compressor_settings={"x": 1})
    engine.adapters.registry.add(other, "law")
    assert engine.ask("The court of Orne sat in May.", generate=SHORT, top_k=1).adapter == "law@1"


def test_the_shipped_adapter_answers_where_it_fits_and_no_other_does(engine, made, decoder, tmp_path, monkeypatch):
    ask = {"generate": SHORT, "top_k": 1}
    for module in (routing, loading):
        monkeypatch.setattr(module, "default_folder", lambda: made)
    assert engine.ask("The court of Orne sat in May.", **ask).adapter == "default"
    assert engine.ask("The court of Orne sat in May.", **ask, adapter="none").adapter == "none"
    engine.adapters.registry.add(made, "law")
    assert engine.ask("The court of Orne sat in May.", **ask).adapter == "law@1"
    stranger = adapter(tmp_path / "stranger", decoder, decoder_fingerprint="0" * 16)
    for module in (routing, loading):
        monkeypatch.setattr(module, "default_folder", lambda: stranger)
    engine.adapters._ships = None
    assert engine.ask("Trams are green on Sundays.", **ask).adapter == "none"  # for another decoder: no error


def test_an_adapter_is_loaded_by_reference(made, decoder_folder, tmp_path, monkeypatch):
    decoder = LocalDecoder.load(str(decoder_folder))
    assert loading.load_named(decoder, "none") is None
    name = loading.load_named(decoder, str(made))
    assert name in decoder.adapters
    assert loading.load_named(decoder, str(made)) == name
    assert loading.load_named(decoder, name) == name
    assert decoder.answer_losses([Prompt("Who?")], ["I"], name) != decoder.answer_losses([Prompt("Who?")], ["I"])
    with pytest.raises(AdapterError, match="'nothing' is none of them"):
        loading.load_named(decoder, "nothing")
    monkeypatch.setattr(loading, "default_folder", lambda: None)
    with pytest.raises(AdapterError, match="'default' is none of them"):
        loading.load_named(decoder, "default")


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_mean_of_an_adapter_and_of_one_trained_on_from_it(decoder, tmp_path):
    before = adapter(tmp_path / "before", decoder)
    began = {"sha256": AdapterManifest.load(before).weights_sha256, "data": [], "config": {}}
    after = adapter(tmp_path / "after", decoder, seed=2, config={"rank": 4, "begun_with": began})
    values = json.loads(
        cli("adapters", "average", before, after, "--share", 0.25, "--out", tmp_path / "mean", "--json").stdout
    )
    old, new, mean = (load_file(tmp_path / name / WEIGHTS) for name in ("before", "after", "mean"))
    for name, value in mean.items():
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * new[name])
    assert values["config"]["averaged"]["share"] == 0.25 and values["config"]["rank"] == 4
    assert "held_out_loss" not in values["metrics"], "it was not measured"
    loading.load(decoder, tmp_path / "mean", "mean")
    decoder.drop_adapter("mean")


def test_only_adapters_that_come_from_each_other_have_a_mean(made, decoder, tmp_path):
    stranger = adapter(tmp_path / "stranger", decoder, seed=3)
    with pytest.raises(AdapterError, match=r"must have been trained on from .* it began with weights of sha256 none"):
        average(made, stranger, 0.5, tmp_path / "mean")
    with pytest.raises(ConfigError, match=r"share must be from 0 .* not 1\.5"):
        average(made, stranger, 1.5, tmp_path / "mean")
    with pytest.raises(ConfigError, match="must be new"):
        average(made, stranger, 0.5, stranger)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger"]


def test_adapters_on_the_command_line(store, made):
    assert cli("adapters", "add", made, "--group", "law", "--store", store).exit_code == 0
    assert json.loads(cli("adapters", "add", made, "--group", "law", "--store", store, "--json").stdout)["version"] == 2
    listed = cli("adapters", "ls", "--store", store)
    assert "2.00 -> 1.00" in listed.stdout
    assert json.loads(cli("adapters", "rollback", "law", "--store", store, "--json").stdout)["version"] == 1
    values = json.loads(cli("adapters", "ls", "--store", store, "--json").stdout)
    assert [(one["version"], one["current"]) for one in values["adapters"]] == [(1, True), (2, False)]
    refused = cli("adapters", "rm", "law", "--store", store)
    assert refused.exit_code == 2
    assert cli("adapters", "rm", "law", "--version", "1", "--yes", "--store", store).exit_code == 0
    assert [
        one["version"] for one in json.loads(cli("adapters", "ls", "--store", store, "--json").stdout)["adapters"]
    ] == [2]
    assert not [problem for problem in Store.open(store).verify() if problem.kind != "orphan"]
    missing = cli("adapters", "rollback", "poems", "--store", store)
    assert missing.exit_code == 1
    assert "poems" in missing.stderr


def test_a_group_is_given_with_the_documents(tmp_path, monkeypatch):
    from lloco_engine.cli import stores

    (tmp_path / "a.md").write_text("The court of Orne sat in May.")
    double = create_autospec(Engine, instance=True)
    double.__enter__.return_value = double
    double.ingest.return_value = IngestReport()
    monkeypatch.setattr(stores, "open_engine", lambda *_, **__: double)
    assert cli("ingest", tmp_path / "a.md", "--group", "law", "--meta", "year=2024").exit_code == 0
    assert double.ingest.call_args.kwargs["metadata"] == {"group": "law", "year": 2024}
    assert cli("ingest", tmp_path / "a.md", "--group", "a/b").exit_code == 1
