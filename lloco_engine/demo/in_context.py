"""The demo's in-context baseline: the whole folder read once per run, its answers kept for the next run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine.atomic import write_file
from lloco_engine.baselines import keep_ends, room_for_text, text_ids
from lloco_engine.config import GenerateConfig
from lloco_engine.types import Answer, Prefix, Usage
from lloco_engine.usage import usage_of

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["InContext"]


class InContext:
    """Answers from raw text, as `lloco_engine.baselines.in_context` would give them, many over one text.

    Reading a full window takes longer than all the rest of the demo. The text is therefore read once, into an
    uncompressed segment, and the seconds of that count in every question's time to first token, as they would if each
    question came alone. Answers are kept in a file, with the times that were measured when they were made.

    Args:
        decoder: the decoder that LLoCO's answers come from.
        texts: documents, joined by blank lines and cut in the middle to fit the window.
        questions: all that will be asked; room is left for the longest.
        generate: how tokens are chosen.
        file: where answers are kept.
        say: called with a line before the text is read.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        texts: Sequence[str],
        questions: Sequence[str],
        generate: GenerateConfig,
        file: Path,
        say: Callable[[str], None],
    ) -> None:
        self._decoder, self._generate, self._file, self._say = decoder, generate, file, say
        ids = text_ids(decoder, "\n\n".join(texts))
        self.ids = keep_ends(ids, min(room_for_text(decoder, question, generate) for question in questions))
        self.total_tokens = len(ids)
        self._kept = _read(file)
        self._read_once: tuple[Prefix, float] | None = None

    def ask(self, question: str) -> tuple[Answer, bool]:
        """The answer, and whether it was kept from an earlier run."""
        key = self._key(question)
        if key in self._kept:
            try:
                kept = dict(self._kept[key])
                return Answer(kept["text"], usage=Usage(**kept["usage"]), finish=kept["finish"]), True
            except (KeyError, TypeError, ValueError):
                pass  # of an earlier form
        answer = self._answer(question)
        self._kept[key] = {"text": answer.text, "usage": asdict(answer.usage), "finish": answer.finish}
        write_file(self._file, json.dumps(self._kept, indent=1))
        return answer, False

    def _key(self, question: str) -> str:
        decoder = self._decoder
        parts = [decoder.fingerprint, decoder.template.fingerprint, str(decoder.runner.device), str(self.ids), question]
        parts.append(json.dumps(self._generate.to_json()))
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:32]

    def _answer(self, question: str) -> Answer:
        from lloco_engine.decoder.local import Prompt

        decoder = self._decoder
        prefix, read_s = self._prefix()
        draft = decoder.tokenizer.decode(self.ids)
        generation, pieces = decoder.stream(Prompt(question, prefix, draft=draft), self._generate)
        for _ in pieces:
            pass
        usage = usage_of(decoder, generation, before_s=read_s)
        usage = replace(usage, prompt_tokens=usage.prompt_tokens + len(self.ids))
        return Answer(generation.text, usage=usage, finish=generation.finish or "stop")

    def _prefix(self) -> tuple[Prefix, float]:
        """The text as a segment of which nothing was left out, and the seconds that reading it took."""
        if self._read_once is None:
            from lloco_engine.compress import registry

            self._say(f"reading {len(self.ids):,} tokens of text in context, once for all questions ...")
            began = time.perf_counter()
            (segment,) = registry.get("uncompressed").compress(self._decoder, self.ids, [1])
            seconds = time.perf_counter() - began
            start = self._decoder.template_tokens + len(self.ids)
            self._read_once = Prefix((segment,), (0,), start), seconds
        return self._read_once


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
