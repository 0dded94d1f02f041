"""A compressor of a user's own: registered by a class, a file or a package, and used like the engine's."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from decoder_cases import TEXT, tiny, tokens, whole
from typer.testing import CliRunner

from lloco_engine import (
    CompressConfig,
    Compressor,
    ConfigError,
    Document,
    Engine,
    Observed,
    ScorerCompressor,
    plugins,
    register,
)
from lloco_engine.cli import app
from lloco_engine.compress import registry
from lloco_engine.config import ChunkConfig
from lloco_engine.testing import HashingEmbedder

FILE = '''
"""Keeps the tokens whose keys have the smallest norm (Devoto et al. 2024, arXiv 2406.11430)."""

from dataclasses import dataclass

from lloco_engine import Observed, ScorerCompressor, register


@register
@dataclass(frozen=True, kw_only=True, eq=False)
class KeyNorm(ScorerCompressor):
    name = "key_norm"
    power: float = 1.0

    def score(self, observed: Observed):
        return -observed.keys[:, observed.chunk].norm(dim=-1) ** self.power
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(plugins, "_run", set())
    monkeypatch.delenv(plugins.PLUGINS, raising=False)
    yield
    sys.modules.pop("lloco_plugin_key_norm", None)


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "key_norm.py"
    path.write_text(FILE)
    return path


def test_a_score_becomes_a_segment_of_the_best_positions(plugin):
    plugins.run_plugin(plugin)
    decoder = tiny()
    ids = tokens(decoder, TEXT)
    method = registry.get("key_norm", power=2.0)
    assert method.settings == {"power": 2.0}
    (segment,) = method.compress(decoder, ids, [4])
    everything = whole(decoder)
    keys = everything.keys.view(2, 2, len(ids), -1)
    count = round(len(ids) / 4)
    shortest = keys.norm(dim=-1).topk(count, largest=False).indices.sort(dim=-1).values
    assert segment.lengths.tolist() == [[count] * 2] * 2
    kept = torch.stack([keys[layer, head, shortest[layer, head]] for layer in range(2) for head in range(2)])
    torch.testing.assert_close(segment.keys, kept.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert not segment.bias.any()


def test_what_is_observed_is_the_decoders_own_attention():
    decoder = tiny("qwen3")
    ids, first = tokens(decoder, TEXT), decoder.template_tokens
    seen: list[torch.Tensor] = []

    class Watcher(ScorerCompressor):
        name = "watcher"

        def score(self, observed: Observed) -> torch.Tensor:
            assert observed.chunk == slice(first, first + len(ids)) and observed.layer == len(seen)
            seen.append(torch.cat(list(observed.attention()), dim=2))
            return seen[-1][..., observed.chunk].sum(dim=(1, 2))

    Watcher().compress(decoder, ids, [2])
    model = decoder.runner.model
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(torch.tensor([[*decoder.template.prefix_ids, *ids]]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for own, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(own.flatten(0, 1), theirs[0, :, first:], rtol=1e-4, atol=1e-5)


def test_the_longest_chunk_leaves_room_for_what_observes():
    decoder = tiny(max_position_embeddings=200)

    class Twice(ScorerCompressor):
        name = "twice"

        def observer(self, decoder, token_ids):
            return [1, 2, 3, *token_ids]

        def score(self, observed: Observed) -> torch.Tensor:
            return observed.keys[:, observed.chunk, 0]

    longest = Twice().longest_chunk(decoder)
    assert 198 <= decoder.template_tokens + 2 * longest + 3 <= 200
    assert Twice().compress(decoder, [5] * longest, [4])[0].source_tokens == longest


def test_names_are_checked_and_given_once(plugin):
    class Nameless(ScorerCompressor):
        pass

    class Taken(ScorerCompressor):
        name = "kvzip"

    class KeyNorm(ScorerCompressor):
        name = "key_norm"

    for wrong, message in (
        (Nameless, r"not None \(Nameless\)"),
        (Taken, "'kvzip' is there already: give Taken another name"),
        (str, "must be a class derived from Compressor"),
    ):
        with pytest.raises(ConfigError, match=message):
            register(wrong)
    plugins.run_plugin(plugin)
    with pytest.raises(ConfigError, match="'key_norm' is there already"):
        register(KeyNorm)
    plugins.run_plugin(plugin)  # the same file again is no other


def test_a_class_that_is_defined_again_takes_the_place_of_the_first():
    def define() -> type[Compressor]:
        class Mine(ScorerCompressor):
            name = "mine"

            def score(self, observed: Observed) -> torch.Tensor:
                return observed.keys[:, observed.chunk, 0]

        return Mine

    register(define())
    second = register(define())
    assert type(registry.get("mine")) is second


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x = 1", "must be a Python file"),
        ("a.py", "1 / 0", r"a\.py failed: ZeroDivisionError"),
        ("gone.py", None, r"gone\.py failed: FileNotFoundError"),
    ],
)
def test_a_plugin_that_cannot_be_run_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        plugins.run_plugin(tmp_path / name)


def test_an_installed_package_offers_its_own(plugin, monkeypatch):
    monkeypatch.syspath_prepend(plugin.parent)
    point = EntryPoint("key_norm", "key_norm:KeyNorm", registry.GROUP)
    monkeypatch.setattr(
        registry, "entry_points", lambda group, name=None: [point] if name in (None, "key_norm") else []
    )
    try:
        assert "key_norm" in registry.names()
        assert registry.get("key_norm").name == "key_norm"
    finally:
        sys.modules.pop("key_norm", None)


def test_a_store_is_made_and_asked_with_it(plugin, tmp_path):
    plugins.run_plugin(plugin)
    decoder, options = tiny(max_position_embeddings=2048), {"embedder": HashingEmbedder()}
    chunk, compress = ChunkConfig(64, 24, 4), CompressConfig("key_norm", 4, {"power": 2.0})
    with Engine.open(tmp_path / "s", decoder=decoder, chunk=chunk, compress=compress, **options) as engine:
        engine.ingest([Document("mill", TEXT)])
        answer = engine.ask("Who keeps the mill?")
        assert 0 < answer.usage.prompt_slots <= answer.usage.source_tokens / 2
    with Engine.open(tmp_path / "s", decoder=decoder, **options) as engine:  # the store remembers it, and its settings
        assert engine.compressor.settings == {"power": 2.0}
    registry._registered.clear()
    plugins._run.clear()
    with pytest.raises(ConfigError, match="not 'key_norm'; one of your own is registered"):
        Engine.open(tmp_path / "s", decoder=decoder, **options)


def test_the_command_line_takes_a_users_file(plugin, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr("lloco_engine.embedder.Embedder", lambda *_: HashingEmbedder())
    (tmp_path / "mill.txt").write_text(TEXT)
    store = ("--store", str(tmp_path / "s"), "--decoder", str(tiny_folder))

    def run(*words: str):
        return CliRunner().invoke(app, list(map(str, words)))

    refused = run("ingest", tmp_path / "mill.txt", *store, "--compressor", "key_norm")
    assert refused.exit_code == 1 and "lloco --plugin FILE" in refused.stderr
    made = run(
        "--plugin", plugin, "ingest", tmp_path / "mill.txt", *store, "--compressor", "key_norm", "--set", "power=2"
    )
    assert made.exit_code == 0, made.stderr
    asked = run("--plugin", plugin, "ask", "Who?", "--store", tmp_path / "s", "--max-new-tokens", 2, "--json")
    assert asked.exit_code == 0, asked.stderr
    assert json.loads(asked.stdout)["usage"]["prompt_slots"] > 0
