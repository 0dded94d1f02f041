"""The learned parameters of a summary compressor: the input embeddings of its summary tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from lloco_engine.errors import ConfigError, ModelNotFound
from lloco_engine.models import read_tensor

__all__ = ["SummaryFacts", "SummaryTokens"]


@dataclass(frozen=True)
class SummaryFacts:
    """What a checkpoint's config.json says of its summary tokens: how many, and whether summaries accumulate."""

    length: int
    accumulate: bool

    @classmethod
    def of_folder(cls, folder: str | Path) -> Self:
        """Read a published checkpoint's config.json.

        Raises:
            ModelNotFound: there is none that can be read.
            ConfigError: the checkpoint has no summary tokens.
        """
        try:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"a model folder must hold a readable config.json: {error}") from error
        length = config.get("summary_length")
        if not isinstance(length, int) or length < 1:
            raise ConfigError(
                f"summary embeddings need a decoder whose config.json has a summary_length of at least 1, and that of "
                f"{folder} has {length!r}: use a checkpoint such as princeton-nlp/AutoCompressor-Llama-2-7b-6k, or "
                "another compressor"
            )
        return cls(length, bool(config.get("accumulate_summary", False)))


@dataclass(frozen=True, eq=False)
class SummaryTokens:
    """A compressor's own parameters.

    embeddings : (K, E) float, the input embeddings of the K summary tokens, on the CPU in the type they are kept in
    accumulate : whether a segment is read after all summaries before it (Chevalier et al. 2023, section 3), or only
        after the last one (the recurrent memory that the paper compares with)
    """

    embeddings: torch.Tensor
    accumulate: bool

    @classmethod
    def of_folder(cls, folder: str | Path) -> Self:
        """Read a published checkpoint: ``summary_length`` and ``accumulate_summary`` from its config.json,
        ``embed_summary.weight`` (K, E) from its weights, sharded or not.

        Raises:
            ModelNotFound: config or weights cannot be read, or the weights lack that tensor.
            ConfigError: the checkpoint has no summary tokens.
        """
        facts = SummaryFacts.of_folder(folder)
        embeddings = read_tensor(folder, "embed_summary.weight")
        if embeddings.dim() != 2 or embeddings.shape[0] != facts.length:
            raise ModelNotFound(
                f"embed_summary.weight must have summary_length = {facts.length} rows; in {folder} it is of shape "
                f"{tuple(embeddings.shape)}"
            )
        return cls(embeddings, facts.accumulate)
