"""Pages: from a file through the store to hits, JSON, what `lloco ask` prints, and both frameworks' metadata."""

from __future__ import annotations

import pytest
from store_cases import make_store, put

from lloco_engine.cli.output import hit_json, print_answer_details
from lloco_engine.errors import DocumentError
from lloco_engine.types import Answer, Document, Hit, Page, Span

TEXT = "The pump is in hall three.\n\nThe crane is of 1911.\n\nThe lamp is lit at six."
WHOLE = Span(0, 60)
PAGES = (Page(1, "i", Span(0, 26)), Page(3, "", Span(28, 49)), Page(4, "", Span(51, 74)))


def hit(*windows: Span, span: Span = WHOLE) -> Hit:
    pages = tuple(page for page in PAGES if page.span.start < span.end and span.start < page.span.end)
    return Hit("s", "m.pdf", 0, span, TEXT[span.start : span.end], 9, 1.0, windows, pages=pages)


def test_a_hit_names_the_page_of_its_best_window():
    assert hit().page == PAGES[0]
    assert hit(Span(30, 40), Span(0, 9)).page == PAGES[1]
    assert hit(Span(30, 55)).pages_of(Span(30, 55)) == PAGES[1:]
    assert hit(Span(26, 28)).page is None  # between two pages
    assert Hit("s", "a.txt", 0, Span(0, 1), "x", 1, 1.0).page is None


def test_a_store_keeps_pages_and_encoding(tmp_path):
    document = Document("m.pdf", TEXT, pages=PAGES, encoding="cp1251")
    with make_store(tmp_path / "s", document, Document("plain", "no pages")) as store:
        info = store.document("m.pdf")
        assert (info.encoding, info.pages) == ("cp1251", 3)
        chunks = store.chunks("m.pdf")
        assert len(chunks) > 2
        for chunk in chunks:
            assert chunk.pages == hit(span=chunk.span).pages
        assert store.chunks("plain")[0].pages == ()
        with store.writer() as writer:
            writer.delete_document("m.pdf")


def test_pages_beyond_the_text_are_refused(tmp_path):
    document = Document("m.pdf", TEXT, pages=(Page(1, "", Span(0, len(TEXT) + 1)),))
    refused = pytest.raises(DocumentError, match=r"pages must lie in document 'm\.pdf'")
    with make_store(tmp_path / "s") as store, store.writer() as writer, refused:
        put(writer, document)


def test_pages_are_in_json_and_in_print(capsys):
    found = hit_json(hit(Span(30, 55)))
    assert found["pages"] == [{"page": 1, "page_label": "i"}, *found["windows"][0]["pages"]]
    assert found["windows"][0]["pages"] == [{"page": 3, "page_label": "3"}, {"page": 4, "page_label": "4"}]
    print_answer_details(Answer("a", (hit(Span(0, 9)), hit(Span(30, 55)))))
    printed = capsys.readouterr().out
    assert "[1] m.pdf, p. i, segment 0" in printed
    assert "[2] m.pdf, pp. 3-4, segment 0" in printed


def test_langchain_documents_have_pages():
    documents = pytest.importorskip("lloco_integrations.langchain.documents")
    metadata = documents.from_hit(hit(Span(30, 40))).metadata
    assert (metadata["page"], metadata["page_label"]) == (2, "3")  # LangChain's loaders count from 0
    assert documents.from_hit(hit(Span(0, 9))).metadata["page_label"] == "i"
    assert "page" not in documents.from_hit(Hit("s", "a.txt", 0, Span(0, 1), "x", 1, 1.0)).metadata


def test_llama_index_nodes_have_page_labels():
    retriever = pytest.importorskip("lloco_integrations.llama_index.retriever")
    assert retriever._node(hit(Span(30, 40)), "view", {}).metadata["page_label"] == "3"
    assert "page_label" not in retriever._node(Hit("s", "a.txt", 0, Span(0, 1), "x", 1, 1.0), "view", {}).metadata
