"""AutoCompressors as published: a decoder that writes summaries of text, and reads them as input embeddings.

Chevalier et al. 2023, "Adapting Language Models to Compress Contexts" (arXiv 2305.14788), section 3. Per segment the
model reads [summaries so far; segment; K learned summary tokens], and its final states at the summary tokens are the
segment's K summary vectors. Positions begin anew with each segment. In the Llama models the summaries take positions
like tokens do; in the OPT models summaries and summary tokens have none, and the text's positions begin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from lloco_engine import models
from lloco_engine.compress.summary_tokens import SummaryTokens
from lloco_engine.decoder.attention import Cache
from lloco_engine.decoder.probe import runner_of
from lloco_engine.decoder.runner import Runner
from lloco_engine.errors import ConfigError, UnsupportedModel

__all__ = ["SEGMENT_TOKENS", "AutoCompressor"]

SEGMENT_TOKENS = 1536  # of a segment where the input is longer than the window; LLoCO's own (Tan et al. 2024)

Ids = Sequence[int] | torch.Tensor


class AutoCompressor:
    """A published AutoCompressor. It needs no tokenizer; ``segment_lengths`` means what it does in the release.

    Args:
        runner: the decoder's forward pass.
        tokens: its summary tokens.
        eos: ids that end a generation.
    """

    def __init__(self, runner: Runner, tokens: SummaryTokens, eos: Sequence[int] = ()) -> None:
        if tokens.embeddings.shape[1] != runner.shape.embedding:
            raise ConfigError(
                f"summary tokens must be as wide as the decoder's input embeddings, {runner.shape.embedding}, not "
                f"{tokens.embeddings.shape[1]}"
            )
        kind = runner.model.config.model_type
        if not runner.shape.rotary and kind != "opt":
            raise UnsupportedModel(
                f"summaries take positions that are rotary, or none, as OPT alone has: {kind!r} has learned ones"
            )
        self.runner = runner
        self.accumulate = tokens.accumulate
        self.embeddings = tokens.embeddings.to(runner.device, runner.dtype)
        self.eos = frozenset(eos)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: str | None = None, dtype: str | None = None) -> Self:
        """Load a checkpoint in the published layout, by local folder or hub id.

        Args:
            path: config.json with ``summary_length`` and ``accumulate_summary``; weights with
                ``embed_summary.weight``, as safetensors or pytorch_model.bin, sharded or not.
            device, dtype: by default what suits the machine (float32 on a CPU).

        Raises:
            ModelNotFound: there is no whole checkpoint.
            ConfigError: it has no summary tokens.
            UnsupportedModel: the family cannot be run.
        """
        folder = models.decoder_folder(str(path))
        tokens = SummaryTokens.of_folder(folder)
        model = models.load_causal_lm(folder, device=device, dtype=dtype)
        given = model.generation_config.eos_token_id if model.generation_config is not None else None
        given = model.config.eos_token_id if given is None else given
        eos = given if isinstance(given, list) else [] if given is None else [given]
        return cls(runner_of(model), tokens, eos)

    @property
    def summary_length(self) -> int:
        """Summary vectors of one segment."""
        return len(self.embeddings)

    # -- writing summaries --------------------------------------------------------------------------------------

    def compress_token_ids(self, ids: Ids, segment_lengths: int | Sequence[int] | None = None) -> torch.Tensor:
        """Summary vectors of one text.

        Args:
            ids: n token ids, as a list or a tensor of shape (n,) or (1, n).
            segment_lengths: tokens of every segment (the last one takes what is left), or of each one, adding up to
                n. None is one segment; where that does not fit the window, segments of `SEGMENT_TOKENS`.

        Returns:
            (slots, E): the summaries of all segments where the checkpoint accumulates them, else of the last one.

        Raises:
            ConfigError: there are no ids, or the lengths do not fit them.
        """
        return self.compress(_row(ids), segment_lengths=segment_lengths)[0]

    @torch.no_grad()
    def compress(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        segment_lengths: int | Sequence[int] | None = None,
        softprompt: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summary vectors of several texts at once; a padded row comes out as it would alone, without its padding.

        Args:
            ids: (B, n) int64 token ids.
            attention_mask: (B, n), 0 where a row has padding, at either end.
            segment_lengths: as in `compress_token_ids`, in columns of ``ids``.
            softprompt: (B, S, E) summaries to go on from, or None.

        Returns:
            (B, slots, E), on the decoder's device. ``softprompt`` is part of it where summaries accumulate.

        Raises:
            ConfigError: there are no ids, or the lengths do not fit them.
        """
        rows, columns = ids.shape
        kept = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if softprompt is None:
            softprompt = self.embeddings.new_zeros(rows, 0, self.runner.shape.embedding)
        start = 0
        for length in self._lengths(columns, segment_lengths):
            part = slice(start, start + length)
            texts = [ids[row, part][kept[row, part].to(ids.device)] for row in range(rows)]
            made = self.summarise(texts, softprompt)
            softprompt = torch.cat((softprompt.to(made), made), dim=1) if self.accumulate else made
            start += length
        return softprompt

    @torch.no_grad()
    def summarise(self, texts: Sequence[Ids], softprompt: torch.Tensor) -> torch.Tensor:
        """The summary vectors of one segment a row.

        Args:
            texts: B lists of token ids, of any lengths.
            softprompt: (B, S, E) what stands before them; S may be 0.

        Returns:
            (B, K, E).
        """
        count = len(self.embeddings)
        sizes = [len(text) for text in texts]
        shared = self.embeddings.expand(len(texts), -1, -1)
        softprompt = softprompt.to(self.embeddings)
        longest = max(sizes)
        inputs = self.embeddings.new_zeros(len(texts), softprompt.shape[1] + longest + count, shared.shape[2])
        for row, text in enumerate(texts):  # padding is at the left, where it is masked
            inputs[row, longest - sizes[row] :] = torch.cat((softprompt[row], self._embed(text), shared[row]))
        pad = torch.tensor([longest - size for size in sizes], device=self.runner.device)
        hidden = self._forward(inputs, softprompt.shape[1], count, pad)
        return hidden[:, -count:]

    def _lengths(self, columns: int, wanted: int | Sequence[int] | None) -> list[int]:
        if columns < 1:
            raise ConfigError("a text to compress must have at least one token")
        if wanted is None:
            shape = self.runner.shape
            whole = columns + (len(self.embeddings) if shape.rotary else 0) <= shape.window
            wanted = columns if whole else SEGMENT_TOKENS
        if isinstance(wanted, int):
            if wanted < 1:
                raise ConfigError(f"segment_lengths must be at least 1 token, not {wanted}")
            return [min(wanted, columns - at) for at in range(0, columns, wanted)]
        lengths = [int(length) for length in wanted]
        if sum(lengths) != columns or min(lengths, default=0) < 0:
            raise ConfigError(f"segment_lengths must add up to the {columns} tokens, not to {sum(lengths)}")
        return lengths

    # -- reading them -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, question_ids: Ids, summary_vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Next-token logits after each token of a question that follows summaries.

        Args:
            question_ids: n >= 1 token ids.
            summary_vectors: (slots, E), or None for a question alone.

        Returns:
            (n, vocabulary) float32; the last row is for the token after the question.
        """
        softprompt = self._vectors(summary_vectors)
        inputs = torch.cat((softprompt, self._embed(_row(question_ids)[0])))[None]
        hidden = self._forward(inputs, len(softprompt), 0)
        return self.runner.logits(hidden[0, len(softprompt) :])

    @torch.no_grad()
    def generate(
        self, question_ids: Ids, summary_vectors: torch.Tensor | None = None, max_new_tokens: int = 50
    ) -> list[int]:
        """Greedy answer to a question that follows summaries.

        Args:
            question_ids: n >= 1 token ids.
            summary_vectors: (slots, E), or None for a question alone.
            max_new_tokens: the most tokens.

        Returns:
            the new token ids; an end token, where one comes, is the last of them.
        """
        softprompt = self._vectors(summary_vectors)
        inputs = torch.cat((softprompt, self._embed(_row(question_ids)[0])))[None]
        cache = self._cache(1, inputs.shape[1] + max_new_tokens)
        text = inputs.shape[1] - len(softprompt)
        hidden = self._forward(inputs, len(softprompt), 0, cache=cache)
        start = len(softprompt) if self.runner.shape.rotary else 0
        made: list[int] = []
        while len(made) < max_new_tokens:
            made.append(int(self.runner.logits(hidden[:, -1]).argmax()))
            if made[-1] in self.eos or len(made) == max_new_tokens:
                break
            position = torch.tensor([start + text + len(made) - 1], device=self.runner.device)
            hidden = self.runner.forward(torch.tensor([[made[-1]]], device=self.runner.device), position, cache)
        return made

    def _vectors(self, summary_vectors: torch.Tensor | None) -> torch.Tensor:
        if summary_vectors is None:
            return self.embeddings[:0]
        vectors = torch.as_tensor(summary_vectors).to(self.embeddings)
        vectors = vectors[0] if vectors.dim() == 3 and len(vectors) == 1 else vectors
        if vectors.dim() != 2 or vectors.shape[1] != self.runner.shape.embedding:
            raise ConfigError(
                f"summary vectors must be of shape (slots, {self.runner.shape.embedding}), not {tuple(vectors.shape)}"
            )
        return vectors

    # -- passes -------------------------------------------------------------------------------------------------

    def _embed(self, ids: Ids) -> torch.Tensor:
        tensor = torch.as_tensor(ids, dtype=torch.int64, device=self.runner.device)
        embedded: torch.Tensor = self.runner.embed(tensor)
        return embedded

    def _cache(self, rows: int, capacity: int, pad: torch.Tensor | None = None) -> Cache:
        runner, shape = self.runner, self.runner.shape
        sizes = (shape.layers, rows, shape.kv_heads, shape.head_dim, capacity)
        return Cache(*sizes, device=runner.device, dtype=runner.dtype, pad=pad)

    def _forward(
        self,
        inputs: torch.Tensor,
        before: int,
        after: int,
        pad: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Final states of rows [padding; ``before`` summaries; text; ``after`` summary tokens] from position 0 on."""
        rows, length = inputs.shape[:2]
        pad = torch.zeros(rows, dtype=torch.int64, device=inputs.device) if pad is None else pad
        cache = cache or self._cache(rows, length, pad if bool(pad.any()) else None)
        positions = torch.arange(length, device=inputs.device) - pad[:, None]
        if not self.runner.shape.rotary:
            positions = positions - before  # negative ones, of what stands before the text, are none
            positions[:, length - after :] = -1
        return self.runner.forward(inputs, positions, cache)


def _row(ids: Ids) -> torch.Tensor:
    """Token ids of one text as (1, n)."""
    tensor = torch.as_tensor(ids, dtype=torch.int64)
    tensor = tensor[None] if tensor.dim() == 1 else tensor
    if tensor.dim() != 2 or len(tensor) != 1 or tensor.shape[1] < 1:
        raise ConfigError(f"token ids must be of shape (n,) or (1, n) with n at least 1, not {tuple(tensor.shape)}")
    return tensor
