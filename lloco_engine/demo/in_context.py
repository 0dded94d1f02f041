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
from lloco_engine.baselines import read_once, room_for_text, whole
from lloco_engine.config import GenerateConfig
from lloco_engine.types import Answer, Prefix, Usage
from lloco_engine.usage import usage_of

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["InContext"]


class InContext:
    """Answers from raw text, as `lloco_engine.baselines.in_context` would give them, many over one text.

    Reading a full window takes longer than all the rest of the demo. The text is therefore read once with each adapter,
    as a prefix, and the seconds of that count in every question's time to first token, as they would if each question
    came alone. Answers are kept in a file, with the times that were measured when they were made.

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
        self.text = whole(decoder, texts, min(room_for_text(decoder, question, generate) for question in questions))
        self._kept = _read(file)
        self._prefixes: dict[str, tuple[Prefix, float]] = {}  # by adapter

    def ask(self, question: str, adapter: str = "none") -> tuple[Answer, bool]:
        """The answer with an adapter, and whether it was kept from an earlier run."""
        key = self._key(question, adapter)
        if key in self._kept:
            try:
                kept = dict(self._kept[key])
                usage = Usage(**kept["usage"])
                return Answer(kept["text"], usage=usage, finish=kept["finish"], adapter=adapter), True
            except (KeyError, TypeError, ValueError):
                pass  # of an earlier form
        answer = self._answer(question, adapter)
        self._kept[key] = {"text": answer.text, "usage": asdict(answer.usage), "finish": answer.finish}
        write_file(self._file, json.dumps(self._kept, indent=1))
        return answer, False

    def _key(self, question: str, adapter: str) -> str:
        decoder = self._decoder
        parts = [decoder.fingerprint, decoder.template.fingerprint, str(decoder.runner.device), str(self.text.ids)]
        parts += [question, adapter, json.dumps(self._generate.to_json())]
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:32]

    def _answer(self, question: str, adapter: str) -> Answer:
        from lloco_engine.decoder.local import Prompt

        decoder = self._decoder
        prefix, read_s = self._prefix(adapter)
        prompt = Prompt(question, prefix, draft=decoder.tokenizer.decode(self.text.ids))
        generation, pieces = decoder.stream(prompt, self._generate, adapter)
        for _ in pieces:
            pass
        usage = usage_of(decoder, generation, before_s=read_s)
        usage = replace(usage, prompt_tokens=usage.prompt_tokens + len(self.text.ids))
        return Answer(generation.text, usage=usage, finish=generation.finish or "stop", adapter=adapter)

    def _prefix(self, adapter: str) -> tuple[Prefix, float]:
        """The text read with an adapter, and the seconds that it took."""
        if adapter not in self._prefixes:
            self._say(f"reading {len(self.text.ids):,} tokens of text in context, once for all questions ...")
            began = time.perf_counter()
            prefix = read_once(self._decoder, self.text.ids, adapter)
            self._prefixes[adapter] = prefix, time.perf_counter() - began
        return self._prefixes[adapter]


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
