"""What the decoder itself expects of an answer when it reads the full text: the targets of distillation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import DocumentError
from lloco_engine.finetune.packing import answer_logits
from lloco_engine.types import Prefix

__all__ = ["TOP_K", "Teacher", "distillation_loss", "read_teachers", "teach"]

TOP_K = 16  # likeliest next tokens that are kept of each distribution


@dataclass(frozen=True)
class Teacher:
    """The likeliest next tokens where each token of an answer stands (its end token is one).

    tokens : (A, k) int64. weights : (A, k) float32, each row sums to 1.
    """

    tokens: torch.Tensor
    weights: torch.Tensor

    def to_json(self) -> list[list[Any]]:
        """One pair a token of the answer: token ids, and their weights."""
        return [
            [ids, [round(weight, 4) for weight in weights]]
            for ids, weights in zip(self.tokens.tolist(), self.weights.tolist(), strict=True)
        ]

    @classmethod
    def from_json(cls, value: Any, where: str) -> Teacher:
        """The inverse of `to_json`.

        Raises:
            DocumentError: it is not of that form; names ``where``.
        """
        try:
            tokens = torch.tensor([ids for ids, _ in value], dtype=torch.int64)
            weights = torch.tensor([row for _, row in value], dtype=torch.float32)
            if tokens.dim() != 2 or tokens.shape != weights.shape or not bool((weights.sum(dim=1) > 0).all()):
                raise ValueError(f"shapes {tuple(tokens.shape)} and {tuple(weights.shape)}")
        except (TypeError, ValueError, RuntimeError) as error:
            raise DocumentError(
                f"{where}: field 'teacher' must be a list of pairs of token ids and weights ({error})"
            ) from error
        return cls(tokens, weights / weights.sum(dim=1, keepdim=True))


@torch.no_grad()
def teach(
    decoder: LocalDecoder, text: Prefix, questions: Sequence[str], answers: Sequence[Sequence[int]]
) -> list[Teacher]:
    """The base weights' expectations over answers (token ids, end token included).

    ``text`` is an uncompressed segment, so that all of it is read, and run only once for all questions.
    """
    prompts = [Prompt(question, text) for question in questions]
    made = answer_logits(decoder, prompts, answers, None)
    top = torch.softmax(made.logits, dim=-1).topk(min(TOP_K, made.logits.shape[-1]), dim=-1)
    weights = (top.values / top.values.sum(dim=-1, keepdim=True)).cpu()
    sizes = [len(answer) for answer in answers]
    parts = zip(torch.split(top.indices.cpu(), sizes), torch.split(weights, sizes), strict=True)
    return [Teacher(tokens, part) for tokens, part in parts]


def distillation_loss(logits: torch.Tensor, teachers: Sequence[Teacher]) -> torch.Tensor:
    """Summed cross-entropy (nats) of logits (A, vocabulary) against the teachers' weights, end to end.

    It differs from the Kullback-Leibler divergence by the teachers' entropy, which no weight changes.
    """
    tokens = torch.cat([teacher.tokens for teacher in teachers]).to(logits.device)
    weights = torch.cat([teacher.weights for teacher in teachers]).to(logits.device)
    return -(weights * torch.log_softmax(logits, dim=-1).gather(1, tokens)).sum()


def read_teachers(path: Path) -> dict[str, Teacher]:
    """The teachers in a file that `lloco self-study` wrote, by question id.

    Raises:
        DocumentError: a line or field is not as it must be; names both.
    """
    found: dict[str, Teacher] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record: Mapping[str, Any] = json.loads(line)
            for index, question in enumerate(record.get("questions", ())):
                where = f"{path}, line {number}: field 'questions[{index}]"
                if "teacher" not in question:
                    raise DocumentError(
                        f"{where}.teacher' is missing; --self-study takes what `lloco self-study` wrote, --data others"
                    )
                if not question.get("id") or question["id"] in found:
                    raise DocumentError(f"{where}.id' must be a text that no other question has")
                found[question["id"]] = Teacher.from_json(question["teacher"], where)
    return found
