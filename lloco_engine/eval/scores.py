"""What the scores of search tell: the floor below which no document seems to answer, and what follow-ups find.

Nothing is compressed and no decoder is loaded: engines that are only searched hold the documents, with the embedder and
the chunks of the defaults.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from lloco_engine.config import RetrieveConfig
from lloco_engine.decoder.facts import DecoderFacts
from lloco_engine.demo import documents_folder, hard_questions, questions
from lloco_engine.embedder import Embedder, Encodes
from lloco_engine.engine import Engine
from lloco_engine.eval.engines import Blank, filled
from lloco_engine.readers import read_paths
from lloco_engine.types import Document, Hit, Turn

__all__ = ["MOST_REFUSED", "measure"]

MOST_REFUSED = 0.05  # of the questions that a store answers, how many may be below the floor
_STEPS = 100  # floors that are tried


@dataclass(frozen=True)
class _Questions:
    """Questions to one store: whether it answers them, and the best score of each."""

    name: str
    answered: bool
    scores: tuple[float, ...]

    def below(self, floor: float) -> int:
        return sum(score < floor for score in self.scores)

    def row(self, floor: float) -> dict[str, Any]:
        ranked = sorted(self.scores)
        return {
            "questions": self.name,
            "answered": self.answered,
            "count": len(ranked),
            "lowest": ranked[0],
            "median": median(ranked),
            "highest": ranked[-1],
            "below_floor": self.below(floor),
            "below": {f"{step / 20:.2f}": self.below(step / 20) for step in range(2, 11)},
        }


class _Searched:
    """An engine to search only, and what questions find in it."""

    def __init__(self, folder: Path, decoder: DecoderFacts, embedder: Encodes, documents: Iterable[Document]) -> None:
        facts: Any = decoder  # has what is read of a decoder
        engine = Engine.open(folder, decoder=facts, embedder=embedder, compressor=Blank())
        self.engine = filled(engine, documents)

    def scores(self, name: str, answered: bool, texts: Sequence[str]) -> _Questions:
        return _Questions(name, answered, tuple(self.engine.retrieve(text, top_k=1)[0].score for text in texts))

    def close(self) -> None:
        self.engine.close()


def measure(data: Path | None = None, embedder: str = "embedded", decoder: str = "embedded") -> dict[str, Any]:
    """Ask questions that stores answer and questions that they cannot answer, and choose the floor between them.

    The floor is the highest of two digits below which there are at most `MOST_REFUSED` of the questions that the stores
    answer.

    Args:
        data: JSON Lines of documents with their questions, as `lloco eval --data` reads them; None: the demo alone.
        embedder: gives the vectors.
        decoder: whose tokens chunks and windows are counted in; its weights are not loaded.

    Returns:
        JSON-ready: the floor, a row for each set of questions, and what follow-ups find.
    """
    facts, made = DecoderFacts.of(decoder), Embedder(embedder)
    hard = hard_questions()
    asked = [question.question for question in questions()]
    documents = _documents(read_paths([documents_folder()]))
    with TemporaryDirectory() as folder, closing(_Searched(Path(folder, "demo"), facts, made, documents)) as demo:
        sets = [
            demo.scores("the demo's own, to the demo", True, asked),
            demo.scores("near misses, to the demo", False, hard["near"]),
            demo.scores("of the world, to the demo", False, hard["foreign"]),
        ]
        follow_ups = _follow_ups(demo, hard["follow_ups"])
        if data is not None:
            sets += _of_data(Path(folder), facts, made, demo, asked, hard["foreign"], data)
    floor = _floor([each for each in sets if each.answered])
    return {
        "embedder": made.name,
        "embedder_fingerprint": made.fingerprint,
        "lexical": RetrieveConfig.lexical,
        "most_refused": MOST_REFUSED,
        "floor": floor,
        "rows": [each.row(floor) for each in sets],
        "follow_ups": follow_ups,
    }


def _documents(items: Iterable[object]) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def _of_data(
    folder: Path,
    facts: DecoderFacts,
    embedder: Encodes,
    demo: _Searched,
    asked: Sequence[str],
    foreign: Sequence[str],
    data: Path,
) -> list[_Questions]:
    """Questions of a file of documents: to a store of all, to one of every second document, and to the demo."""
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    documents = [Document(record["doc_id"], record["text"], title=record.get("title", "")) for record in records]
    own = [[each["question"] for each in record["questions"]] for record in records]
    every = [text for texts in own for text in texts]
    name = data.parent.name
    with (
        closing(_Searched(folder / "whole", facts, embedder, documents)) as whole,
        closing(_Searched(folder / "half", facts, embedder, documents[::2])) as half,
    ):
        return [
            whole.scores(f"{name}'s own, to all of {name}", True, every),
            half.scores(
                f"{name}'s of the other half, to half of {name}", False, [text for texts in own[1::2] for text in texts]
            ),
            whole.scores(f"the demo's, to {name}", False, asked),
            whole.scores(f"of the world, to {name}", False, foreign),
            demo.scores(f"{name}'s, to the demo", False, every),
        ]


def _floor(answered: Sequence[_Questions]) -> float:
    """The highest floor that refuses few enough of any set of questions that a store answers."""
    floors = (step / _STEPS for step in range(_STEPS, -1, -1))
    few = (floor for floor in floors if all(one.below(floor) <= MOST_REFUSED * len(one.scores) for one in answered))
    return next(few, -1.0)


def _follow_ups(demo: _Searched, follow_ups: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """What follow-ups find, and questions about something new, by the way that they are searched for.

    ``document_first`` counts those whose document is that of the best hit, ``evidence_in_4`` those of whose four hits
    one holds the sentence that answers.
    """
    every = questions()
    others = [every[(number + 7) % len(every)] for number in range(len(every))]
    changes = [
        {"before": other.question, "question": one.question, "doc_id": one.doc_id, "evidence": one.evidence}
        for one, other in zip(every, others, strict=True)
        if one.doc_id != other.doc_id
    ]

    def search(text: str, *before: Turn) -> list[Hit]:
        return demo.engine.retrieve(text, top_k=4, history=before)

    ways: dict[str, Callable[[Mapping[str, str]], list[Hit]]] = {
        "alone": lambda case: search(case["question"]),
        "after the turn before": lambda case: search(f"{case['before']}\n{case['question']}"),
        "both, the better score": lambda case: search(case["question"], Turn("user", case["before"])),
    }
    rows = []
    for name, cases in (("follow-ups", follow_ups), ("changes of topic", changes)):
        for way, find in ways.items():
            found = [(case, find(case)) for case in cases]
            rows.append(
                {
                    "questions": name,
                    "searched": way,
                    "count": len(cases),
                    "document_first": sum(hits[0].doc_id == case["doc_id"] for case, hits in found),
                    "evidence_in_4": sum(any(case["evidence"] in hit.text for hit in hits) for case, hits in found),
                }
            )
    return rows
