"""One row of an evaluation on one group: every question asked, its gold answer's loss taken, its answer scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.local import Prompt
from lloco_engine.errors import DocumentError
from lloco_engine.eval import metrics
from lloco_engine.eval.data import Question
from lloco_engine.eval.methods import Method
from lloco_engine.eval.reading import Reader, Reading
from lloco_engine.eval.tasks.base import Task
from lloco_engine.tokenizing import encode

if TYPE_CHECKING:
    from lloco_engine.eval.engines import GroupEngines
    from lloco_engine.types import Prefix

__all__ = ["Scorer"]

_ROWS = 16  # questions run together at most
_LOGITS = 1 << 28  # bytes that one layer's attention logits may take


class Scorer:
    """Asks and scores.

    Args:
        task: how questions are asked and answers scored.
        reader: makes the prompts.
        generate: how answers are generated.
        answers: also generate answers and score them.
    """

    def __init__(self, task: Task, reader: Reader, generate: GenerateConfig, *, answers: bool) -> None:
        self.task, self.reader, self.decoder = task, reader, reader.decoder
        self.generate, self.answers = generate, answers

    def measure(self, about: GroupEngines, method: Method, ratio: float | None, adapter: str | None) -> dict[str, Any]:
        """A row's values of every question, JSON-ready.

        Returns:
            ``questions``: of each its ``loss`` (sum over the ``tokens`` of the gold answer, in nats), the scores of
            its answer, what its prompt held, and the answer's ``text``; ``left_out``: the tokens of text that did not
            fit, of each prompt with text; ``hints``: the names of those that answers had; ``seconds``.
        """
        began = time.perf_counter()
        questions = about.group.questions
        values: list[dict[str, Any]] = [{} for _ in questions]
        left_out = []
        hinted = False
        asked, tails = [self.task.ask(question) for question in questions], [self._tail(each) for each in questions]
        for reading in self.reader.readings(about, method, ratio, adapter, asked, tails):
            if reading.text_tokens:
                left_out.append(reading.left_out)
            hinted = hinted or any(prompt.draft for prompt in reading.prompts)
            size = self._rows([questions[n] for n in reading.numbers], reading.prompts[0].prefix)
            for at in range(0, len(reading.numbers), size):
                numbers, prompts = reading.numbers[at : at + size], reading.prompts[at : at + size]
                batch = self._score([questions[n] for n in numbers], prompts, reading, adapter)
                for number, value in zip(numbers, batch, strict=True):
                    values[number] = value
        return {
            "questions": values,
            "left_out": left_out,
            "hints": list(self.generate.hint_weights) if hinted and self.answers else [],
            "seconds": time.perf_counter() - began,
        }

    def _score(
        self, questions: Sequence[Question], prompts: Sequence[Prompt], reading: Reading, adapter: str | None
    ) -> list[dict[str, Any]]:
        prefix = prompts[0].prefix
        values = [
            {
                "prompt_tokens": len(self.decoder.template.question_ids(prompt.question)) + reading.text_tokens,
                "prompt_slots": prefix.slots - reading.text_tokens if prefix is not None else 0,
                "source_tokens": prefix.source_tokens if prefix is not None else 0,
            }
            for prompt in prompts
        ]
        for value, scored in zip(values, self._gold(questions, prompts, adapter), strict=True):
            value.update(scored)
        if self.answers:
            made = self.decoder.generate(prompts, self.generate, adapter)
            for question, value, generation in zip(questions, values, made, strict=True):
                value.update(self._answer(question, generation.text))
        return values

    def _gold(
        self, questions: Sequence[Question], prompts: Sequence[Prompt], adapter: str | None
    ) -> list[dict[str, Any]]:
        """Losses of the gold answers; where there are options, whether the gold one is the likeliest per token."""
        asked, candidates = [], []
        choices = [list(self.task.options(question)) for question in questions]
        for question, prompt, options in zip(questions, prompts, choices, strict=True):
            for candidate in options or [question.answers[0]]:
                asked.append(prompt)
                candidates.append(candidate)
        losses: list[tuple[float, int]] = []
        for at in range(0, len(asked), len(prompts)):
            part = slice(at, at + len(prompts))
            losses += self.decoder.answer_losses(asked[part], candidates[part], adapter)
        scored, at = [], 0
        for question, options in zip(questions, choices, strict=True):
            gold = _gold_number(question, options) if options else 0
            of_options = losses[at : at + max(1, len(options))]
            at += len(of_options)
            loss, tokens = of_options[gold]
            value: dict[str, Any] = {"loss": loss, "tokens": tokens}
            if options:
                likeliest = min(range(len(options)), key=lambda n: of_options[n][0] / of_options[n][1])
                value["accuracy"] = float(likeliest == gold)
            scored.append(value)
        return scored

    def _answer(self, question: Question, text: str) -> dict[str, Any]:
        value: dict[str, Any] = {"text": text}
        for name in self.task.scores:
            value |= metrics.SCORES[name](text, question.answers)
        if options := self.task.options(question):
            value["accuracy_generated"] = float(metrics.choice(text, options) == _gold_number(question, options))
        return value

    def _tail(self, question: Question) -> int:
        """Tokens that may follow the prefix: the question, and the longest of its answers."""
        candidates = [*self.task.options(question), question.answers[0]]
        longest = max(len(encode(self.decoder.tokenizer, text)) + 1 for text in candidates)
        asked = len(self.decoder.template.question_ids(self.task.ask(question)))
        return asked + max(longest, self.generate.max_new_tokens)

    def _rows(self, questions: Sequence[Question], prefix: Prefix | None) -> int:
        """Questions to run together: few enough that the attention logits of a layer stay small."""
        tokens = max(self._tail(question) for question in questions)
        width = self.decoder.template_tokens + tokens
        if prefix is not None:  # heads are ragged: the longest counts
            width += sum(int(segment.lengths.max()) for segment in prefix.compact)
        return max(1, min(_ROWS, _LOGITS // (4 * self.decoder.shape.query_heads * tokens * width)))


def _gold_number(question: Question, options: Sequence[str]) -> int:
    gold = question.answers[0].strip()
    for number, option in enumerate(options):
        if option.strip() == gold:
            return number
    raise DocumentError(
        f"the gold answer of a multiple-choice question must be one of its options ({' | '.join(options)}), "
        f"not {gold!r}: question {question.id or question.question!r}"
    )
