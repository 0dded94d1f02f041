"""AutoCompressors against a slow reference written from the papers: Chevalier et al. 2023 (section 3), Llama, OPT.

Nothing in the reference is the engine's or transformers': a model is a config.json and a dict of weights, and every
segment is one full pass over [summaries so far; segment; summary tokens].
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from summary_cases import save_tiny_autocompressor

from lloco_engine.compress.autocompressor import AutoCompressor
from lloco_engine.errors import ConfigError, ModelNotFound, UnsupportedModel
from lloco_engine.testing import save_tiny_decoder

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SUMMARY = 4
CASES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}),
    ("opt", {}),
    ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
]
SMALL = {"llama": {"initializer_range": 0.1}, "opt": {"init_std": 0.1}}


# -- the slow reference ---------------------------------------------------------------------------------------------


class Slow:
    """One AutoCompressor, row by row and layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.llama = self.config["model_type"] == "llama"
        self.embedding = self.weights[
            "model.embed_tokens.weight" if self.llama else "model.decoder.embed_tokens.weight"
        ]
        self.tokens = self.weights["embed_summary.weight"]

    def read(self, before: torch.Tensor, ids: list[int], after: torch.Tensor) -> torch.Tensor:
        """Final states (T, E) of [summaries; tokens; summary tokens]."""
        inputs = torch.cat((before, self.embedding[ids], after))
        if self.llama:
            return self._llama(inputs)
        # a token's position counts the tokens before it; what is no token has the place of padding, row 1 of the table
        places = [1] * len(before) + [2 + n for n in range(len(ids))] + [1] * len(after)
        return self._opt(inputs, torch.tensor(places))

    def compress(self, ids: list[int], lengths: list[int]) -> torch.Tensor:
        summaries, at = self.tokens[:0], 0
        for length in lengths:
            new = self.read(summaries, ids[at : at + length], self.tokens)[-len(self.tokens) :]
            summaries = torch.cat((summaries, new)) if self.config["accumulate_summary"] else new
            at += length
        return summaries

    def logits(self, ids: list[int], summaries: torch.Tensor) -> torch.Tensor:
        hidden = self.read(summaries, ids, self.tokens[:0])[len(summaries) :]
        return hidden @ self.weights.get("lm_head.weight", self.embedding).T

    def generate(self, ids: list[int], summaries: torch.Tensor, count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count:
            made.append(int(self.logits([*ids, *made], summaries)[-1].argmax()))
            if made[-1] == self.config["eos_token_id"]:
                break
        return made

    def _llama(self, x: torch.Tensor) -> torch.Tensor:
        w, c = self.weights, self.config
        heads, pairs = c["num_attention_heads"], c["hidden_size"] // c["num_attention_heads"] // 2
        rope = c["rope_parameters"]
        angle = (
            torch.arange(len(x))[:, None]
            / rope.get("factor", 1.0)
            / rope["rope_theta"] ** (torch.arange(pairs) / pairs)
        )

        def turn(y: torch.Tensor) -> torch.Tensor:
            a, b = y[..., :pairs], y[..., pairs:]
            return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

        def norm(y: torch.Tensor, name: str) -> torch.Tensor:
            return w[name] * y / (y.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt()

        for layer in range(c["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            y = norm(x, name + "input_layernorm.weight")
            q, k, v = (self._heads(y @ w[f"{name}self_attn.{p}_proj.weight"].T, 2 * pairs) for p in "qkv")
            group = heads // len(k)
            read = self._attend(turn(q), turn(k).repeat_interleave(group, 0), v.repeat_interleave(group, 0))
            x = x + read @ w[name + "self_attn.o_proj.weight"].T
            y = norm(x, name + "post_attention_layernorm.weight")
            gate, up = y @ w[name + "mlp.gate_proj.weight"].T, y @ w[name + "mlp.up_proj.weight"].T
            x = x + (gate * torch.sigmoid(gate) * up) @ w[name + "mlp.down_proj.weight"].T
        return norm(x, "model.norm.weight")

    def _opt(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        w, c, top = self.weights, self.config, "model.decoder."
        first = c["do_layer_norm_before"]

        def linear(y: torch.Tensor, name: str) -> torch.Tensor:
            return y @ w[name + ".weight"].T + w[name + ".bias"]

        def norm(y: torch.Tensor, name: str) -> torch.Tensor:
            spread = y.var(-1, correction=0, keepdim=True)
            return (y - y.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

        if top + "project_in.weight" in w:
            x = x @ w[top + "project_in.weight"].T
        x = x + w[top + "embed_positions.weight"][places]
        for layer in range(c["num_hidden_layers"]):
            name = f"{top}layers.{layer}."
            y = norm(x, name + "self_attn_layer_norm") if first else x
            size = c["hidden_size"] // c["num_attention_heads"]
            q, k, v = (self._heads(linear(y, f"{name}self_attn.{p}_proj"), size) for p in "qkv")
            x = x + linear(self._attend(q, k, v), name + "self_attn.out_proj")
            x = x if first else norm(x, name + "self_attn_layer_norm")
            y = norm(x, name + "final_layer_norm") if first else x
            x = x + linear(linear(y, name + "fc1").clamp_min(0), name + "fc2")
            x = x if first else norm(x, name + "final_layer_norm")
        if first:
            x = norm(x, top + "final_layer_norm")
        return x @ w[top + "project_out.weight"].T if top + "project_out.weight" in w else x

    @staticmethod
    def _heads(x: torch.Tensor, size: int) -> torch.Tensor:
        return x.view(len(x), -1, size).transpose(0, 1)

    @staticmethod
    def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def random_ids(count: int, seed: int = 3) -> list[int]:
    return torch.randint(3, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folders of seeded checkpoints in the published layout, each made once."""
    made: dict[str, Path] = {}

    def folder(family: str, **changes) -> Path:
        key = repr((family, sorted(changes.items(), key=str)))
        if key not in made:
            place = tmp_path_factory.mktemp("autocompressor")
            made[key] = save_tiny_autocompressor(place, family, summary_length=SUMMARY, **(SMALL[family] | changes))
        return made[key]

    return folder


# -- vectors, logits, text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_vectors_and_logits_and_text_are_those_of_the_slow_reference(checkpoint, family, changes, accumulate):
    folder = checkpoint(family, accumulate=accumulate, **changes)
    ours, slow = AutoCompressor.from_pretrained(folder, device="cpu"), Slow(folder)
    ids, question = random_ids(50), random_ids(9, seed=4)
    for wanted, lengths in ((None, [50]), (25, [25, 25]), (16, [16, 16, 16, 2]), ([20, 5, 25], [20, 5, 25])):
        vectors = ours.compress_token_ids(ids, wanted)
        expected = slow.compress(ids, lengths)
        assert vectors.shape == (SUMMARY * (len(lengths) if accumulate else 1), slow.tokens.shape[1])
        torch.testing.assert_close(vectors, expected, **CLOSE)
        torch.testing.assert_close(ours.logits(question, vectors), slow.logits(question, expected), **CLOSE)
        assert ours.generate(question, vectors, 15) == slow.generate(question, expected, 15)
    torch.testing.assert_close(ours.logits(question), slow.logits(question, slow.tokens[:0]), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_padded_row_comes_out_as_it_would_alone(checkpoint, family, accumulate, side):
    folder = checkpoint(family, accumulate=accumulate)
    ours, slow = AutoCompressor.from_pretrained(folder, device="cpu"), Slow(folder)
    sizes = [40, 29, 12]  # of the last one, two segments are nothing but padding
    rows, mask = torch.zeros(3, 40, dtype=torch.int64), torch.zeros(3, 40, dtype=torch.int64)
    expected = []
    for row, size in enumerate(sizes):
        ids = random_ids(size, seed=row)
        place = slice(0, size) if side == "right" else slice(40 - size, 40)
        rows[row, place], mask[row, place] = torch.tensor(ids), 1
        lengths = [int(part.sum()) for part in mask[row].split(16)]
        expected.append(slow.compress(ids, lengths))
    made = ours.compress(rows, mask, segment_lengths=16)
    torch.testing.assert_close(made, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("accumulate", [True, False])
def test_compressing_goes_on_from_earlier_summaries(checkpoint, accumulate):
    ours = AutoCompressor.from_pretrained(checkpoint("llama", accumulate=accumulate), device="cpu")
    ids = torch.tensor([random_ids(30)])
    first = ours.compress(ids[:, :20], segment_lengths=10)
    rest = ours.compress(ids[:, 20:], softprompt=first)
    torch.testing.assert_close(rest, ours.compress(ids, segment_lengths=10), **CLOSE)


def test_an_opt_models_summaries_take_the_place_of_padding(checkpoint, tmp_path):
    folder = checkpoint("opt")
    weights = load_file(folder / "model.safetensors")
    assert weights["model.decoder.embed_positions.weight"][1].abs().sum() > 0  # else this test says nothing
    zeroed = save_tiny_autocompressor(tmp_path, "opt", summary_length=SUMMARY, **SMALL["opt"])
    weights["model.decoder.embed_positions.weight"][1] = 0
    from safetensors.torch import save_file

    save_file(weights, zeroed / "model.safetensors", metadata={"format": "pt"})
    ids = random_ids(20)
    one, other = (AutoCompressor.from_pretrained(place, device="cpu") for place in (folder, zeroed))
    assert not torch.allclose(one.compress_token_ids(ids), other.compress_token_ids(ids), atol=1e-3)
    torch.testing.assert_close(other.compress_token_ids(ids), Slow(zeroed).compress(ids, [20]), **CLOSE)


def test_an_end_token_ends_the_text_and_is_part_of_it(checkpoint):
    ours = AutoCompressor.from_pretrained(checkpoint("llama"), device="cpu")
    vectors, question = ours.compress_token_ids(random_ids(12)), random_ids(5, seed=8)
    free = AutoCompressor(ours.runner, _tokens(ours), ()).generate(question, vectors, 8)
    ended = AutoCompressor(ours.runner, _tokens(ours), (free[3],)).generate(question, vectors, 8)
    assert len(free) == 8 and ended == free[: free.index(free[3]) + 1]


def _tokens(ours: AutoCompressor):
    from lloco_engine.compress.summary_tokens import SummaryTokens

    return SummaryTokens(ours.embeddings, ours.accumulate)


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"shards": 3}, {"safetensors": False}, {"safetensors": False, "shards": 3}])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_checkpoint_loads_as_published_however_it_is_stored(checkpoint, tmp_path, family, form):
    folder = save_tiny_autocompressor(tmp_path, family, summary_length=SUMMARY, **SMALL[family], **form)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)  # the door works on ids and needs none
    ids = random_ids(30)
    expected = Slow(checkpoint(family)).compress(ids, [16, 14])
    for path in (folder, str(folder)):
        torch.testing.assert_close(
            AutoCompressor.from_pretrained(path, device="cpu").compress_token_ids(ids, 16), expected, **CLOSE
        )


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod."])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_names_with_what_a_training_run_puts_before_them_load(checkpoint, tmp_path, family, prefix):
    folder = save_tiny_autocompressor(tmp_path, family, summary_length=SUMMARY, safetensors=False, **SMALL[family])
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({prefix + name: value for name, value in weights.items()}, folder / "pytorch_model.bin")
    ids = random_ids(20)
    made = AutoCompressor.from_pretrained(folder, device="cpu").compress_token_ids(ids)
    torch.testing.assert_close(made, Slow(checkpoint(family)).compress(ids, [20]), **CLOSE)


def test_a_checkpoint_without_summary_tokens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="summary_length of at least 1"):
        AutoCompressor.from_pretrained(save_tiny_decoder(tmp_path / "plain"))
    folder = save_tiny_autocompressor(tmp_path / "short", summary_length=SUMMARY)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"summary_length": 9}))
    with pytest.raises(ModelNotFound, match="summary_length = 9 rows"):
        AutoCompressor.from_pretrained(folder)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    folder = save_tiny_autocompressor(tmp_path, safetensors=False)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    summary = weights.pop("embed_summary.weight")
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"must hold embed_summary\.weight"):
        AutoCompressor.from_pretrained(folder)
    del weights["model.norm.weight"]
    torch.save(weights | {"embed_summary.weight": summary}, folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"lack model\.norm\.weight"):
        AutoCompressor.from_pretrained(folder)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = save_tiny_autocompressor(tmp_path, safetensors=False)
    torch.save({"embed_summary.weight": Path("harmless"), "call": print}, folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match="could not be read"):
        AutoCompressor.from_pretrained(folder)


def test_learned_positions_other_than_opts_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    from safetensors.torch import save_file

    save_file(held | {"embed_summary.weight": torch.zeros(2, 8)}, tmp_path / "model.safetensors", {"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"summary_length": 2}))
    with pytest.raises(UnsupportedModel, match="'gpt2' has learned ones"):
        AutoCompressor.from_pretrained(tmp_path)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_lengths_and_ids_are_checked(checkpoint):
    ours = AutoCompressor.from_pretrained(checkpoint("llama"), device="cpu")
    ids = random_ids(10)
    for bad, message in (([4, 4], "add up to the 10"), (0, "at least 1 token"), ([-2, 12], "add up")):
        with pytest.raises(ConfigError, match=message):
            ours.compress_token_ids(ids, bad)
    with pytest.raises(ConfigError, match="n at least 1"):
        ours.compress_token_ids([])
    with pytest.raises(ConfigError, match=r"\(slots, 32\)"):
        ours.logits(ids, torch.zeros(3, 8))
    as_tensor = torch.tensor([ids])
    torch.testing.assert_close(ours.compress_token_ids(as_tensor), ours.compress_token_ids(ids))
    torch.testing.assert_close(ours.compress_token_ids(as_tensor[0]), ours.compress_token_ids(ids))


def test_a_text_beyond_the_window_is_cut_into_segments_of_llocos_size(checkpoint):
    ours = AutoCompressor.from_pretrained(checkpoint("llama"), device="cpu")  # a window of 1024
    ids = random_ids(1600)
    torch.testing.assert_close(ours.compress_token_ids(ids), ours.compress_token_ids(ids, 1536), **CLOSE)
    assert len(ours.compress_token_ids(ids[:1000])) == SUMMARY
