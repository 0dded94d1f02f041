"""Summary embeddings as vLLM's API takes them: the whole prompt as input embeddings, in the place of token ids.

Text after the summaries is looked up in the decoder's table of input embeddings here, since a prompt is either ids or
embeddings there. An adapter then must leave that table alone: vLLM's layer for adapted tables takes ids only, and
brings the server down with embeddings, so servers are started with adapters of attention alone (`TARGETS`).
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lloco_engine import AdapterError

if TYPE_CHECKING:
    import torch

__all__ = ["TARGETS", "check_targets", "encoded"]

TARGETS = ("qkv_proj", "o_proj")  # modules that the servers adapt, as vLLM calls them
_THEIRS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})  # as adapters do


def encoded(embeddings: torch.Tensor) -> str:
    """Embeddings (T, E) as the ``prompt_embeds`` of a request: a tensor's file in base64."""
    import torch

    file = io.BytesIO()
    torch.save(embeddings.contiguous().clone(), file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def check_targets(folder: Path, name: str) -> None:
    """Refuse an adapter that cannot work with summary embeddings on vLLM.

    Raises:
        AdapterError: it adapts more than attention, or its configuration cannot be read.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        targets = config["target_modules"]
        parts = {str(one).rpartition(".")[2] for one in ([targets] if isinstance(targets, str) else targets)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"the adapter {name!r} must have a readable adapter_config.json: {error}") from error
    if others := sorted(parts - _THEIRS):
        raise AdapterError(
            f"an adapter for summary embeddings on vLLM must adapt {', '.join(sorted(_THEIRS))} alone, and {name!r} "
            f"adapts {', '.join(others)}: train one with these targets, or ask with --adapter none"
        )
