"""Self-study: the decoder asks and answers over raw chunks, so that an adapter can be trained without labels.

Each chunk is read as text; the base weights write a question of each kind and answer it. What is kept makes an
answer likelier with the text than without it. The answers' distributions are kept for distillation. After
self-study for cartridges (Eyuboglu et al. 2025, arXiv 2506.06266), which distils the same way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lloco_engine.adapters.loading import facts_of
from lloco_engine.atomic import write_file
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.config import Config, GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import ConfigError, LLoCOError
from lloco_engine.finetune.distill import teach
from lloco_engine.journal import Journal
from lloco_engine.prefix import Room, assemble
from lloco_engine.tokenizing import encode
from lloco_engine.types import Hit, Prefix

__all__ = ["KINDS", "SelfStudy", "SelfStudyConfig"]

_ONLY = "Write only the question, in one sentence."
KINDS: dict[str, str] = {
    "who": f"Write a question that begins with Who and that the text above answers. {_ONLY}",
    "when": f"Write a question that begins with When or In what year and that the text above answers. {_ONLY}",
    "what": f"Write a question that begins with What and that the text above answers. {_ONLY}",
    "where": f"Write a question that begins with Where and that the text above answers. {_ONLY}",
    "how many": f"Write a question that begins with How many or How much and that the text above answers. {_ONLY}",
    "why": f"Write a question that begins with Why or How and that the text above answers. {_ONLY}",
}
_SUMMARY = "What is the text about? Answer in one sentence."
_WORD = re.compile(r"\w+")
# a small decoder asks about what it was told to do
_PROMPT = re.compile(r"\btext above\b|\bthe text\b|\bth(e|is) question\b", re.IGNORECASE)


@dataclass(frozen=True)
class SelfStudyConfig(Config):
    """How much is asked.

    Args:
        per_kind: questions of each kind that are tried over a chunk.
        temperature: of the questions; answers are greedy.
        answer_tokens: longest answer; one that does not end by then is dropped.
        gain: nats per token by which the text must make an answer likelier.
        seed: of the sampling.
    """

    per_kind: int = 1
    temperature: float = 0.7
    answer_tokens: int = 48
    gain: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("per_kind", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must not be negative, not {self.temperature}")


class SelfStudy:
    """One run over chunks; a run that was cut off goes on after its last finished chunk.

    Args:
        decoder: asks and answers, with its base weights.
        config: settings.
        progress: called with the chunks done, and how many there are.
    """

    def __init__(
        self, decoder: LocalDecoder, config: SelfStudyConfig, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._decoder, self._config, self._progress = decoder, config, progress

    def run(self, chunks: Sequence[Hit], output: Path) -> dict[str, Any]:
        """Write one record a chunk: the chunk's text, and the questions that were kept.

        Args:
            chunks: to ask about.
            output: JSON Lines file to write; ``OUTPUT.partial`` keeps what is done meanwhile.

        Returns:
            the report: chunks, questions tried, kept, and dropped by reason.

        Raises:
            ConfigError: the output exists, cannot be written, or an unfinished run with other settings left it.
        """
        if not chunks:
            raise ConfigError("there must be at least one chunk to ask about; `lloco ingest` makes them")
        if output.exists():
            raise ConfigError(f"the output must be a new file, and {output} exists: remove it, or name another")
        partial = output.with_name(output.name + ".partial")
        key = self._key(chunks)
        try:
            journal = Journal(partial, key)
            done = journal.done
            seen = {_normal(question["question"]) for record in done for question in record["questions"]}
            for number in range(len(done), len(chunks)):
                if self._progress is not None:
                    self._progress(number, len(chunks))
                journal.add(self._study(chunks[number], number, seen))
            kept = [record for record in done if record["questions"]]
            write_file(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
            journal.finish()
        except OSError as error:
            raise LLoCOError(f"{output} cannot be written: {error.strerror}; what is done is in {partial}") from error
        if self._progress is not None:
            self._progress(len(chunks), len(chunks))
        return _report(done)

    def _key(self, chunks: Iterable[Hit]) -> str:
        texts = [hashlib.sha256(chunk.text.encode()).hexdigest() for chunk in chunks]
        parts = [self._config.to_json(), facts_of(self._decoder), KINDS, texts]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _study(self, chunk: Hit, number: int, seen: set[str]) -> dict[str, Any]:
        """One chunk's record; ``seen`` are the questions asked so far, normalised, and grows."""
        decoder, config = self._decoder, self._config
        context = decoder.template.text_ids(chunk.text)
        room = decoder.shape.window - decoder.template_tokens - config.answer_tokens - 128
        context = context[: max(room, 0)]
        # uncompressed, so every question reads all of the text, and it is run only once
        (segment,) = Uncompressed().compress(decoder, context, [1])
        text = assemble([segment], room=Room.of(decoder, config.answer_tokens)).prefix
        dropped: Counter[str] = Counter()
        asked = list(self._fresh(self._ask(text, number), seen, dropped))
        tried = len(asked) + sum(dropped.values())
        kept = list(self._answered(text, asked, dropped))
        questions = [
            {"id": f"{chunk.tenant}/{chunk.doc_id}/{chunk.ordinal}/{index}", "kind": kind, **found}
            for index, (kind, found) in enumerate(kept)
        ]
        return {
            "doc_id": f"{chunk.doc_id}#{chunk.ordinal}",
            "title": chunk.title,
            "text": chunk.text,
            "source": "self-study",
            "questions": questions,
            "tried": tried,
            "dropped": dict(dropped),
        }

    def _ask(self, text: Prefix, number: int) -> list[tuple[str, str]]:
        config = self._config
        kinds = [kind for kind in KINDS for _ in range(config.per_kind)]
        prompts = [Prompt(KINDS[kind], text, verbatim=True) for kind in kinds]
        sampling = GenerateConfig(40, config.temperature, 0.95, seed=1000 * config.seed + number)
        made = self._decoder.generate(prompts, sampling)
        return [(kind, generation.text) for kind, generation in zip(kinds, made, strict=True)] + [("about", _SUMMARY)]

    def _fresh(
        self, asked: Iterable[tuple[str, str]], seen: set[str], dropped: Counter[str]
    ) -> Iterator[tuple[str, str]]:
        """Those that are one question, and a new one."""
        about = set()
        for kind, text in asked:
            question = text.strip().split("\n")[0].strip().strip("\"'")
            if kind != "about":
                end = question.find("?")
                if end < 0 or len(_WORD.findall(question[:end])) < 3:
                    dropped["not a question"] += 1
                    continue
                question = question[: end + 1]
                if _PROMPT.search(question):
                    dropped["about the prompt"] += 1
                    continue
                if _normal(question) in seen:
                    dropped["asked before"] += 1
                    continue
                seen.add(_normal(question))
            if question not in about:
                about.add(question)
                yield kind, question

    def _answered(
        self, text: Prefix, asked: Sequence[tuple[str, str]], dropped: Counter[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Those whose answer the text makes likelier, with the answer and its teacher."""
        decoder, config = self._decoder, self._config
        if not asked:
            return
        prompts = [Prompt(question, text) for _, question in asked]
        answers = decoder.generate(prompts, GenerateConfig(config.answer_tokens))
        ended = [
            (kind, prompt, answer.text.strip())
            for (kind, _), prompt, answer in zip(asked, prompts, answers, strict=True)
            if answer.finish == "stop" and answer.text.strip()
        ]
        dropped["no answer that ends"] += len(asked) - len(ended)
        if not ended:
            return
        texts = [answer for _, _, answer in ended]
        with_text = decoder.answer_losses([prompt for _, prompt, _ in ended], texts)
        without = decoder.answer_losses([Prompt(prompt.question) for _, prompt, _ in ended], texts)
        gains = [(bare - loss) / tokens for (loss, tokens), (bare, _) in zip(with_text, without, strict=True)]
        helped = [(*one, gain) for one, gain in zip(ended, gains, strict=True) if gain >= config.gain]
        dropped["the text does not help"] += len(ended) - len(helped)
        if not helped:
            return
        questions = [prompt.question for _, prompt, _, _ in helped]
        ids = [[*encode(decoder.tokenizer, answer), decoder.end] for _, _, answer, _ in helped]
        for (kind, prompt, answer, gain), teacher in zip(helped, teach(decoder, text, questions, ids), strict=True):
            yield (
                kind,
                {
                    "question": prompt.question,
                    "answers": [answer],
                    "gain": round(gain, 3),
                    "teacher": teacher.to_json(),
                },
            )


def _report(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for record in records:
        dropped.update(record["dropped"])
        kinds.update(question["kind"] for question in record["questions"])
    return {
        "chunks": len(records),
        "chunks_with_questions": sum(bool(record["questions"]) for record in records),
        "questions_tried": sum(record["tried"] for record in records),
        "questions_kept": sum(kinds.values()),
        "kept_by_kind": dict(sorted(kinds.items())),
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
    }


def _normal(question: str) -> str:
    return " ".join(_WORD.findall(question.lower()))
