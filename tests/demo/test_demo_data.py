"""The demo's corpus and questions hold together: what a question says is in its document is there."""

from __future__ import annotations

from collections import Counter

import pytest

from lloco_engine import demo
from lloco_engine.readers import read_paths
from lloco_engine.types import Document

QUESTIONS = demo.questions()


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    found = list(read_paths([demo.documents_folder()]))
    assert all(isinstance(item, Document) for item in found), found
    return {document.doc_id: document for document in found}


def test_the_corpus_is_long_and_of_several_kinds(documents):
    words = sum(len(document.text.split()) for document in documents.values())
    assert words * 1.25 > 20_000  # tokens, by a rate below that of any tokenizer in use
    assert {path.suffix for path in demo.documents_folder().iterdir()} == {".md", ".txt", ".html", ".jsonl"}
    assert sum(len(document.text.split()) > 2000 for document in documents.values()) >= 4
    assert all(document.text.strip() for document in documents.values())


def test_no_passage_is_repeated(documents):
    """Repeated text would make compression look better than it is."""
    lines = Counter(
        line.strip() for document in documents.values() for line in document.text.splitlines() if len(line.split()) > 8
    )
    assert not [line for line, times in lines.items() if times > 1]


def test_there_are_24_questions_over_all_documents(documents):
    assert len(QUESTIONS) == 24
    assert len({question.id for question in QUESTIONS}) == 24
    assert {question.doc_id for question in QUESTIONS} == set(documents)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)
def test_evidence_is_verbatim_and_holds_each_answer(question, documents):
    text = documents[question.doc_id].text
    assert text.count(question.evidence) == 1
    assert question.question.endswith("?")
    assert question.answers
    for answer in question.answers:
        assert answer in question.evidence
        assert 1 <= len(answer.split()) <= 8
        assert answer not in question.question


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)
def test_only_one_document_has_the_evidence(question, documents):
    assert [doc_id for doc_id, document in documents.items() if question.evidence in document.text] == [question.doc_id]
