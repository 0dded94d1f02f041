"""One finetuning run: documents with questions in, an adapter's folder out."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lloco_engine import __version__
from lloco_engine.adapters.loading import facts_of, read
from lloco_engine.adapters.manifest import FORMAT_VERSION, MANIFEST, WEIGHTS, AdapterManifest
from lloco_engine.adapters.registry import Kept, check_group
from lloco_engine.adapters.writing import new_folder
from lloco_engine.chunking import Chunker
from lloco_engine.compress.base import Compressor
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.engine import Engine
from lloco_engine.errors import ConfigError, DocumentError
from lloco_engine.finetune.batches import Example, Planner, split_records, steps
from lloco_engine.finetune.checkpoint import State
from lloco_engine.finetune.config import FinetuneConfig
from lloco_engine.finetune.distill import Teacher, read_teachers
from lloco_engine.finetune.segments import Segments
from lloco_engine.finetune.train import Progress, Training, lora_config
from lloco_engine.readers.records import Record, read_records
from lloco_engine.store import Store
from lloco_engine.tokenizing import encode

__all__ = ["DataFile", "Finetune", "finetune_store"]

_TRAINED = "lloco-finetune"  # the adapter's name in the decoder while it is trained


@dataclass(frozen=True)
class DataFile:
    """A file of documents with questions, of which the first ``limit`` are read (None: all).

    ``self_study`` says that `lloco self-study` wrote it, and that its answers are distilled.
    """

    path: Path
    limit: int | None = None
    self_study: bool = False


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
        start: folder of an adapter to begin with, of the run's rank and no other targets; None for a fresh one.

    Raises:
        AdapterError: ``start`` is for another decoder.
        ConfigError: the compressor makes another kind of memory than compact KV.
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
        if compressor.memory != "compact_kv":
            raise ConfigError(
                f"an adapter is trained on compact KV, and {compressor.name!r} makes {compressor.memory!r}: "
                "use a store of another compressor"
            )
        self._facts = facts_of(decoder)
        self._start = None if start is None else _weights(start, self._facts, compressor.memory)
        self._files: list[dict[str, Any]] = []
        records: list[Record] = []
        self._teachers: dict[str, Teacher] = {}
        self.left_out = 0
        for file in data:
            found = [record for record in read_records(file.path, file.limit) if record.questions]
            kept = [r for r in found if longest is None or self._tokens(r.text) <= longest]
            self.left_out += len(found) - len(kept)
            if file.self_study:
                self._teachers |= self._teachers_of(file.path, kept)
            else:  # ids are a file's own: none may be taken for that of a taught question
                kept = [replace(r, questions=tuple(replace(q, id="") for q in r.questions)) for r in kept]
            records += kept
            self._files.append(
                {
                    "name": file.path.name,
                    "folder": file.path.resolve().parent.name,
                    "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest(),
                    "limit": file.limit,
                    "self_study": file.self_study,
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

    def _teachers_of(self, path: Path, records: Sequence[Record]) -> dict[str, Teacher]:
        """The teachers of a self-study file, one for every token of every answer."""
        teachers = read_teachers(path)
        for record in records:
            for question in record.questions:
                tokens = len(encode(self._decoder.tokenizer, question.answers[0])) + 1
                if len(teachers[question.id].tokens) != tokens:
                    raise DocumentError(
                        f"{path}: the teacher of question {question.id!r} is of {len(teachers[question.id].tokens)} "
                        f"tokens and its answer of {tokens}; run `lloco self-study` with this decoder"
                    )
        return teachers

    def _tokens(self, text: str) -> int:
        return len(encode(self._decoder.tokenizer, text))

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
        parts: list[Any] = [config, self._files, self._group, facts]
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
        segments = Segments(self._decoder, self._compressor, work, store=self._store, tenant=self._tenant)
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
                self._teachers,
            )
            state = training.run()
            weights = _weights_file(training.best)
            manifest = self._manifest(state, hashlib.sha256(weights).hexdigest())
            training.wait()  # no process may still read what is removed now
            if training.is_main:
                _write(target, weights, lora_config(self._config), manifest, state.log)
                shutil.rmtree(work)
        finally:
            self._decoder.drop_adapter(_TRAINED)
        return manifest

    def _manifest(self, state: State, weights_sha256: str) -> AdapterManifest:
        facts = self._facts
        measured = [entry["held_out"] for entry in state.log if "held_out" in entry]
        return AdapterManifest(
            format_version=FORMAT_VERSION,
            group=self._group,
            decoder=self._decoder.name,
            **facts,
            memory=self._compressor.memory,
            compressor=self._compressor.name,
            compressor_settings=self._compressor.settings,
            ratios=list(self._config.ratios),
            data=self._files,
            config=json.loads(json.dumps(self._config.to_json()))
            | {"segment_tokens": self._chunker.config.segment_tokens, "begun_with": self._start and self._start[0]},
            weights_sha256=weights_sha256,
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


def finetune_store(
    engine: Engine,
    data: Sequence[DataFile],
    config: FinetuneConfig,
    *,
    group: str,
    tenant: str = "",
    longest: int | None = None,
    start: Path | None = None,
    work: Path | None = None,
    told: Callable[[Finetune], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Kept:
    """Train an adapter for a group of a store's documents, which answers for the group from then on.

    Args:
        engine: on the store; its decoder, compressor and chunk sizes are used, and its segments where they match.
        data: what to train on.
        config: settings; examples at the store's own ratio read the store's segments.
        group: of the documents, as `lloco ingest --group` names it.
        tenant: whose documents.
        longest, start: as `Finetune` takes them.
        work: the run's folder; None is one in the store. The same call goes on from there.
        told: called with the run before it begins.
        progress: called after each update.

    Raises:
        DocumentError, ConfigError, AdapterError, StoreError: as their messages say; the group is then as it was.
    """
    registry = engine.adapters.registry
    check_group(group)
    run = Finetune(
        engine.local_decoder,
        engine.compressor,
        engine.chunker,
        data,
        config,
        group=group,
        store=engine.store,
        tenant=tenant,
        longest=longest,
        start=start,
    )
    if told is not None:
        told(run)
    whose = f"-{hashlib.sha256(tenant.encode()).hexdigest()[:16]}" if tenant else ""
    place = work or registry.root / f".work-{group}{whose}"
    made = place.with_name(f"{place.name}-done-{run.key[:16]}")
    # A run that was cut off at its end goes on where it was: trained, in the store, or tidied up.
    kept = registry.made_by(run.key, group, tenant) if made.exists() else None
    if kept is None:
        if not made.exists():
            run.run(made, place, progress)
        kept = registry.add(made, group, tenant, run=run.key)
    _tidy(place, made)
    return kept


def _tidy(*folders: Path) -> None:
    """Remove what a run that is in the store went on from."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _weights(folder: Path, facts: dict[str, str], memory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an adapter to begin with is, and its weights by parameter name."""
    from safetensors.torch import load

    found = read(folder)
    found.check(facts | {"memory": memory})
    path = folder / WEIGHTS
    try:
        named = load(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the adapter to begin with cannot be read from {path}: {error}") from error
    weights = {
        key.removeprefix("base_model.model.").replace(".weight", f".{_TRAINED}.weight"): value
        for key, value in named.items()
    }
    told = {"sha256": found.weights_sha256, "data": found.data, "config": found.config}
    return told, weights


def _only(config: FinetuneConfig) -> bool:
    """Whether no example reads segments, so that what is held out is measured as it is trained."""
    return config.text_share + config.none_share >= 1


def _weights_file(parameters: Mapping[str, Any]) -> bytes:
    """Weights under the names that PEFT looks for, as the bytes of a safetensors file."""
    import torch
    from safetensors.torch import save

    named = {
        "base_model.model." + key.replace(f".{_TRAINED}.", "."): value.detach().to("cpu", torch.float32).contiguous()
        for key, value in parameters.items()
    }
    return save(named, metadata={"format": "pt"})


def _write(
    target: Path, weights: bytes, lora: Any, manifest: AdapterManifest, log: Sequence[Mapping[str, Any]]
) -> None:
    """The adapter's folder, wholly or not at all."""
    with new_folder(target, "its run is kept") as draft:
        (draft / WEIGHTS).write_bytes(weights)
        lora.inference_mode = True
        lora.save_pretrained(draft)
        (draft / MANIFEST).write_text(manifest.dumps(), encoding="utf-8")
        (draft / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
