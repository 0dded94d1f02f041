"""Metadata: what it may hold, how it comes back, what of it a batch survives, and what no stored record can break."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import json
import shutil
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import langchain_cases as cases
import numpy as np
import pytest
from langchain_core.documents import Document as LangChainDocument
from langchain_core.prompts import PromptTemplate, format_document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)
from places import GOLDEN

from lloco_engine import ConfigError, Document, GenerateConfig, plain_metadata
from lloco_engine.store import Store
from lloco_integrations import langchain, llama_index
from lloco_integrations.langchain.messages import handle_block

pytestmark = pytest.mark.usefixtures("no_network", "closed_loop")
SHORT = GenerateConfig(max_new_tokens=4)


class NaTType(datetime.datetime):
    """As pandas': a date that is missing."""

    __hash__ = datetime.datetime.__hash__

    def __eq__(self, other):
        return False

    def isoformat(self, *_):
        return "NaT"


class NAType:
    """As pandas': anything that is missing, which cannot even be compared."""

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


class Colour(enum.Enum):
    RED = "red"


class Name(enum.StrEnum):
    ANN = "ann"


@pytest.fixture(scope="module")
def decoder():
    return cases.decoder()


@pytest.fixture
def engine(tmp_path, decoder):
    with cases.open_engine(tmp_path / "store", decoder) as made:
        yield made


KEPT = [
    ("words", "words"),
    (3, 3),
    (2**70, 2**70),
    (True, True),
    (1.5, 1.5),
    (None, None),
    (float("nan"), None),
    (datetime.datetime(2024, 1, 2, 3, 4), "2024-01-02T03:04:00"),
    (datetime.date(2024, 1, 2), "2024-01-02"),
    (Path("a/b.pdf"), "a/b.pdf"),
    (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (decimal.Decimal("1.5"), 1.5),
    (decimal.Decimal("2"), 2),
    (decimal.Decimal("NaN"), None),
    (fractions.Fraction(1, 4), 0.25),
    (Colour.RED, "red"),
    (Name.ANN, "ann"),
    (np.int64(3), 3),
    (np.float32(1.5), 1.5),
    (np.float64("nan"), None),
    (np.datetime64("NaT"), None),
    (np.array([["2024-05-06", "NaT"]], "datetime64[D]"), [["2024-05-06", None]]),
    (NaTType(1, 1, 1), None),
    ([NAType()], [None]),
    (np.bool_(True), True),
    (np.str_("x"), "x"),
    (np.datetime64("2024-01-02"), "2024-01-02"),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (["a", ("b", None)], ["a", ["b", None]]),
    ({3, 1}, [1, 3]),
    (range(3), [0, 1, 2]),
    ({"a": {"b": np.int8(1)}, Name.ANN: []}, {"a": {"b": 1}, "ann": []}),
]


@pytest.mark.parametrize(("value", "kept"), KEPT, ids=lambda value: repr(value)[:30])
def test_common_types_become_json(value, kept):
    (made,) = plain_metadata({"k": value}).values()
    assert json.dumps(made) == json.dumps(kept)  # types too: 1 is not True


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"k": b"x"}, "metadata 'k' must be text, .* not bytes"),
        ({"k": object()}, "not object"),
        ({"k": [{"a": object()}]}, r"metadata 'k'\['a'\]|not object"),
        ({"k": float("inf")}, "a finite number, not inf"),
        ({"k": 2**4000}, "at most 900 digits"),
        ({"k": datetime.timedelta(1)}, "not timedelta"),
        ({"k": np.timedelta64(1, "s")}, "not timedelta64"),
        ({"k": 1j}, "not complex"),
        ({"k": {1: 2}}, "must have text as keys, not 1"),
        ({1: 2}, "must have text as keys, not 1"),
        ({"k": "\udce9"}, "metadata 'k' must be valid Unicode"),
        ({"\udce9": 1}, r"the key '\\udce9' of metadata must be valid Unicode"),
        ({"k": "x" * 1_000_001}, "at most 1,000,000 characters"),
    ],
    ids=range(13),
)
def test_what_has_no_form_in_json_is_refused_by_name(metadata, message):
    with pytest.raises(ConfigError, match=message):
        plain_metadata(metadata)


def test_depth_is_limited():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="at most 32 lists and objects"):
        plain_metadata({"k": loop})


def test_a_batch_keeps_what_is_good_and_names_what_is_not(engine, tmp_path):
    lines = [
        {"doc_id": "list", "text": "one", "tags": ["x", {"name": "y"}], "who": None},
        {"doc_id": "object", "text": "two", "metadata": {"year": 2024}, "questions": [{"question": "?"}]},
        '{"doc_id": "huge", "text": "three", "n": 1' + "0" * 2000 + "}",
        '{"doc_id": "lone", "text": "four", "k\\ud800": 1}',
        {"doc_id": "blank", "text": " "},
        {"doc_id": "good", "text": "five"},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    sources = [
        Document("odd", "six", metadata={"k": object()}),
        source,
        Document("numpy", "seven", metadata={"n": np.int64(7)}),
    ]
    report = engine.ingest(sources)
    assert report.added == ("list", "object", "good", "numpy")
    assert [failure.source for failure in report.failed] == ["odd", *(f"{source}:{line}" for line in (3, 4, 5))]
    assert report.failed[0].doc_id == "odd"
    known = {info.doc_id: info.metadata for info in engine.documents()}
    assert known["list"] == {"tags": ["x", {"name": "y"}], "who": None}
    assert known["object"] == {"metadata": {"year": 2024}}
    assert engine.ingest(sources).unchanged == report.added
    for filters, wanted in (
        ({"tags": "x"}, "list"),
        ({"tags.name": "y"}, "list"),
        ({"metadata.year": 2024}, "object"),
        ({"n": 7}, "numpy"),
    ):
        assert [hit.doc_id for hit in engine.retrieve("one two", filters=filters)] == [wanted]
    changed = engine.ingest(Document("numpy", "seven", metadata={"n": True}))
    assert changed.replaced == ("numpy",)
    with pytest.raises(ConfigError, match="metadata 'k' must be text"):
        engine.ingest([], metadata={"k": object()})


def test_every_door_takes_filters_and_refuses_what_is_none(engine):
    engine.ingest(
        Document(f"d{year}", f"The pump of {year} needs oil.", metadata={"year": year}) for year in (2018, 2020, 2022)
    )
    mapping = {"year": {"$gte": 2020}}
    llama = MetadataFilters(
        filters=[
            MetadataFilter(key="year", value=2020, operator=FilterOperator.GTE),
            MetadataFilters(filters=[MetadataFilter(key="year", value=2018)], condition=FilterCondition.NOT),
        ]
    )
    options = {"generate": SHORT}
    for filters in (mapping, llama):
        assert {hit.doc_id for hit in engine.retrieve("pump", filters=filters)} == {"d2020", "d2022"}
        assert {hit.doc_id for hit in engine.ask("pump?", filters=filters, **options).hits} == {"d2020", "d2022"}
        with engine.stream("pump?", filters=filters, **options) as stream:
            assert {hit.doc_id for hit in stream.hits} == {"d2020", "d2022"}
        store = langchain.LLoCOVectorStore(engine)
        assert {one.id for one in store.similarity_search("pump", filter=filters)} == {"d2020", "d2022"}
        assert {one.id for one in store.max_marginal_relevance_search("pump", filter=filters)} == {"d2020", "d2022"}
        found = store.as_retriever(search_kwargs={"filter": filters}).invoke("pump")
        assert {one.metadata["lloco_doc_id"] for one in found} == {"d2020", "d2022"}
        retriever = langchain.LLoCORetriever(engine=engine, filters=filters)
        assert {one.metadata["lloco_doc_id"] for one in retriever.invoke("pump")} == {"d2020", "d2022"}
        both = retriever.invoke("pump", filters={"year": [2018, 2022]})
        assert [one.metadata["lloco_doc_id"] for one in both] == ["d2022"]
        nodes = llama_index.LLoCORetriever(engine, filters=filters).retrieve("pump")
        assert {node.node.source_node.node_id for node in nodes} == {"d2020", "d2022"}
    compared = engine.compare("pump?", filters=mapping, **options)
    assert {hit.doc_id for hit in compared["lloco"].hits} == {"d2020", "d2022"}
    bad = {"year": {"$near": 2020}}
    for door in (
        lambda: engine.retrieve("pump", filters=bad),
        lambda: engine.ask("pump?", filters=bad),
        lambda: engine.stream("pump?", filters=bad),
        lambda: engine.compare("pump?", filters=bad),
        lambda: langchain.LLoCOVectorStore(engine).similarity_search("pump", filter=bad),
        lambda: langchain.LLoCORetriever(engine=engine, filters=bad).invoke("pump"),
        lambda: llama_index.LLoCORetriever(engine, filters=bad).retrieve("pump"),
        lambda: llama_index.LLoCOVectorStore(engine).query(VectorStoreQuery(query_str="pump", filters=bad)),
    ):
        with pytest.raises(ConfigError, match=r"'\$near'"):
            door()
    with pytest.raises(ConfigError, match="not 'where'"):
        langchain.LLoCOVectorStore(engine).similarity_search("pump", where={"year": 2020})


def test_nodes_are_filtered_inside_the_search_and_come_back_whole(engine):
    store = llama_index.LLoCOVectorStore(engine)
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="report", metadata={"n": np.int64(3)})}
    metadata = {
        "year": np.int64(2020),
        "tags": ["a", "b"],
        "deep": {"k": [1]},
        "doc_id": "mine",
        "title": "T",
        "source": 7,
    }
    kept = {"year": 2020, "tags": ["a", "b"], "deep": {"k": [1]}, "doc_id": "mine", "title": "T", "source": 7}
    node = TextNode(
        text="The pump stands.", id_="n1", metadata=metadata, relationships=source, excluded_llm_metadata_keys=["year"]
    )
    other = TextNode(text="The crane stands.", id_="n2", metadata={"year": 2021})
    assert store.add([node, other]) == ["n1", "n2"]
    engine.ingest(Document("plain", "The pump of another making.", metadata={"year": 2020}))
    (got,) = store.get_nodes(["n1"])
    assert got.metadata == kept and got.ref_doc_id == "report" and got.excluded_llm_metadata_keys == ["year"]

    def asked(key, value, operator=FilterOperator.EQ, **more) -> list[str]:
        filters = MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])
        result = store.query(VectorStoreQuery(query_str="pump", similarity_top_k=5, filters=filters, **more))
        assert set(result.ids) == {one.node_id for one in store.get_nodes(filters=filters)} or more
        return result.ids

    assert asked("year", 2020) == asked("tags", "a", FilterOperator.CONTAINS) == asked("title", "T") == ["n1"]
    assert asked("year", [2020, 2021], FilterOperator.IN, doc_ids=["report"]) == ["n1"]
    assert asked("year", [2020, 2021], FilterOperator.IN, node_ids=["n2", "n3"]) == ["n2"]
    assert asked("ref_doc_id", "report") == asked("doc_id", "mine") == ["n1"]
    assert asked("year", 2020, FilterOperator.NE) == ["n2"]
    store.delete("report")
    assert [one.node_id for one in store.get_nodes()] == ["n2"] and engine.documents()[-1].doc_id == "plain"


def test_a_pipeline_goes_on_past_what_cannot_be_stored(engine):
    store = llama_index.LLoCOVectorStore(engine)
    pipeline = IngestionPipeline(transformations=[llama_index.LLoCOTransform(engine)], vector_store=store)
    bad = TextNode(text="x y", id_="bad", metadata={"k": b"bytes"})
    nodes = [TextNode(text=f"The pump {n} stands.", id_=f"n{n}") for n in range(3)]
    with pytest.warns(UserWarning, match="1 of 4 documents could not be added: bad: metadata 'k' must be text"):
        pipeline.run(nodes=[*nodes, bad])
    assert [info.doc_id for info in engine.documents()] == ["n0", "n1", "n2"]


HOSTILE_KEYS = [
    "langchain", "_node", "_node_content", "_node_type", "ref_doc_id", "document_id", "doc_id", "id", "id_", "tenant",
    "page_content", "metadata", "private", "lloco_handle", "lloco_score", "lloco_doc_id", "lloco_segments",
    "lloco_span", "llama_index.node", "llama_index.ref", "\1pllama_index.node", "windows", "group", "relationships",
    "text_template",
]  # fmt: skip
HOSTILE_VALUES = [
    None,
    True,
    0,
    -1.5,
    "",
    "text",
    "{",
    "[]",
    "{}",
    '{"id_": "h0", "metadata": {}}',
    [],
    ["a", 1],
    {},
    {"a": {"b": None}},
]


def hostile_records(path: Path) -> dict[str, dict[str, Any]]:
    """A JSON Lines file in which every key comes with every value, and the metadata of each of its documents."""
    records = {}
    for number, value in enumerate(HOSTILE_VALUES):
        named = {key: value for key in HOSTILE_KEYS if key not in ("doc_id", "metadata")} | {"metadata": value}
        records[f"h{number}"] = named
    lines = [
        json.dumps({"doc_id": doc_id, "text": f"The pump number {doc_id} stands.", **named})
        for doc_id, named in records.items()
    ]
    path.write_text("\n".join(lines))
    return records


def test_no_stored_record_can_break_a_reader(engine, tmp_path):
    records = hostile_records(tmp_path / "hostile.jsonl")
    index = llama_index.LLoCOVectorStore(engine)
    index.add([TextNode(text="The pump of ours stands.", id_="ours", metadata={"year": 2020})])
    report = engine.ingest(tmp_path / "hostile.jsonl")
    assert not report.failed and len(report.added) == len(records)
    assert {info.doc_id: info.metadata for info in engine.documents() if info.doc_id != "ours"} == records

    store = langchain.LLoCOVectorStore(engine)
    for document in store.similarity_search("pump stands", k=99):
        assert document.id == "ours" or records[document.id].items() <= document.metadata.items()
        assert document.page_content.startswith("The pump")
    for document in store.get_by_ids(list(records)):
        assert document.metadata == {**records[document.id], "source": document.metadata["source"]}
    for annotate in (False, True):
        retriever = langchain.LLoCORetriever(engine=engine, k=99, annotate=annotate)
        found = retriever.invoke("pump stands")
        assert {document.id.partition("#")[0] for document in found} == {"ours", *records}
        for document in found:
            handle_block(document)  # the handle is ours, whatever the record says it is
            template = PromptTemplate.from_template("{lloco_handle}" if annotate else "{page_content}")
            assert format_document(document, template).startswith("[[LLC:")

    assert index.query(VectorStoreQuery(query_str="pump stands", similarity_top_k=99)).ids == ["ours"]
    assert [node.node_id for node in index.get_nodes()] == ["ours"]
    nodes = llama_index.LLoCORetriever(engine, top_k=99).retrieve("pump stands")
    assert {node.node.source_node.node_id for node in nodes} == {"ours", *records}
    for node in nodes:
        assert "LLC" in node.node.get_content("llm") and node.node.get_content("all")
    index.delete("h0")
    index.delete_nodes(["h1"])
    index.clear()
    assert {info.doc_id for info in engine.documents()} == set(records)
    assert engine.ask("pump?", generate=SHORT).hits


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_framework_documents_with_odd_keys_come_back(engine, key):
    store, index = langchain.LLoCOVectorStore(engine), llama_index.LLoCOVectorStore(engine, tenant="nodes")
    metadata = {key: {"a": ["x", None]}}
    store.add_documents([LangChainDocument(page_content="The pump stands.", metadata=metadata, id="a")])
    index.add([TextNode(text="The pump stands.", id_="a", metadata=metadata)])
    assert store.similarity_search("pump")[0].metadata == store.get_by_ids(["a"])[0].metadata == metadata
    (node,) = index.query(VectorStoreQuery(query_str="pump", similarity_top_k=3)).nodes
    assert node.metadata == index.get_nodes()[0].metadata == metadata


def golden(folder: Path) -> Path:
    """A copy of a store as the first release made it."""
    shutil.copytree(GOLDEN / "store_v1_float16", folder)
    connection = sqlite3.connect(folder / "catalogue.sqlite")
    connection.executescript((folder / "catalogue.sql").read_text(encoding="utf-8"))
    connection.close()
    (folder / "catalogue.sql").unlink()
    return folder


def test_metadata_of_former_stores_is_taken_over(tmp_path):
    path = golden(tmp_path / "s")
    connection = sqlite3.connect(path / "catalogue.sqlite")
    first, second = "first", "second"
    for doc_id, key in ((first, 3), (second, 2)):
        connection.execute("UPDATE documents SET doc_id = ?, tenant = 't' WHERE doc_key = ?", (doc_id, key))
    node = {"id_": first, "metadata": {"year": 2020, "tags": ["x"], "title": "T"}, "start_char_idx": 3}
    former = {
        first: {"year": 2020, "ref_doc_id": "report", "_node": json.dumps(node)},
        second: {"page": 3, "langchain": json.dumps({"tags": ["y"], "none": None})},
    }
    for doc_id, metadata in former.items():
        connection.execute("UPDATE documents SET metadata = ? WHERE doc_id = ?", (json.dumps(metadata), doc_id))
    connection.commit()
    connection.close()
    with Store.open(path) as store:
        one, other = store.load_documents([first, second], "t")
        assert one.metadata == {"year": 2020, "tags": ["x"]}
        assert one.private == {
            "llama_index.id": first,
            "llama_index.ref": "report",
            "llama_index.node": {"id_": first, "start_char_idx": 3},
        }
        assert other.metadata == {"page": 3, "tags": ["y"], "none": None} and other.private == {}
        assert store.find_documents({"tags": ["x", "y"], "year": {"$exists": True}}, "t") == [first]
        assert store.find_documents({"ref_doc_id": {"$exists": True}}, "t") == []


@pytest.mark.parametrize("value", [*HOSTILE_VALUES, '{"id_": "other", "metadata": {}}', "[" * 5000, '{"a": NaN}'])
def test_what_merely_has_the_names_of_frameworks_in_a_former_store_stays_data(tmp_path, value):
    path = golden(tmp_path / "s")
    metadata = {"_node": value, "ref_doc_id": value, "langchain": "no JSON"}
    connection = sqlite3.connect(path / "catalogue.sqlite")
    connection.execute("UPDATE documents SET metadata = ?", (json.dumps(metadata),))
    connection.commit()
    connection.close()
    with Store.open(path) as store:
        infos = store.documents()
        assert infos and all(info.metadata == metadata for info in infos)
        assert {one.doc_id for one in store.load_documents([info.doc_id for info in infos]) if one.private} == set()
