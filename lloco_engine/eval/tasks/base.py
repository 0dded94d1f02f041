"""The contract of a task: where its documents come from, how they are asked about, how answers are scored."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lloco_engine.errors import ConfigError
from lloco_engine.eval.data import Group, Question, group_records, read_records

if TYPE_CHECKING:
    from lloco_engine.decoder.local import LocalDecoder

__all__ = ["Task"]


class Task(ABC):
    """Questions about documents, and how they are asked and scored.

    A leaf is one small file: it sets the names below and overrides what differs. Its constructor takes only keyword
    settings, which `settings` gives back JSON-ready.

    name           : what ``--task`` calls it.
    about          : one line for ``--help``.
    scores         : of `lloco_engine.eval.metrics.SCORES`, taken of every generated answer.
    max_new_tokens : longest answer that is generated.
    min_new_tokens : shortest, 0 where the decoder ends it as it likes.
    no_repeat_ngram: tokens of which no run comes twice in an answer; 0 where it may.
    where          : its folder inside the folder of data.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    scores: ClassVar[tuple[str, ...]] = ("f1", "em", "rouge")
    max_new_tokens: ClassVar[int] = 32
    min_new_tokens: ClassVar[int] = 0
    no_repeat_ngram: ClassVar[int] = 0
    where: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {}

    def source(self, folder: Path | None) -> Path | None:
        """Where the task's documents lie in a folder of data; None for a task that has some of its own.

        Raises:
            ConfigError: the task has none of its own, and no folder was given.
        """
        if folder is None:
            raise ConfigError(
                f"task {self.name!r} reads {self.where}/val.jsonl in a folder of data: name it with --data-folder, "
                "or the file itself with --data"
            )
        return folder / self.where / "val.jsonl"

    def groups(
        self, source: Path | None, decoder: LocalDecoder, *, limit: int | None, passages_per_chunk: int, segments: int
    ) -> list[Group]:
        """What is asked about, prompt by prompt.

        Args:
            source: file of records (`lloco_engine.readers.records`).
            decoder: the one that will read; a task that makes its documents to a length counts in its tokens.
            limit: documents to read, None for all.
            passages_per_chunk: consecutive documents whose texts form one chunk.
            segments: consecutive chunks that are compressed apart and placed together.

        Raises:
            DocumentError: the data are not as they must be.
        """
        assert source is not None
        return group_records(read_records(source, limit), passages_per_chunk, segments)

    def ask(self, question: Question) -> str:
        """The text of the question as the decoder is asked it."""
        return question.question

    def options(self, question: Question) -> Sequence[str]:
        """The answers one of which is right, in the form of the gold answer; none where the question is open."""
        return ()
