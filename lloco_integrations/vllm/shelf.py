"""The segments of one worker: loaded into its pages as the scheduler's books say, and which request reads which.

vLLM tells an attention backend no request ids. A row's first block of vLLM's own cache names its request: prompts with
different memories never share it, since the prefix cache keeps them apart by memory and tenant.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from lloco_engine import Segment, segment_slots
from lloco_integrations.vllm.admission import Binding, Reads
from lloco_integrations.vllm.pool import PAGE, Placed
from lloco_integrations.vllm.reading import Held, Pages, Part, Recall, Turn, parts

__all__ = ["DTYPE", "Shelf", "Step", "active", "page_bytes", "pages_in", "set_active"]

DTYPE = torch.float16  # of keys and values in the pool: what segments are stored in or converted to, at most
_LOG = logging.getLogger(__name__)


def page_bytes(dim: int) -> int:
    """Bytes of a page of heads of ``dim``."""
    return PAGE * (2 * dim * DTYPE.itemsize + 4)


def pages_in(mebibytes: float, dim: int) -> int:
    """Pages of heads of ``dim`` in so much memory.

    Raises:
        ValueError: not one.
    """
    pages = int(mebibytes * 2**20 / page_bytes(dim))
    if pages < 1:
        raise ValueError(f"pool_mib must be room for a page of {page_bytes(dim)} bytes, not {mebibytes!r}")
    return pages


@dataclass(frozen=True, eq=False)
class Step:
    """One pass of the decoder.

    parts : rows that read segments. turned : (N,) int64, the tokens whose queries and keys are turned on.
    cos, sin : (N, 1, D) by how much
    """

    parts: list[Part]
    turned: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys (tokens, heads, D) with those behind a memory turned on."""
        made = x.clone()
        made[self.turned] = Turn.turned(x[self.turned], self.cos, self.sin)
        return made


class Shelf:
    """The pages of a rank, and what lies there.

    Args:
        reads: gives segments by id, in a thread.
        pages: of the pool.
        layers, heads, dim: of the decoder, the KV heads of all ranks, and their size.
        rank, ranks: of tensor parallelism.
        inverse: (D / 2,) of `reading.inverse_frequencies`.
        device: of the pool.
        in_pages: else segments stay as they were read, which the CPU's kernel takes; they take no more room than the
            books say.
    """

    def __init__(
        self,
        reads: Reads,
        pages: int,
        *,
        layers: int,
        heads: int,
        dim: int,
        inverse: torch.Tensor,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
        in_pages: bool = True,
    ) -> None:
        self.pool = Pages.empty(pages if in_pages else 0, dim, device, DTYPE)
        self._in_pages = in_pages
        self.rank = rank
        self._reads, self._layers, self._ranks = reads, layers, ranks
        self._heads = max(1, heads // ranks)
        self._device = torch.device(device)
        self._turn = Turn(inverse)
        self._held: dict[int, Held] = {}
        self._loading: dict[int, tuple[Placed, Future[tuple[Held, Pages | None]]]] = {}
        self._recalls: dict[int, tuple[frozenset[int], Recall]] = {}  # by first block, with its placings
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="lloco-load")
        if not in_pages:  # the kernel is compiled now rather than by the first request
            rows = torch.zeros(layers * self._heads, dim, dtype=DTYPE)
            lengths = torch.ones(layers, self._heads, dtype=torch.int64)
            segment_slots([Segment(rows, rows, torch.zeros(len(rows)), lengths, 1)])

    def follow(self, dropped: Iterable[int], placed: Iterable[Placed], bound: Mapping[int, Binding | None]) -> None:
        """Do as the books say: forget placings, load others, and know the requests that are let in by first block."""
        if gone := frozenset(dropped):  # nobody reads them any more
            self._recalls = {block: one for block, one in self._recalls.items() if not gone & one[0]}
        for number in gone:
            self._held.pop(number, None)
            if (begun := self._loading.pop(number, None)) is not None:
                begun[1].cancel()
        for one in placed:
            self._loading[one.number] = one, self._threads.submit(self._load, one)
        for block, binding in bound.items():
            if binding is None:
                self._recalls.pop(block, None)
                continue
            if missing := [number for number in binding.numbers if number not in self._held]:
                raise RuntimeError(
                    f"a request is let in whose segments (placings {missing}) this worker has not loaded"
                )
            held = tuple(self._held[number] for number in binding.numbers)
            recall = Recall(held, binding.template, binding.focus, binding.priors)
            self._recalls[block] = frozenset(binding.numbers), recall

    def settle(self) -> tuple[list[int], dict[int, str]]:
        """Put what has been read since into the pool: numbers of what is there now, and why of what never will be.

        Pages are written here alone, between two passes: none reads them meanwhile.
        """
        loaded, lost = [], {}
        for number, (placed, future) in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[number]
            try:
                held, pages = future.result()
            except Exception as error:  # the file is missing, damaged or another's: those who wanted it are told
                lost[number] = str(error)
                _LOG.warning("segment %s cannot be loaded: %s", placed.segment, error)
                continue
            if pages is not None:
                self.pool.write(held.pages.to(self._device), pages)
            self._held[number] = held
            loaded.append(number)
        return loaded, lost

    def step(self, first_blocks: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> Step | None:
        """What a pass reads of segments; None where it reads nothing.

        Args:
            first_blocks: of each row.
            starts, ends: as `reading.parts` takes them.
        """
        recalls = {
            row: self._recalls[block][1]
            for row, block in enumerate(first_blocks)
            if block in self._recalls and starts[row] < starts[row + 1]
        }
        if not recalls:
            return None
        made = parts(recalls, starts, ends, layers=self._layers, heads=self._heads, device=self._device)
        if not made:
            return None
        turned = torch.cat([part.tokens.flatten() for part in made])
        shifts = torch.cat([part.shifts.repeat_interleave(part.tokens.shape[1]) for part in made])
        return Step(made, turned, *self._turn.by(shifts, torch.cat([part.positions.flatten() for part in made])))

    def close(self) -> None:
        """No more is loaded."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, placed: Placed) -> tuple[Held, Pages | None]:
        segment: Any = self._reads.read(placed.segment)
        if not self._in_pages:
            return Held.whole(segment, self.rank, self._ranks), None
        return Held.packed(segment, placed.pages[self.rank], self.rank, self._ranks)


_active: Shelf | None = None


def active() -> Shelf | None:
    """The shelf of this process, which attention layers read; None before vLLM's connector has made one."""
    return _active


def set_active(shelf: Shelf | None) -> None:
    """Make attention layers of this process read a shelf, or none."""
    global _active
    _active = shelf
