"""Reading pages of slots beside vLLM's own cache: which tokens read what, by which segments, and how it is merged.

What follows the template prefix reads the request's segments beside the live tokens. Softmax attention over both is
that over each, weighted by its share of the exponentials, so vLLM's own kernel reads the live tokens, `read` reads the
pages, and `merge` joins them by the logarithms of these shares (log-sum-exp; Dao et al. 2022, FlashAttention, split
attention the same way). Nothing is approximated.

Rotary positions: segments stand between the template prefix and the text, all at the same place, and vLLM numbers the
text as if they were not there. Logits depend on differences of positions alone, so queries and keys of the text are
turned on by the tokens of the longest segment (`Turn`), and slots and the template prefix stay as they are.

Letters used for shapes: ``R`` rows (requests), ``H`` KV heads, ``G`` query heads of each, ``T`` new tokens, ``M`` = G *
T, ``D`` head dimension, ``S`` segments, ``P`` pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from lloco_engine import Segment, segment_slots
from lloco_integrations.vllm.pool import PAGE, heads_of

__all__ = [
    "Held",
    "Layout",
    "Pages",
    "Part",
    "Recall",
    "Turn",
    "inverse_frequencies",
    "live_mass",
    "live_rows",
    "merge",
    "parts",
]

TIE = 1e-3  # largest logits no further apart count as equal, as in the engine's decoder (docs/decisions/0009-focus.md)
PIECE = 256  # new tokens of a row whose logits are held at once


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages of slots on a device.

    keys, values : (P, PAGE, D). bias : (P, PAGE) float32, -inf where a page has no slot
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def empty(cls, pages: int, dim: int, device: torch.device | str, dtype: torch.dtype) -> Pages:
        """Pages without a slot."""
        keys, values = (torch.zeros(pages, PAGE, dim, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, torch.full((pages, PAGE), -torch.inf, device=device))

    def write(self, numbers: torch.Tensor, pages: Pages) -> None:
        """Put ``pages`` at these numbers (P,) int64."""
        for mine, its in ((self.keys, pages.keys), (self.values, pages.values), (self.bias, pages.bias)):
            mine.index_copy_(0, numbers, its.to(mine.device, mine.dtype))


@dataclass(frozen=True, eq=False)
class Held:
    """Where one segment lies in the pool of a rank.

    tokens : of its source. layers, heads, pages : (P,) int64 of each page, in order of layer and head: the layer, the
    KV head among this rank's, and the page's number in the pool. segment : the slots of this rank's heads where a CPU
    reads them as they are, and there are no pages
    """

    tokens: int
    layers: torch.Tensor
    heads: torch.Tensor
    pages: torch.Tensor
    segment: Segment | None = None

    @classmethod
    def whole(cls, segment: Segment, rank: int, ranks: int) -> Held:
        """A segment as it was read, for a CPU: the slots of a rank's heads side by side, in order of layer and head."""
        none = torch.empty(0, dtype=torch.int64)
        own, (_, heads) = heads_of(rank, ranks, segment.lengths.shape[1]), segment.lengths.shape
        if len(own) < heads:
            mine = torch.zeros_like(segment.lengths, dtype=torch.bool)
            mine[:, own.start : own.stop] = True
            kept = mine.flatten().repeat_interleave(segment.lengths.flatten())
            keys, values, bias = (part[kept] for part in (segment.keys, segment.values, segment.bias))
            lengths = segment.lengths[:, own.start : own.stop].contiguous()
            segment = Segment(keys, values, bias, lengths, segment.source_tokens)
        return cls(segment.source_tokens, none, none, none, segment)

    @classmethod
    def packed(cls, segment: Any, numbers: Sequence[int], rank: int, ranks: int) -> tuple[Held, Pages]:
        """The slots of a rank's heads of a `lloco_engine.Segment` in pages, and where these are to lie.

        Args:
            segment: on the CPU.
            numbers: pages of the pool, as many as `pool.pages_needed` says for the rank.
            rank, ranks: of tensor parallelism.

        Raises:
            ValueError: there are more or fewer numbers.
        """
        own = heads_of(rank, ranks, segment.lengths.shape[1])
        lengths = segment.lengths.flatten()
        starts = (lengths.cumsum(0) - lengths).view(segment.lengths.shape)[:, own.start : own.stop].flatten()
        lengths = segment.lengths[:, own.start : own.stop].flatten()
        needed = (lengths + PAGE - 1) // PAGE  # pages of each head
        total = int(needed.sum())
        if total != len(numbers):
            raise ValueError(f"a segment that takes {total} pages cannot lie in {len(numbers)}")
        of_head = torch.arange(len(lengths)).repeat_interleave(needed)
        heads = len(own)
        held = cls(segment.source_tokens, of_head // heads, of_head % heads, torch.tensor(numbers, dtype=torch.int64))
        inside = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        source = inside + starts.repeat_interleave(lengths)
        target = inside + ((needed.cumsum(0) - needed) * PAGE).repeat_interleave(lengths)
        made = Pages.empty(total, segment.keys.shape[1], "cpu", segment.keys.dtype)
        for whole, part in ((made.keys, segment.keys), (made.values, segment.values)):
            whole.view(-1, whole.shape[-1])[target] = part[source]
        made.bias.view(-1)[target] = segment.bias[source]
        return held, made


@dataclass(frozen=True, eq=False)
class Recall:
    """What one request reads: its segments where they lie, and how.

    template : tokens before the segments. focus : segments that a query reads (0: all). priors : of each segment, or ()
    """

    segments: tuple[Held, ...]
    template: int
    focus: int = 0
    priors: tuple[float, ...] = ()

    @property
    def shift(self) -> int:
        """Positions that the text after the segments is moved on."""
        return max(held.tokens for held in self.segments)

    @cached_property
    def slots(self) -> Any:
        """What reads them on a CPU, as `lloco_engine.segment_slots` makes it."""
        kept = [held.segment for held in self.segments if held.segment is not None]
        if len(kept) != len(self.segments):
            raise RuntimeError("a CPU reads segments as they are, and these lie in pages")
        return segment_slots(kept, self.focus, self.priors)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Of a layer: pages (P,) int64, their rows' KV heads (P,) as r * H + h, and their groups (P,) as (r, s, h)."""

    pages: torch.Tensor
    heads: torch.Tensor
    groups: torch.Tensor


class Layout:
    """The pages of some requests, by layer, and what their queries choose by. Made once and used for every layer.

    Args:
        recalls: of the rows.
        layers, heads: of the decoder, and of the rank.
        device: of the pool.
    """

    def __init__(self, recalls: Sequence[Recall], layers: int, heads: int, device: torch.device) -> None:
        self.rows, self.heads = len(recalls), heads
        self.segments = max(len(one.segments) for one in recalls)
        each = [(r, s, held) for r, one in enumerate(recalls) for s, held in enumerate(one.segments)]
        of_layer = torch.cat([held.layers for _, _, held in each])
        order = torch.sort(of_layer, stable=True).indices
        pages = torch.cat([held.pages for _, _, held in each])[order].to(device)
        rows = torch.cat([r * heads + held.heads for r, _, held in each])[order].to(device)
        groups = torch.cat([(r * self.segments + s) * heads + held.heads for r, s, held in each])[order].to(device)
        counts = torch.bincount(of_layer, minlength=layers).tolist()
        cut = [torch.split(each, counts) for each in (pages, rows, groups)]
        self._layers = [_Layer(*part) for part in zip(*cut, strict=True)]
        some = [0 < one.focus < len(one.segments) for one in recalls]
        self._choice: tuple[torch.Tensor, int, torch.Tensor] | None = None
        if any(some):
            counts = [one.focus if chosen else self.segments for one, chosen in zip(recalls, some, strict=True)]
            priors = torch.zeros(self.rows, self.segments)
            for row, one in enumerate(recalls):
                priors[row, : len(one.priors)] = torch.tensor(one.priors)
            rank = (torch.tensor(counts, device=device) - 1)[:, None, None, None]
            self._choice = rank, max(counts), priors.to(device)[..., None, None]

    def read(self, layer: int, pool: Pages, q: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries read of the segments alone.

        Args:
            layer: its number.
            pool: of this rank.
            q: (R, H, M, D).
            scale: factor of the logits.

        Returns:
            (R, H, M, D) float32, and the logarithm of the weight (R, H, M) float32, -inf where nothing is read.
        """
        here, (rows, heads, many, dim) = self._layers[layer], q.shape
        keys, values = (part.index_select(0, here.pages).float() for part in (pool.keys, pool.values))
        asked = q.float().reshape(rows * heads, many, dim).index_select(0, here.heads).transpose(1, 2)
        logits = (
            torch.bmm(keys, asked).mul_(scale).add_(pool.bias.index_select(0, here.pages)[..., None])
        )  # (P, PAGE, M)
        groups = rows * self.segments * heads
        largest = logits.new_full((groups, many), -torch.inf)
        largest.scatter_reduce_(0, here.groups[:, None].expand(-1, many), logits.amax(1), "amax")
        base = largest.clamp_min(torch.finfo(torch.float32).min)  # of a segment without a slot here
        weights = logits.sub_(base.index_select(0, here.groups)[:, None]).exp_()
        mass = base + torch.zeros_like(base).index_add_(0, here.groups, weights.sum(1)).log_()
        mass = mass.view(rows, self.segments, heads, many)
        if self._choice is not None:
            mass = mass.masked_fill(self._unread(largest.view(mass.shape)), -torch.inf)
        whole = mass.logsumexp(1)
        factor = (base.view(mass.shape) - whole[:, None]).exp_().masked_fill_(mass == -torch.inf, 0)
        weights.mul_(factor.view(groups, many).index_select(0, here.groups)[:, None])
        out = q.new_zeros((rows * heads, many, dim), dtype=torch.float32)
        out.index_add_(0, here.heads, torch.bmm(weights.transpose(1, 2), values))
        return out.view(q.shape), whole

    def _unread(self, largest: torch.Tensor) -> torch.Tensor:
        """Which segments a query does not read, of its largest logits (R, S, H, M) in them."""
        assert self._choice is not None
        rank, most, priors = self._choice
        scores = largest + priors
        best = scores.topk(most, dim=1).values
        return scores < best.gather(1, rank.expand(-1, 1, *best.shape[2:])) - TIE


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a step that read segments, of equally many new tokens behind their template prefixes.

    rows : (R,) int64, their numbers in the step. tokens : (R, T) int64, of the new tokens among the step's.
    ends : (R,) int64, live tokens of each row, the last new one included; lives : the same. shifts : (R,) int64,
    positions that they are turned on. recalls : what each reads. layers, heads : of the decoder, and of the rank
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    ends: torch.Tensor
    lives: tuple[int, ...]
    shifts: torch.Tensor
    recalls: tuple[Recall, ...]
    layers: int
    heads: int

    @property
    def positions(self) -> torch.Tensor:
        """(R, T) of the new tokens, as vLLM numbers them."""
        new = self.tokens.shape[1]
        return self.ends[:, None] - new + torch.arange(new, device=self.ends.device)

    @property
    def layout(self) -> Layout:
        """Of the pages of their segments."""
        return _layout(self.recalls, self.layers, self.heads, self.tokens.device)

    def asked(self, query: torch.Tensor, heads: int) -> torch.Tensor:
        """Their queries (R, H, M, D) among the step's (tokens, H * G, D)."""
        rows, new = self.tokens.shape
        q = query[self.tokens].view(rows, new, heads, -1, query.shape[-1])
        return q.permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, query.shape[-1])

    def answered(self, read: torch.Tensor) -> torch.Tensor:
        """The opposite: (R, H, M, D) as (R, T, H * G, D)."""
        rows, new = self.tokens.shape
        heads, dim = read.shape[1], read.shape[3]
        return read.view(rows, heads, -1, new, dim).permute(0, 3, 1, 2, 4).reshape(rows, new, -1, dim)


@lru_cache(maxsize=64)
def _layout(recalls: tuple[Recall, ...], layers: int, heads: int, device: torch.device) -> Layout:
    """Steps of decoding read by the same layout one after another."""
    return Layout(recalls, layers, heads, device)


def parts(
    recalls: Mapping[int, Recall],
    starts: Sequence[int],
    ends: Sequence[int],
    *,
    layers: int,
    heads: int,
    device: torch.device,
) -> list[Part]:
    """The rows of a step that read segments, put together by how many new tokens they have behind the template prefix.

    Args:
        recalls: of the rows that read any, by number of the row.
        starts: where each row's new tokens begin among the step's, and where the last's end.
        ends: live tokens of each row, the new ones included.
        layers, heads: of the decoder, and of the rank.
        device: of the pool.
    """
    found: dict[int, list[tuple[int, int, int, Recall]]] = {}
    for row, recall in recalls.items():
        first, last, live = starts[row], starts[row + 1], ends[row]
        first = max(first, last - max(0, live - recall.template))
        while first < last:  # a long prompt is read in pieces, each of which sees what lies before it
            new = min(PIECE, last - first)
            found.setdefault(new, []).append((row, first, live - (last - first - new), recall))
            first += new
    made = []
    for new, rows in found.items():
        numbers, firsts, lives, theirs = zip(*rows, strict=True)
        tokens = torch.tensor(firsts, device=device)[:, None] + torch.arange(new, device=device)
        shifts = [recall.shift for recall in theirs]
        which, till, on = (torch.tensor(one, device=device) for one in (numbers, lives, shifts))
        made.append(Part(which, tokens, till, lives, on, theirs, layers, heads))
    return made


def live_mass(q: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor, new: int, scale: float) -> torch.Tensor:
    """Logarithm of the weight of live tokens (R, H, M) float32: what a kernel that returns none leaves out.

    Args:
        q: (R, H, M, D), the last ``new`` tokens of each row.
        keys: (R, H, D, N), of which each row has ``ends`` (R,); what lies behind is not read.
        scale: factor of the logits.
    """
    rows, heads, many, _ = q.shape
    logits = torch.matmul(q.float(), keys.float()).mul_(scale).view(rows, heads, -1, new, keys.shape[3])
    last = ends[:, None] - new + torch.arange(new, device=q.device)  # (R, T) the place of each token itself
    later = torch.arange(keys.shape[3], device=q.device) > last[..., None]
    return logits.masked_fill_(later[:, None, None], -torch.inf).logsumexp(-1).view(rows, heads, many)


def live_rows(blocks: torch.Tensor, live: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Live keys and values (1, H, S, D), which lie alike, of blocks as vLLM's kernel for float32 on a CPU has them.

    Args:
        blocks: (blocks, H, 2 * size, D), of one row: in each the keys, as (D, size), before the values (size, D).
        live: S, tokens in them.
    """
    many, heads, size, dim = blocks.shape[0], blocks.shape[1], blocks.shape[2] // 2, blocks.shape[3]
    turned = blocks[:, :, :size].reshape(many, heads, dim, size).permute(1, 0, 3, 2)
    keys, values = (
        part.contiguous().view(1, heads, many * size, dim)[:, :, :live]  # a copy even of one block
        for part in (turned, blocks[:, :, size:].transpose(0, 1))
    )
    return keys, values


def merge(live: torch.Tensor, live_mass: torch.Tensor, read: torch.Tensor, read_mass: torch.Tensor) -> torch.Tensor:
    """Attention over live tokens and segments together (R, H, M, D), of that over each and its weight's logarithm."""
    share = torch.sigmoid(read_mass - live_mass)[..., None]  # of the segments; 0 where nothing was read
    return torch.lerp(live.float(), read, share)


class Turn:
    """Rotary embedding by so many positions more, for tokens that are turned already.

    Args:
        inverse: (D / 2,) float32, of `inverse_frequencies`.
    """

    def __init__(self, inverse: torch.Tensor) -> None:
        self._inverse = inverse

    def by(self, shifts: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (tokens, 1, D) of so many positions (tokens,) more; the rotation's sign is folded into sin.

        The angles at both ends are rounded to float32 as those of decoders are, by 1e-4 at some thousand positions, so
        that what is turned on is what a decoder turns at once, and not only near it.

        Args:
            shifts: (tokens,) how many.
            positions: (tokens,) where they are.
        """
        inverse = self._inverse.to(positions.device)
        here, there = (at[:, None].float() * inverse for at in (positions, positions + shifts))
        angles = there.double() - here.double()
        cos, sin = angles.cos().float(), angles.sin().float()
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    @staticmethod
    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, D) turned, in its own dtype."""
        wide = x.float()
        return torch.addcmul(wide * cos, torch.roll(wide, x.shape[-1] // 2, -1), sin).to(x.dtype)


def inverse_frequencies(config: Any, dim: int) -> torch.Tensor:
    """(D / 2,) float32, the angle of each pair of numbers of a key from one position to the next.

    Args:
        config: of transformers, of a decoder whose layers have one rotary embedding.
        dim: head dimension.

    Raises:
        ValueError: positions are not turned in a way that lets keys be moved on.
    """
    given = dict(getattr(config, "rope_parameters", None) or {})
    kind = given.get("rope_type", "default")
    if not given or any(isinstance(part, Mapping) for part in given.values()):
        raise ValueError(f"a decoder must have one rotary embedding, not rope_parameters {given!r}")
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError("a decoder's rotary embedding must turn whole keys, and this one turns a part of them")
    if kind == "default":
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / float(given["rope_theta"]) ** exponents
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(f"rope_type of a decoder must be default, linear, llama3 or yarn, not {kind!r}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inverse, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    if len(inverse) * 2 != dim or not math.isfinite(float(inverse.sum())):
        raise ValueError(f"a decoder's rotary embedding must turn {dim} numbers, not {2 * len(inverse)}")
    made: torch.Tensor = inverse
    return made
