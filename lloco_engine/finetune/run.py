"""One finetuning run: documents with questions in, an adapter's folder out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lloco_engine import __version__
from lloco_engine.adapters.manifest import FORMAT_VERSION, MANIFEST, AdapterManifest
from lloco_engine.chunking import Chunker
from lloco_engine.compress.base import Compressor
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.errors import ConfigError, DocumentError, LLoCOError
from lloco_engine.finetune.config import FinetuneConfig
from lloco_engine.finetune.examples import Example, Planner, split_records, steps
from lloco_engine.finetune.segments import Segments
from lloco_engine.finetune.train import Progress, Training, lora_config
from lloco_engine.opening import DecoderFacts
from lloco_engine.readers.records import Record, read_records
from lloco_engine.store import Store

__all__ = ["DataFile", "Finetune"]

_TRAINED = "lloco-finetune"  # the adapter's name in the decoder while it is trained


@dataclass(frozen=True)
class DataFile:
    """A file of documents with questions, of which the first ``limit`` are read (None: all)."""

    path: Path
    limit: int | None = None


class Finetune:
    """A run that is ready: data read and checked, nothing written yet.

    Args:
        decoder: what is adapted.
        compressor: makes the segments that are read.
        chunker: cuts long documents.
        data: what to train on.
        config: settings.
        group: name of the documents' group, for the manifest.
        store: whose segments are used where they match, or None.
        tenant: whose segments of the store.
        longest: documents of more tokens are left out; None for no limit.
        start: folder of an adapter to begin with; None for a fresh one.

    Raises:
        AdapterError: ``start`` is for another decoder.
        DocumentError: a file is not as it must be; names line and field.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        compressor: Compressor,
        chunker: Chunker,
        data: Sequence[DataFile],
        config: FinetuneConfig,
        *,
        group: str,
        store: Store | None = None,
        tenant: str = "",
        longest: int | None = None,
        start: Path | None = None,
    ) -> None:
        self._decoder, self._compressor, self._chunker, self._config = decoder, compressor, chunker, config
        self._group, self._store, self._tenant = group, store, tenant
        self._facts = DecoderFacts.of(decoder)
        self._start = None if start is None else _weights(start, self._facts, compressor.memory)
        self._files: list[dict[str, Any]] = []
        records: list[Record] = []
        self.left_out = 0
        for file in data:
            read = [record for record in read_records(file.path, file.limit) if record.questions]
            kept = [r for r in read if longest is None or self._tokens(r.text) <= longest]
            self.left_out += len(read) - len(kept)
            records += kept
            self._files.append(
                {
                    "name": file.path.name,
                    "folder": file.path.resolve().parent.name,
                    "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest(),
                    "limit": file.limit,
                    "documents": len(kept),
                    "questions": sum(len(record.questions) for record in kept),
                }
            )
        if not records:
            raise DocumentError("no document is left to train on: raise the limit on their length")
        self._train, self._held = split_records(records, config)
        planner = Planner(chunker, decoder.tokenizer, config)
        self._batches: list[list[Example]] = []
        for epoch in range(config.epochs):
            self._batches += steps(planner.plan(self._train, 1000 * config.seed + epoch), config.batch_questions)
        self._held_out = [e for e in planner.plan(self._held, config.seed) if e.kind == "memory" or _only(config)]

    def _tokens(self, text: str) -> int:
        return len(self._chunker.tokenizer(text, verbose=False)["input_ids"])

    @property
    def summary(self) -> dict[str, int]:
        """Documents, questions and updates of the run."""
        return {
            "documents": len(self._train),
            "questions": sum(len(record.questions) for record in self._train),
            "held_out_documents": len(self._held),
            "updates": len(self._batches),
            "left_out_documents": self.left_out,
        }

    @property
    def key(self) -> str:
        """Hash of everything that the run depends on but its clock."""
        config = {name: value for name, value in self._config.to_json().items() if name != "max_minutes"}
        facts, compressor = self._facts, self._compressor
        parts = [config, self._files, self._group, facts.fingerprint, facts.template.fingerprint]
        parts += [compressor.name, compressor.settings, self._chunker.config.to_json(), self.left_out]
        parts += [None if self._start is None else self._start[0]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def run(self, target: Path, work: Path, progress: Callable[[Progress], None] | None = None) -> AdapterManifest:
        """Train, and write the adapter's folder; the run's own folder is removed at the end.

        Args:
            target: the adapter's folder, which must not exist.
            work: the run's folder, with segments and checkpoint: the same call goes on from there.
            progress: called after each update.

        Raises:
            ConfigError: ``target`` exists, or ``work`` is another run's.
            StoreFull: no room.
        """
        if target.exists():
            raise ConfigError(f"an adapter's folder must be new, and {target} exists: remove it, or name another")
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the run's folder {work} cannot be made: {error.strerror}") from error
        segments = Segments(self._decoder, self._compressor, work, store=self._store, tenants=(self._tenant,))
        segments.expect(example for batch in self._batches for example in batch)
        segments.expect(self._held_out)
        try:
            training = Training(
                self._decoder,
                _TRAINED,
                self._config,
                self._batches,
                self._held_out,
                segments,
                work,
                self.key,
                progress,
                None if self._start is None else self._start[1],
            )
            state = training.run()
            manifest = self._manifest(state)
            if training.is_main:
                _write(target, training.best, lora_config(self._config), manifest, state.log)
                shutil.rmtree(work)
        finally:
            self._decoder.drop_adapter(_TRAINED)
        return manifest

    def _manifest(self, state: Any) -> AdapterManifest:
        facts = self._facts
        measured = [entry["held_out"] for entry in state.log if "held_out" in entry]
        return AdapterManifest(
            format_version=FORMAT_VERSION,
            group=self._group,
            decoder=facts.name,
            decoder_fingerprint=facts.fingerprint,
            tokenizer_fingerprint=facts.tokenizer_fingerprint,
            template_fingerprint=facts.template.fingerprint,
            memory=self._compressor.memory,
            compressor=self._compressor.name,
            compressor_settings=self._compressor.settings,
            ratios=list(self._config.ratios),
            data=self._files,
            config=self._config.to_json()
            | {"segment_tokens": self._chunker.config.segment_tokens, "begun_with": self._start and self._start[0]},
            metrics={
                "held_out_documents": len(self._held),
                "held_out_loss_before": measured[0] if measured else None,
                "held_out_loss": state.best_loss,
                "updates": state.step,
                "best_update": state.best_step,
                "tokens": state.tokens,
            },
            versions={"lloco": __version__, "python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "peft")},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(state.seconds, 1),
        )


def _weights(folder: Path, facts: DecoderFacts, memory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an adapter to begin with is, and its weights by parameter name."""
    from safetensors.torch import load_file

    found = AdapterManifest.load(folder)
    found.check(facts.fingerprints() | {"memory": memory})
    path = folder / "adapter_model.safetensors"
    try:
        named = load_file(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the adapter to begin with cannot be read from {path}: {error}") from error
    weights = {
        key.removeprefix("base_model.model.").replace(".weight", f".{_TRAINED}.weight"): value
        for key, value in named.items()
    }
    told = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "data": found.data, "config": found.config}
    return told, weights


def _only(config: FinetuneConfig) -> bool:
    """Whether no example reads segments, so that what is held out is measured as it is trained."""
    return config.text_share + config.none_share >= 1


def _write(
    target: Path, parameters: dict[str, Any], lora: Any, manifest: AdapterManifest, log: list[dict[str, Any]]
) -> None:
    """The adapter's folder, wholly or not at all."""
    import torch
    from safetensors.torch import save_file

    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        named = {
            "base_model.model." + key.replace(f".{_TRAINED}.", "."): value.detach()
            .to("cpu", torch.float32)
            .contiguous()
            for key, value in parameters.items()
        }
        save_file(named, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        lora.inference_mode = True
        lora.save_pretrained(draft)
        (draft / MANIFEST).write_text(manifest.dumps(), encoding="utf-8")
        (draft / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
        for file in draft.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(draft, target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise LLoCOError(f"the adapter could not be written to {target}: {error.strerror}; its run is kept") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
