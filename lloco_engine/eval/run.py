"""Score answers over a file of questions: without context, with the full text, and with compressed memories of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from lloco_engine import __version__
from lloco_engine.chunking import Chunker
from lloco_engine.compress import registry
from lloco_engine.compress.base import Compressor
from lloco_engine.config import ChunkConfig, Config, GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.decoder.template import encode
from lloco_engine.errors import AdapterError, ConfigError
from lloco_engine.eval import metrics
from lloco_engine.eval.data import JOINT, Group, group_records, read_records
from lloco_engine.eval.machine import check_writable, circumstances, write_json
from lloco_engine.eval.partial import Partial
from lloco_engine.models import DEFAULT_DECODER
from lloco_engine.types import Document, Prefix

__all__ = ["METHODS", "EvalConfig", "Sums", "run"]

METHODS = ("none", "full", "kv")
_ROWS = 16  # questions run together at most
_LOGITS = 1 << 28  # bytes that one layer's attention logits may take


@dataclass(frozen=True)
class EvalConfig(Config):
    """Settings of one evaluation.

    Args:
        data: JSON Lines file, as `lloco_engine.readers.records` describes it.
        limit: documents to read, None for all.
        methods: of `METHODS`: no context, the full text in one prompt, compact KV.
        ratios: source tokens per slot, for ``kv``.
        passages_per_chunk: consecutive documents whose texts form one chunk.
        segments: consecutive chunks that are compressed apart and placed together.
        adapter: name of a loaded adapter, or ``"none"``.
        answers: also generate answers and score them.
        max_new_tokens: longest answer that is generated.
        decoder, device: as `LocalDecoder.load` takes them.
        compressor: of `lloco_engine.compress.registry.NAMES`.
        segment_tokens: a single document longer than this becomes several segments that are all placed.
    """

    data: str
    limit: int | None = None
    methods: tuple[str, ...] = METHODS
    ratios: tuple[float, ...] = (8, 16, 32)
    passages_per_chunk: int = 1
    segments: int = 1
    adapter: str = "none"
    answers: bool = True
    max_new_tokens: int = 32
    decoder: str = DEFAULT_DECODER
    device: str | None = None
    compressor: str = "attention_matching"
    segment_tokens: int = ChunkConfig.segment_tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        object.__setattr__(self, "ratios", tuple(dict.fromkeys(self.ratios)))
        if not self.methods or (unknown := [name for name in self.methods if name not in METHODS]):
            received = repr(unknown[0]) if self.methods else "none at all"
            raise ConfigError(f"methods must be some of {', '.join(METHODS)}, not {received}")
        if "kv" in self.methods and not self.ratios:
            raise ConfigError("ratios must name at least one ratio for the method 'kv'")
        if bad := [ratio for ratio in self.ratios if ratio < 1]:
            raise ConfigError(f"ratios must be at least 1 (source tokens per slot), not {bad[0]}")
        for name in ("passages_per_chunk", "segments", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1 document, not {self.limit}")

    @property
    def rows(self) -> list[tuple[str, float | None]]:
        """Method and ratio of each row of the result."""
        made: list[tuple[str, float | None]] = []
        for method in self.methods:
            made += [(method, ratio) for ratio in self.ratios] if method == "kv" else [(method, None)]
        return made


@dataclass
class Sums:
    """One row's sums over questions; ``loss`` over the ``tokens`` of gold answers, in nats."""

    questions: int = 0
    loss: float = 0.0
    tokens: int = 0
    f1: float = 0.0
    rouge_l: float = 0.0
    prompt_slots: int = 0
    prompt_tokens: int = 0
    source_tokens: int = 0

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> Self:
        """The sum of sums given as JSON values."""
        values = list(parts)
        return cls(**{field.name: sum(value[field.name] for value in values) for field in fields(cls)})


def run(
    config: EvalConfig,
    *,
    output: Path | None = None,
    decoder: LocalDecoder | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> dict[str, Any]:
    """Evaluate; a run with an output file that was cut off goes on where it stopped.

    Args:
        config: the settings.
        output: JSON file to write.
        decoder: one that is loaded already; else ``config.decoder`` is loaded.
        progress: called with what is done, how many questions are, and how many there are.

    Returns:
        ``{"config": ..., "results": [...]}``, JSON-ready.

    Raises:
        DocumentError: the data file is not as it must be.
        AdapterError: the adapter is not loaded.
        ConfigError, ModelNotFound, PromptTooLong: as their messages say.
    """
    records = read_records(config.data, config.limit)
    groups = group_records(records, config.passages_per_chunk, config.segments)
    if output is not None:
        check_writable(output)
    decoder = decoder or LocalDecoder.load(config.decoder, device=config.device)
    if config.adapter != "none" and config.adapter not in decoder.adapters:
        raise AdapterError(
            f"adapter {config.adapter!r} is not loaded; there is {', '.join(decoder.adapters) or 'none'}: "
            "use --adapter none"
        )
    compressor = registry.get(config.compressor)
    facts = _facts(config, decoder, compressor)
    partial = Partial(output, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
    evaluation = _Evaluation(config, decoder, compressor)
    total, done = sum(len(group.questions) for group in groups), 0
    for number, group in enumerate(groups):
        if progress is not None:
            progress("questions", done, total)
        if number not in partial.done:
            partial.add(number, evaluation.measure(group))
        done += len(group.questions)
    measured = [partial.done[number] for number in range(len(groups))]
    result = {
        "config": facts
        | circumstances(decoder.runner.device, decoder.runner.dtype)
        | {"seconds": round(sum(value["seconds"] for value in measured), 1), "notes": _notes(measured)},
        "results": _results(config, len(records), measured),
    }
    if output is not None:
        write_json(output, result)
    partial.finish()
    return result


def _facts(config: EvalConfig, decoder: LocalDecoder, compressor: Compressor) -> dict[str, Any]:
    """Everything that the numbers depend on, JSON-ready."""
    return config.to_json() | {
        "methods": list(config.methods),
        "ratios": [_number(ratio) for ratio in config.ratios],
        "decoder": {
            "name": config.decoder,
            "fingerprint": decoder.fingerprint,
            "tokenizer_fingerprint": decoder.tokenizer_fingerprint,
            "template_fingerprint": decoder.template.fingerprint,
            "window": decoder.shape.window,
        },
        "compressor": {"name": compressor.name, "settings": compressor.settings},
        "data": Path(config.data).name,  # a result must not carry a path of the machine that made it
        "data_sha256": hashlib.sha256(Path(config.data).read_bytes()).hexdigest(),
        "lloco": __version__,
    }


def _number(ratio: float) -> float:
    return int(ratio) if ratio == int(ratio) else ratio


def _results(config: EvalConfig, documents: int, measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    sums = [Sums.total(value["rows"][row] for value in measured) for row in range(len(config.rows))]
    losses = {method: total.loss / total.tokens for (method, _), total in zip(config.rows, sums, strict=True)}
    none, full = losses.get("none"), losses.get("full")
    return [
        {
            "method": method,
            "ratio": None if ratio is None else _number(ratio),
            "adapter": config.adapter,
            "documents": documents,
            "questions": total.questions,
            "loss": total.loss / total.tokens,
            "recovered": metrics.recovered(total.loss / total.tokens, none, full),
            "f1": total.f1 / total.questions if config.answers else None,
            "rouge_l": total.rouge_l / total.questions if config.answers else None,
            "prompt_slots": total.prompt_slots / total.questions,
            "prompt_tokens": total.prompt_tokens / total.questions,
            "source_tokens": total.source_tokens / total.questions,
        }
        for (method, ratio), total in zip(config.rows, sums, strict=True)
    ]


def _notes(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if split := sum(value["split"] for value in measured):
        notes.append(f"{split} chunks were longer than a segment may be and became several, all placed")
    if cut := [value["truncated"] for value in measured if value["truncated"]]:
        notes.append(
            f"method full: {len(cut)} of {len(measured)} prompts did not fit the decoder's window and lost the middle "
            f"of their text, {sum(cut):,} tokens in all"
        )
    return notes


class _Evaluation:
    """Measures one group at a time."""

    def __init__(self, config: EvalConfig, decoder: LocalDecoder, compressor: Compressor) -> None:
        self.config, self.decoder, self.compressor = config, decoder, compressor
        self.longest = compressor.longest_chunk(decoder)
        if config.passages_per_chunk == 1:  # else the caller has said what a chunk is
            self.longest = min(self.longest, config.segment_tokens)

    def measure(self, group: Group) -> dict[str, Any]:
        """The sums of each row over a group's questions, JSON-ready, with what had to be split or cut."""
        began = time.perf_counter()
        config = self.config
        pieces = [self._pieces(text) for text in group.chunks] if "kv" in config.methods else []
        made: dict[float, Prefix] = self._compressed([ids for chunk in pieces for ids in chunk]) if pieces else {}
        context: list[int] = []
        truncated = 0
        if "full" in config.methods:
            context, truncated = self._context(group)
        rows = []
        for method, ratio in config.rows:
            if method == "none":
                sums = self._score(group, None)
            elif method == "full":
                sums = self._full(group, context)
            else:
                assert ratio is not None
                sums = self._score(group, made[ratio])
            rows.append(asdict(sums))
        split = sum(len(chunk) > 1 for chunk in pieces)
        return {"rows": rows, "split": split, "truncated": truncated, "seconds": time.perf_counter() - began}

    def _encode(self, text: str) -> list[int]:
        return encode(self.decoder.tokenizer, text)

    def _pieces(self, text: str) -> list[list[int]]:
        """Token ids of the segments that a chunk's text becomes; nearly always one."""
        ids = self._encode(text)
        if len(ids) <= self.longest:
            return [ids]
        window = min(ChunkConfig.window_tokens, self.longest)
        sizes = ChunkConfig(self.longest, window, min(ChunkConfig.window_overlap, window - 1))
        chunks = Chunker(self.decoder.tokenizer, sizes).split(Document("", text))
        return [list(chunk.token_ids) for chunk in chunks]

    def _compressed(self, pieces: Sequence[Sequence[int]]) -> dict[float, Prefix]:
        """All pieces at each ratio, placed in parallel."""
        made = [self.compressor.compress(self.decoder, ids, self.config.ratios) for ids in pieces]
        start = self.decoder.template_tokens + max(map(len, pieces))
        return {
            ratio: Prefix(tuple(segments), (0,) * len(segments), start)
            for ratio, segments in zip(self.config.ratios, zip(*made, strict=True), strict=True)
        }

    def _context(self, group: Group) -> tuple[list[int], int]:
        """Token ids of the group's text as far as it fits beside any of its questions, and how many were left out."""
        ids = self._encode(JOINT.join(group.chunks))
        decoder = self.decoder
        asked = max(len(decoder.template.question_ids(question.question)) for question in group.questions)
        gold = max(len(self._encode(question.answers[0])) + 1 for question in group.questions)
        room = decoder.shape.window - decoder.template_tokens - asked - max(gold, self.config.max_new_tokens)
        if len(ids) <= room:
            return ids, 0
        room = max(room, 2)
        return [*ids[: room - room // 2], *ids[len(ids) - room // 2 :]], len(ids) - room

    def _full(self, group: Group, context: list[int]) -> Sums:
        """Text in the prompt: its cache is made once and read by every question, as an uncompressed segment."""
        if self.config.adapter == "none":
            segment = registry.get("uncompressed").compress(self.decoder, context, [1])[0]
            prefix = Prefix((segment,), (0,), self.decoder.template_tokens + len(context))
            sums = self._score(group, prefix)
            sums.prompt_tokens += sums.prompt_slots
            sums.prompt_slots = 0
            return sums
        sums = self._score(group, None, context)  # an adapter reads the text too, so its cache is not the base's
        sums.source_tokens = len(context) * sums.questions
        return sums

    def _score(self, group: Group, prefix: Prefix | None, context: list[int] | None = None) -> Sums:
        config, decoder, sums = self.config, self.decoder, Sums()
        adapter = None if config.adapter == "none" else config.adapter
        prompts = [Prompt(question.question, prefix, context) for question in group.questions]
        rows = self._rows(prompts, group, prefix)
        for at in range(0, len(prompts), rows):
            asked, questions = prompts[at : at + rows], group.questions[at : at + rows]
            for loss, tokens in decoder.answer_losses(asked, [q.answers[0] for q in questions], adapter):
                sums.loss += loss
                sums.tokens += tokens
            if config.answers:
                generations = decoder.generate(asked, GenerateConfig(config.max_new_tokens), adapter)
                for question, generation in zip(questions, generations, strict=True):
                    sums.f1 += metrics.f1(generation.text, question.answers)
                    sums.rouge_l += metrics.rouge_l(generation.text, question.answers)
        sums.questions = len(prompts)
        sums.prompt_tokens = sum(len(decoder.template.question_ids(p.question, p.context)) for p in prompts)
        if prefix is not None:
            sums.prompt_slots = prefix.slots * len(prompts)
            sums.source_tokens = prefix.source_tokens * len(prompts)
        return sums

    def _rows(self, prompts: Sequence[Prompt], group: Group, prefix: Prefix | None) -> int:
        """Questions to run together: few enough that the attention logits of a layer stay small."""
        shape = self.decoder.shape
        tokens = max(
            len(self.decoder.template.question_ids(prompt.question, prompt.context))
            + len(self._encode(question.answers[0]))
            for prompt, question in zip(prompts, group.questions, strict=True)
        )
        width = self.decoder.template_tokens + tokens + self.config.max_new_tokens
        if prefix is not None:  # heads are ragged: the longest counts
            width += sum(int(segment.lengths.max()) for segment in prefix.compact)
        return max(1, min(_ROWS, _LOGITS // (4 * shape.query_heads * tokens * width)))
