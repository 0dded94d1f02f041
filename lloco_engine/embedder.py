"""Text -> search vectors, with a sentence-transformers model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lloco_engine.fingerprints import model_fingerprint
from lloco_engine.models import DEFAULT_EMBEDDER, embedder_folder, pick_device
from lloco_engine.pretrained import read_embedder
from lloco_engine.process import ProcessLock
from lloco_engine.unicode import require_unicode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from sentence_transformers import SentenceTransformer

__all__ = ["Embedder", "Encodes"]


class Encodes(Protocol):
    """What an engine needs of an embedder. One with `encode_query` too is asked by it for questions."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digits that stand for everything that shapes a vector."""
        ...

    @property
    def dim(self) -> int:
        """Numbers per vector."""
        ...

    def encode(self, texts: Sequence[str], /) -> npt.NDArray[np.float32]:
        """(texts, dim) float32, rows L2-normalised."""
        ...


class Embedder:
    """A search embedder; nothing is read before it is needed. Safe to share between threads.

    Args:
        name: ``"embedded"`` (all-MiniLM-L6-v2 from the installed wheel), a local folder or a hub id.
        device: as `lloco_engine.models.pick_device` takes it.
    """

    def __init__(self, name: str = DEFAULT_EMBEDDER, device: str | None = None) -> None:
        self.name = name
        self.device = device
        self._lock = ProcessLock(f"the embedder {name!r}")  # encoding sets truncation on the one tokenizer

    @cached_property
    def folder(self) -> str:
        """The model's folder.

        Raises:
            ModelNotFound: the embedder cannot be resolved.
        """
        return embedder_folder(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """24 hex digits that stand for everything that shapes a vector; equal for a copy under another name."""
        folder = Path(self.folder)
        model = model_fingerprint(folder)
        digest = hashlib.sha256(model[:16].encode())  # as `lloco_engine.fingerprints.agree` compares them
        shaping = ("modules.json", "sentence_bert_config.json", "tokenizer.json", "vocab.txt")
        for file in [*(folder / name for name in shaping), *sorted(folder.glob("*/config.json"))]:
            if file.is_file():
                digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
        if prompts := self._prompts(folder):
            digest.update(json.dumps(prompts, sort_keys=True).encode())
        return digest.hexdigest()[:16] + model[16:]

    @staticmethod
    def _prompts(folder: Path) -> dict[str, str]:
        """What is put before a text of each kind, of those that its makers gave it."""
        try:
            prompts = json.loads((folder / "config_sentence_transformers.json").read_bytes()).get("prompts") or {}
            return {str(name): str(prompt) for name, prompt in prompts.items() if prompt}
        except (OSError, ValueError, AttributeError):
            return {}

    @cached_property
    def dim(self) -> int:
        """Numbers per vector."""
        dim = self._model.get_embedding_dimension()
        return int(dim) if dim else int(self._model.encode(["."], show_progress_bar=False).shape[1])

    @cached_property
    def _model(self) -> SentenceTransformer:
        with self._lock:
            return read_embedder(self.folder, str(pick_device(self.device)))

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Vectors of ``texts`` that are searched: (len(texts), dim) float32, each of length 1.

        Text beyond the embedder's own window (256 word pieces for the embedded one) does not count.

        Raises:
            ModelNotFound: the embedder cannot be resolved or read.
        """
        return self._encode("encode_document", texts, batch_size)

    def encode_query(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Vectors of questions; as `encode`, for an embedder whose configuration has a prompt for them."""
        return self._encode("encode_query", texts, batch_size)

    def _encode(self, method: str, texts: Sequence[str], batch_size: int) -> np.ndarray:
        import numpy as np

        require_unicode(text=texts)
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        with self._lock:
            vectors = getattr(self._model, method)(
                list(texts),
                batch_size=batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)
