"""Compact KV by attention matching: the few slots that reproduce the attention of a chunk's whole KV cache.

Source: Attention Matching (Zweiger et al. 2026, arXiv 2602.16284) for the bias and the values, with the reference
queries of KVzip (Kim et al. 2025), one budget over all heads together, and values that are fitted layer by layer
while the compacted decoder reads them. No training; works for any decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lloco_engine.compress.base import Compressor
from lloco_engine.compress.eviction import positions_of, select
from lloco_engine.compress.least_squares import nnls
from lloco_engine.compress.refinement import measured, refine
from lloco_engine.compress.repetition import Repetition, Seen
from lloco_engine.compress.rereading import Rereading
from lloco_engine.config import RefineConfig
from lloco_engine.decoder.rules import Rules
from lloco_engine.errors import ConfigError
from lloco_engine.models import quicker_in_bf16
from lloco_engine.types import Segment

if TYPE_CHECKING:
    from lloco_engine.decoder.attention import Cache
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.decoder.spec import DecoderSpec

__all__ = ["AttentionMatching"]

_LEAST_MASS = 1e-4  # a slot's mass is kept above 0, so that its logarithm, the bias, is finite
_PULL = 1e-2  # of the masses towards 1, relative to the mean squared attention
_RATES = ("keys", "values", "biases", "pace")
_LEAST_RATIO = 2.0  # down to which a segment that diverges too far is given more slots
_BATCH = 2**25  # most floats of the fits' attention matrix, over the heads that are fitted together


@dataclass(frozen=True, eq=False)
class _Read:
    """What is known of a chunk once it and its repetition were read, whatever the ratio.

    ``repeat`` are the repetition's tokens, ``cache`` has template prefix and chunk, ``seen`` is by layer,
    ``importance`` (L, H, n), and ``expected`` what `refine` takes, where there will be any.
    """

    repeat: list[int]
    cache: Cache
    seen: Sequence[Seen]
    importance: torch.Tensor
    expected: torch.Tensor | None


@dataclass(kw_only=True, eq=False)
class AttentionMatching(Compressor):
    """Keeps the most important positions of every head, then fits a bias and a value to each.

    Args:
        ridge: pull of the values towards the originals, relative to the mean squared attention of the kept slots.
        fit_rows: most reference queries per KV head used in the fit of the masses.
        fit_tokens: how many tokens of the repetition, from its beginning, are read again to fit the values.
        iterations: steps of the non-negative least squares.
        floor: share of an even split of the slots that every head gets, whatever the other heads need.
        refine: steps of refinement after the fits (`lloco_engine.compress.refinement`); 0 is the fits alone.
        stretch: tokens of the chunk that a step reads; 0 reads all of it.
        keys, values, biases, pace: sizes of the steps (`RefineConfig`). Their defaults here never change: they are
            those of segments whose settings say none, since releases before did not write them.
        max_divergence: a segment that diverges further on what was held out (`Divergence`) is made again at half its
            ratio, until it does not or is down to two tokens per slot; 0: whatever it diverges.
    """

    name = "attention_matching"

    ridge: float = 0.3
    fit_rows: int = 1024
    fit_tokens: int = 640
    iterations: int = 60
    floor: float = 0.1
    refine: int = 0
    stretch: int = 256
    keys: float = 0.01
    values: float = 0.03
    biases: float = 0.01
    pace: float = 0.0
    max_divergence: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.ridge, int | float) or not self.ridge > 0:
            raise ConfigError(f"ridge must be a number above 0, not {self.ridge!r}")
        if self.fit_rows < 16 or self.fit_tokens < 16 or self.iterations < 1:
            raise ConfigError(
                "fit_rows and fit_tokens must be at least 16 and iterations at least 1, "
                f"not {self.fit_rows}, {self.fit_tokens}, {self.iterations}"
            )
        if not isinstance(self.floor, int | float) or not 0 <= self.floor <= 1:
            raise ConfigError(f"floor must be a number from 0 to 1, not {self.floor!r}")
        if not isinstance(self.max_divergence, int | float) or not 0 <= self.max_divergence < math.inf:
            raise ConfigError(f"max_divergence must be a number of nats, not negative, not {self.max_divergence!r}")
        try:
            self._refinement = RefineConfig(self.refine, self.stretch, self.keys, self.values, self.biases, self.pace)
        except ConfigError as error:
            raise ConfigError(f"refinement: {error}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """As the contract says; those of refinement only where there is any, and of its rates those that differ.

        Stores made before there were such settings have none, and their segments keep their ids.
        """
        own = super().settings
        unwritten = {name for name in _RATES if not self.refine or own[name] == getattr(type(self), name)}
        unwritten |= set() if self.refine else {"refine", "stretch"}
        unwritten |= set() if self.max_divergence else {"max_divergence"}
        return {name: value for name, value in own.items() if name not in unwritten}

    def longest_chunk(self, decoder: DecoderSpec) -> int:
        """Half the window: the chunk is read twice, once to be kept and once to be repeated."""
        return (decoder.shape.window - decoder.template_tokens - len(decoder.template.repeat_ids())) // 2

    def make(self, decoder: LocalDecoder, token_ids: Sequence[int], ratios: Sequence[float]) -> list[Segment]:
        """See `Compressor.compress`."""
        read = self._read(decoder, token_ids)
        return [self._made(decoder, token_ids, ratio, read) for ratio in ratios]

    def _made(self, decoder: LocalDecoder, token_ids: Sequence[int], ratio: float, read: _Read) -> Segment:
        """A segment as it is asked for, or with more slots where it would diverge too far."""
        while True:
            keep = select(read.importance, ratio, self.floor)
            segment = self._fit(decoder, read.repeat[: self.fit_tokens], read.cache, read.seen, keep)
            segment = refine(decoder, token_ids, segment, self._refinement, read.cache, read.expected)
            if not self.max_divergence:
                return segment
            segment = measured(decoder, token_ids, segment, read.cache)
            told = segment.divergence
            if told is None or told.after <= self.max_divergence or ratio <= _LEAST_RATIO:
                return segment
            ratio = max(_LEAST_RATIO, ratio / 2)

    @torch.inference_mode()
    def _read(self, decoder: LocalDecoder, token_ids: Sequence[int]) -> _Read:
        """Read the chunk and its repetition."""
        repeat = [*decoder.template.repeat_ids(), *token_ids]
        cache = decoder.prefill(token_ids, room=len(repeat))
        runner = decoder.runner
        repetition = Repetition(
            cache, decoder.template_tokens, runner.scale, self.fit_rows, self.fit_tokens, runner.rules
        )
        in_bf16 = runner.bf16 and quicker_in_bf16(runner.device, runner.dtype)
        wanted = None if self.refine and not in_bf16 else 0  # bfloat16 is not exact enough to be aimed at
        states = decoder.follow(repeat, cache, repetition.attend, in_bf16=in_bf16, wanted=wanted)
        importance = torch.stack([seen.importance for seen in repetition.seen])
        expected = None if wanted == 0 else states[0, -len(token_ids) - 1 : -1]
        return _Read(repeat, cache, repetition.seen, importance, expected)

    @torch.inference_mode()
    def _fit(
        self, decoder: LocalDecoder, repeat: Sequence[int], cache: Cache, seen: Sequence[Seen], keep: torch.Tensor
    ) -> Segment:
        """Biases of the kept positions, and then their values, as the tokens ``repeat`` read them."""
        chunk = slice(decoder.template_tokens, decoder.template_tokens + keep.shape[-1])
        runner = decoder.runner
        bias, goal = self._bias(cache, seen, keep, chunk, runner.rules), [one.read for one in seen]
        rereading = Rereading(
            cache, chunk.start, goal, keep, bias, scale=runner.scale, rules=runner.rules, ridge=self.ridge
        )
        own = decoder.new_cache(1, len(repeat))
        in_bf16 = runner.bf16 and quicker_in_bf16(runner.device, runner.dtype)
        decoder.follow(repeat, own, rereading.attend, offset=chunk.stop, in_bf16=in_bf16)
        keys = torch.cat([cache.keys[layer][0, :, chunk][kept] for layer, kept in enumerate(keep)])
        return Segment(
            keys.float(),
            torch.cat(rereading.values),
            torch.cat(bias),
            keep.sum(dim=-1),
            keep.shape[-1],
            positions_of(keep, chunk.start),
        )

    def _bias(
        self, cache: Cache, seen: Sequence[Seen], keep: torch.Tensor, chunk: slice, rules: Sequence[Rules]
    ) -> list[torch.Tensor]:
        """By layer and head, the bias (k,) of its kept positions.

        Heads of like size are fitted together, whatever their layer.
        """
        sizes = keep.sum(dim=-1)
        heads = keep.shape[1]
        bias = [torch.empty(0)] * sizes.numel()
        for batch in _batches(sizes.flatten().tolist(), seen[0].queries.shape[1]):
            where = [divmod(number, heads) for number in batch]
            # in float32, whatever the decoder's own precision: the fits square what they are given
            keys = torch.stack([cache.keys[layer][0, head, chunk] for layer, head in where]).float()
            # a stable sort of "not kept" brings the kept positions to the front, in their order
            kept = torch.stack([keep[layer, head] for layer, head in where])
            size = kept.sum(dim=-1)
            index = torch.sort((~kept).to(torch.uint8), dim=-1, stable=True).indices[:, : int(size.max())]
            valid = torch.arange(index.shape[1], device=index.device)[None] < size[:, None]
            queries, lse, mass = (
                torch.stack([getattr(seen[layer], name)[head] for layer, head in where]).float()
                for name in ("queries", "lse", "mass")
            )
            keys = keys.gather(1, index[..., None].expand(-1, -1, keys.shape[-1]))
            weights = torch.exp(rules[0].cap(torch.bmm(queries, keys.transpose(1, 2))) - lse) * valid[:, None]
            for row, (layer, _) in enumerate(where):
                hidden = rules[layer].hidden(seen[layer].at[:, None], index[row] + chunk.start)
                if hidden is not None:
                    weights[row].masked_fill_(hidden, 0)
            fitted = self._masses(weights, mass, valid).log()
            for number, one, n in zip(batch, fitted, size.tolist(), strict=True):
                bias[number] = one[:n]
        return bias

    def _masses(self, weights: torch.Tensor, mass: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Masses w >= 0 (B, k) of keys, where ``valid`` (B, k), that have attention ``weights`` (B, M, k).

        With them the kept slots' attention adds up to the chunk's, query by query: ``mass`` (B, M).
        """
        gram = torch.bmm(weights.transpose(1, 2), weights)
        right = torch.bmm(weights.transpose(1, 2), mass[..., None])[..., 0]
        pull = _PULL * gram.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True) / valid.sum(dim=-1, keepdim=True) + 1e-12
        gram.diagonal(dim1=1, dim2=2).add_(pull)  # towards w = 1
        return torch.where(valid, nnls(gram, right + pull, self.iterations).clamp_min(_LEAST_MASS), 1.0)


def _batches(sizes: list[int], rows: int) -> Iterator[list[int]]:
    """Numbers of heads to fit together: sizes within a quarter of each other, so that little is padding."""
    batch: list[int] = []
    for number in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and (sizes[number] > 1.25 * sizes[batch[0]] + 4 or (len(batch) + 1) * rows * sizes[number] > _BATCH):
            yield batch
            batch = []
        batch.append(number)
    yield batch
