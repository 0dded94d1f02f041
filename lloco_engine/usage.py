"""The cost of one question: what the decoder, the prefix and the process say about it, put together."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lloco_engine.tokens import count_tiktoken
from lloco_engine.types import Prefix, Usage

if TYPE_CHECKING:
    import torch

    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.prompt import Generation

__all__ = ["peak_memory", "usage_of"]


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the device's allocator on CUDA, else of this process (0 where that is not known)."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usage_of(
    decoder: AnsweringDecoder,
    generation: Generation,
    *,
    prefix: Prefix | None = None,
    texts: Iterable[str] = (),
    retrieve_s: float = 0.0,
    load_s: float = 0.0,
    before_s: float = 0.0,
) -> Usage:
    """The ledger of a finished generation.

    Args:
        decoder: what answered.
        generation: its result.
        prefix: the segments that were read.
        texts: the texts that they stand for, to be counted by tiktoken (0 where this machine has none).
        retrieve_s: seconds of finding the segments.
        load_s: seconds of reading and placing them.
        before_s: seconds from the question to the start of the generation, all told.
    """
    return Usage(
        prompt_tokens=generation.prompt_tokens,
        prompt_slots=0 if prefix is None else prefix.slots,
        template_tokens=decoder.template_tokens if prefix is None or prefix.embeddings is None else 0,
        source_tokens=0 if prefix is None else prefix.source_tokens,
        source_tokens_tiktoken=sum(count_tiktoken(text) or 0 for text in texts),
        completion_tokens=len(generation.token_ids),
        retrieve_s=retrieve_s,
        load_s=load_s,
        ttft_s=before_s + generation.ttft_s,
        decode_s=generation.decode_s,
        peak_memory=0 if decoder.device is None else peak_memory(decoder.device),
    )
