"""How the documents of evaluation records are grouped into chunks and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lloco_engine.readers.records import Question, Record, read_records

__all__ = ["Group", "Question", "Record", "group_records", "read_records"]

JOINT = "\n\n"  # between the texts of documents that are read as one


@dataclass(frozen=True)
class Group:
    """What one prompt reads: the texts of its chunks, each compressed apart, and every question about any of them.

    ``tags`` name the cell of a grid that the group is of, such as a length and a depth.
    """

    chunks: tuple[str, ...]
    questions: tuple[Question, ...]
    documents: int
    tags: Mapping[str, float] = field(default_factory=dict)


def group_records(records: Sequence[Record], passages_per_chunk: int = 1, segments: int = 1) -> list[Group]:
    """Documents in file order: ``passages_per_chunk`` make a chunk, ``segments`` chunks make a group.

    The last chunk and the last group may be smaller. Groups about which nothing is asked are left out.
    """
    groups = []
    for start in range(0, len(records), passages_per_chunk * segments):
        members = records[start : start + passages_per_chunk * segments]
        chunks = tuple(
            JOINT.join(record.text for record in members[at : at + passages_per_chunk])
            for at in range(0, len(members), passages_per_chunk)
        )
        questions = tuple(question for record in members for question in record.questions)
        if questions:
            groups.append(Group(chunks, questions, len(members)))
    return groups
