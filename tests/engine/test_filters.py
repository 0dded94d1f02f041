"""Filters: what is understood and what is refused, what it means, and that it holds inside the search."""

from __future__ import annotations

import datetime
import decimal
import enum
import pathlib
import random
import sqlite3
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
from store_cases import document, make_store, unit

from lloco_engine import Condition, ConfigError, Not, parse_filter
from lloco_engine.filters import MAX_CONDITIONS, MAX_DEPTH
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.values import encode


class Colour(enum.Enum):
    RED = "red"


METADATA = {
    "int": {"n": 2020, "kind": "a", "ok": True, "when": "2024-01-02", "tags": ["red", "blue"]},
    "text": {"n": "2020", "kind": "A", "ok": "true", "when": "2023-12-31T10:00:00", "tags": "red"},
    "float": {"n": 2020.5, "kind": "b", "ok": 1, "tags": []},
    "negative": {"n": -3, "kind": "ünï", "ok": False, "tags": [1, 2.5], "deep": {"a": {"b": [7]}}},
    "big": {"n": 2**70 + 1, "kind": "", "none": None, "deep.a.b": 8, "deep": {"c": "x"}},
    "bare": {},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    documents = [document(name, 20, **values) for name, values in METADATA.items()]
    path = tmp_path_factory.mktemp("filters") / "s"
    with make_store(path, *documents, document("int", 20, tenant="other", n=2020)) as made:
        yield made


def found(store, filters) -> set[str]:
    """What a filter lets through, by the search and by the look-up, which must agree."""
    hits = store.search(unit(0), top_k=50, filters=filters)
    assert {hit.tenant for hit in hits} <= {""}
    ids = store.find_documents(filters)
    assert ids == sorted({hit.doc_id for hit in hits})
    return set(ids)


EVERY = set(METADATA)


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (None, EVERY),
        ({}, EVERY),
        ({"n": 2020}, {"int"}),
        ({"n": 2020.0}, {"int"}),
        ({"n": "2020"}, {"text"}),
        ({"n": np.int64(2020)}, {"int"}),
        ({"n": decimal.Decimal("2020.5")}, {"float"}),
        ({"n": 2**70 + 1}, {"big"}),
        ({"n": 2**70}, set()),
        ({"n": {"$eq": 2020}}, {"int"}),
        ({"n": {"$ne": 2020}}, EVERY - {"int"}),
        ({"n": {"$gt": 2020}}, {"float", "big"}),
        ({"n": {"$gte": 2020}}, {"int", "float", "big"}),
        ({"n": {"$lt": -2.5}}, {"negative"}),
        ({"n": {"$lte": 2020.5}}, {"int", "float", "negative"}),
        ({"n": {"$gt": 2**70}}, {"big"}),
        ({"n": {"$gte": "2"}}, {"text"}),
        ({"n": {"$gt": -5, "$lt": 2021}}, {"int", "float", "negative"}),
        ({"n": {"$between": [-3, 2020]}}, {"int", "negative"}),
        ({"n": [2020, "2020"]}, {"int", "text"}),
        ({"n": {2020, -3}}, {"int", "negative"}),
        ({"n": range(2019, 2022)}, {"int"}),
        ({"n": np.array([2020, -3])}, {"int", "negative"}),
        ({"n": {"$in": [2020, -3]}}, {"int", "negative"}),
        ({"n": {"$in": []}}, set()),
        ({"n": {"$nin": [2020, "2020"]}}, EVERY - {"int", "text"}),
        ({"n": {"$nin": []}}, EVERY),
        ({"n": {"$exists": False}}, {"bare"}),
        ({"none": {"$exists": True}}, set()),
        ({"tags": {"$exists": True}}, {"int", "text", "negative"}),
        ({"deep": {"$exists": True}}, {"negative", "big"}),
        ({"n": {"$not": {"$gt": 0}}}, {"text", "negative", "bare"}),
        ({"n": {"$not": 2020}}, EVERY - {"int"}),
        ({"ok": True}, {"int"}),
        ({"ok": 1}, {"float"}),
        ({"ok": "true"}, {"text"}),
        ({"ok": {"$ne": False}}, EVERY - {"negative"}),
        ({"kind": "A"}, {"text"}),
        ({"kind": "ünï"}, {"negative"}),
        ({"kind": ""}, {"big"}),
        ({"kind": {"$gt": "a"}}, {"float", "negative"}),
        ({"kind": Colour.RED}, set()),
        ({"tags": Colour.RED}, {"int", "text"}),
        ({"tags": "red"}, {"int", "text"}),
        ({"tags": {"$ne": "red"}}, EVERY - {"int", "text"}),
        ({"tags": ["blue", 2.5]}, {"int", "negative"}),
        ({"tags": {"$gt": 1}}, {"negative"}),
        ({"tags": {"$contains": "re"}}, {"text"}),  # a part of a text, but a whole element of a list
        ({"tags": {"$contains": "red"}}, {"int", "text"}),
        ({"tags": {"$contains": 1}}, {"negative"}),
        ({"n": {"$contains": 2020}}, set()),  # no list
        ({"tags": {"$all": ["red", "blue"]}}, {"int"}),
        ({"when": {"$gte": datetime.date(2024, 1, 1)}}, {"int"}),
        ({"when": {"$lt": datetime.datetime(2024, 1, 1)}}, {"text"}),
        ({"deep.a.b": 7}, {"negative"}),
        ({"deep.a.b": [7, 8]}, {"negative", "big"}),
        ({"deep.c": "x"}, {"big"}),
        ({"doc_id": "int"}, {"int"}),
        ({"doc_id": {"$in": ["int", "bare", "nobody"]}}, {"int", "bare"}),
        ({"doc_id": {"$gt": "i"}}, {"int", "text", "negative"}),
        ({"doc_id": {"$ne": "int"}}, EVERY - {"int"}),
        ({"doc_id": {"$contains": "ar"}}, {"bare"}),
        ({"source": "int.txt", "title": "Title of int"}, {"int"}),
        ({"title": {"$exists": True}}, EVERY),
        ({"$and": [{"n": {"$gt": 0}}, {"kind": "b"}]}, {"float"}),
        ({"$or": [{"n": 2020}, {"kind": "b"}]}, {"int", "float"}),
        ({"$not": {"n": 2020}}, EVERY - {"int"}),
        ({"$not": {"n": 2020, "kind": "a"}}, EVERY - {"int"}),
        ({"$or": [{"$and": [{"n": 2020}, {"ok": True}]}, {"$not": {"n": {"$exists": True}}}]}, {"int", "bare"}),
        ({"kind": "a", "$or": [{"n": 1}, {"n": 2020}]}, {"int"}),
        (Not(Condition("n", "exists")), {"bare"}),
    ],
)
def test_what_filters_mean(store, filters, wanted):
    assert found(store, filters) == wanted


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"n": {"gte": 2020}}, r"operator on 'n' must be one of \$eq, .*, not 'gte': write '\$gte'"),
        ({"n": {"$like": "2%"}}, r"must be one of .*, not '\$like'"),
        ({"n": {"a": 2020}}, r"for the value 'a' of an object, the key is 'n.a'"),
        ({"n": {7: 1}}, "not 7"),
        ({"n": {}}, "must have a value or an operator"),
        ({"n": {"$gt": True}}, "must compare with a number or text, not True"),
        ({"n": {"$gt": [1]}}, r"must have one value, not \[1\]"),
        ({"n": {"$eq": [1]}}, r"must have one value, not \[1\]: use \$in"),
        ({"n": {"$in": 1}}, "must have a list of values for 'in', not 1"),
        ({"n": {"$in": "abc"}}, "must have a list of values for 'in', not 'abc'"),
        ({"n": {"$in": [[1]]}}, r"must have text, numbers or booleans, not \[1\]"),
        ({"n": {"$exists": 1}}, "must be True or False, not 1"),
        ({"n": {"$between": [1]}}, "must have a list of the least and the most"),
        ({"n": {"$all": []}}, "must have at least one value"),
        ({"n": None}, r"must not compare with None or NaN: use \{'\$exists': False\}"),
        ({"n": float("nan")}, "must not compare with None"),
        ({"n": {"$lt": float("inf")}}, "must be a finite number, not inf"),
        ({"n": b"x"}, "the filter on 'n' must be text, .*, not bytes"),
        ({"n": lambda document: True}, "not function"),
        ({"n": "caf\udce9"}, "must be valid Unicode"),
        ({"caf\udce9": 1}, "must be valid Unicode"),
        ({"n": "a\0b"}, "character 1 is NUL"),
        ({"doc_id": ["a", "a\0b"]}, "character 1 is NUL"),
        ({7: 1}, "keys must be text, not 7"),
        ({"$where": "1"}, r"are \$and, \$or and \$not, not '\$where'"),
        ({"$gte": 5}, "an operator goes below its key"),
        ({"$and": []}, r"\$and must have a list of at least one filter"),
        ({"$or": {"n": 1}}, r"\$or must have a list"),
        ({"$or": [{"n": 1}, None]}, r"\$or must have a filter"),
        ({"$not": {}}, r"\$not must have a filter"),
        ("n = 2020", "must be a mapping such as"),
        ([("n", 2020)], "must be a mapping such as"),
        (lambda document: True, "must be a mapping such as"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(store, filters, message):
    with pytest.raises(ConfigError, match=message):
        store.search(unit(0), top_k=1, filters=filters)


def llama(key, operator, value=None):
    return SimpleNamespace(key=key, operator=operator, value=value)


def several(*parts, condition="and"):
    return SimpleNamespace(filters=list(parts), condition=condition)


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (llama("n", "==", 2020), {"int"}),
        (llama("n", "!=", 2020), EVERY - {"int"}),
        (llama("n", ">", 2020), {"float", "big"}),
        (llama("n", "<=", -3), {"negative"}),
        (llama("n", "in", [2020, -3]), {"int", "negative"}),
        (llama("n", "nin", [2020, -3]), EVERY - {"int", "negative"}),
        (llama("tags", "contains", "red"), {"int", "text"}),
        (llama("tags", "any", ["blue", 2.5]), {"int", "negative"}),
        (llama("tags", "all", ["blue", "red"]), {"int"}),
        (llama("when", "text_match", "12-31T"), {"text"}),
        (llama("kind", "text_match", "a"), {"int"}),
        (llama("kind", "text_match_insensitive", "A"), {"int", "text"}),
        (llama("kind", "text_match_insensitive", "ÜN"), {"negative"}),
        (llama("title", "text_match_insensitive", "OF BIG"), {"big"}),
        (llama("kind", "is_empty"), {"big", "bare"}),
        (llama("tags", "is_empty"), {"float", "big", "bare"}),
        (several(), EVERY),
        (several(llama("n", ">", 0), llama("kind", "==", "b")), {"float"}),
        (several(llama("n", "==", 2020), llama("kind", "==", "b"), condition="or"), {"int", "float"}),
        (several(llama("n", "==", 2020), llama("kind", "==", "b"), condition="not"), EVERY - {"int", "float"}),
        (several(several(llama("n", ">", 0), llama("ok", "==", 1)), llama("n", "<", 0), condition="or"),
         {"float", "negative"}),
    ],
)  # fmt: skip
def test_filters_in_the_form_of_llama_index(store, filters, wanted):
    assert found(store, filters) == wanted


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (llama("n", "near", 1), "the operator on 'n' must be one of ==, .*, not 'near'"),
        (llama("n", "text_match", 1), "must look for text, not 1"),
        (llama(7, "==", 1), "must be text, not 7"),
        (llama("n", "==", None), "must not compare with None"),
        (several(llama("n", "==", 1), condition="xor"), "must be and, or, or not, not 'xor'"),
        (several("n == 1"), "must be a mapping"),
    ],
)
def test_what_llama_index_has_and_we_do_not_is_refused_by_name(store, filters, message):
    with pytest.raises(ConfigError, match=message):
        store.find_documents(filters)


def test_filters_agree_with_a_slow_reference(tmp_path):
    dice = random.Random(3)
    values = [0, 1, -1, 2, 1.5, -1.5, 2**60, 2**60 + 1, float(2**60), "", "a", "b", "ab", "1", True, False]

    def holds(metadata, key, operator, value):
        given = metadata.get(key, [])
        given = given if isinstance(given, list) else [given]
        kind = {str: str, bool: bool}.get(type(value), float)
        alike = [one for one in given if {str: str, bool: bool}.get(type(one), float) is kind]
        tests = {"$eq": lambda a, b: a == b, "$gt": lambda a, b: a > b, "$gte": lambda a, b: a >= b,
                 "$lt": lambda a, b: a < b, "$lte": lambda a, b: a <= b}  # fmt: skip
        if operator == "$ne":
            return value not in alike
        return any(tests[operator](one, value) for one in alike)

    documents = [
        document(
            f"d{n}",
            20,
            **{
                key: dice.choice([*values, [dice.choice(values), dice.choice(values)]])
                for key in "xyz"
                if dice.random() < 0.7
            },
        )
        for n in range(60)
    ]
    with make_store(tmp_path / "s", *documents) as store:
        for _ in range(300):
            terms = []
            for _ in range(dice.randint(1, 3)):
                operator = dice.choice(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"])
                value = dice.choice(values[:-2] if operator not in ("$eq", "$ne") else values)
                terms.append((dice.choice("xyz"), operator, value, dice.random() < 0.3))
            word = dice.choice(["$and", "$or"])
            parts = [{key: {op: value}} for key, op, value, _ in terms]
            parts = [{"$not": part} if term[3] else part for part, term in zip(parts, terms, strict=True)]
            join = all if word == "$and" else any
            wanted = {
                one.doc_id for one in documents
                if join(holds(one.metadata, *term[:3]) != term[3] for term in terms)
            }  # fmt: skip
            assert set(store.find_documents({word: parts})) == wanted, {word: parts}


@pytest.mark.parametrize(
    "key",
    ["a.b", "a'b", 'a"b', "a]b", "a;--", "x' OR 1=1 --", "a$b", "ключ", "名前", "🙂", " ", "", "a\nb", "%",
     "\1p", "\1pllama_index.ref"],
)  # fmt: skip
def test_odd_keys_and_values_are_data(tmp_path, key):
    documents = [document("odd", 20, **{key: key}), document("plain", 20, k=1)]
    with make_store(tmp_path / "s", *documents) as store:
        assert store.find_documents({key: key}) == store.find_documents({key: {"$contains": key}}) == ["odd"]
        assert store.find_documents({key: {"$ne": key}}) == ["plain"]
        assert store.find_documents({key: {"$exists": True}}) == ["odd"]
        assert store.find_documents({"k": [key, "'); DROP TABLE metadata; --"]}) == []
        assert store.find_documents() == ["odd", "plain"]


def test_what_a_program_keeps_for_itself_is_out_of_reach(tmp_path):
    from dataclasses import replace

    private = {"owner.id": "x", "owner.body": {"deep": 1}}
    with make_store(tmp_path / "s", replace(document("a", 20, n=1), private=private), document("b", 20)) as store:
        for key in ("owner.id", "\1powner.id", "private.owner.id", "owner.body"):
            assert store.find_documents({key: {"$exists": True}}) == []
        assert store.find_documents(Condition("owner.id", "in", ("x",), private=True)) == ["a"]
        assert store.find_documents(Condition("owner.body", "exists", private=True)) == ["a"]
        (known,) = store.load_documents(["a"])
        assert known.private == private and known.metadata == {"n": 1}
        assert store.search(unit(0), top_k=9, filters={"n": 1})[0].metadata == {"n": 1}


def test_the_limits_are_stated(store):
    deep: dict = {"n": 1}
    for _ in range(MAX_DEPTH + 1):
        deep = {"$and": [deep]}
    loop: dict = {}
    loop["$not"] = loop
    for nested in (deep, loop, {"n": {"$not": loop}}):
        with pytest.raises(ConfigError, match=f"at most {MAX_DEPTH} deep"):
            store.find_documents(nested)
    wide = {"$or": [{"n": n} for n in range(MAX_CONDITIONS)]}
    assert store.find_documents(wide) == []
    wide["$or"].append({"n": 2020})
    with pytest.raises(ConfigError, match="at most 1,000 conditions, not 1,001"):
        store.find_documents(wide)


def test_many_ids_are_one_parameter(store):
    many = [f"nobody{n}" for n in range(300_000)]
    few = store._catalogue.connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
    try:
        for key, own in (("doc_id", "int"), ("source", "int.txt"), ("title", "Title of int"), ("kind", "a")):
            assert found(store, {key: [*many, own]}) == {"int"}
            assert found(store, {key: {"$nin": [*many, own]}}) == EVERY - {"int"}
        assert found(store, {"n": range(300_000)}) == {"int"}
        assert [one.doc_id for one in store.load_documents([*many[:2000], "int", *many[:2000], "int"])] == ["int"]
    finally:
        store._catalogue.connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, few)


def test_limits_of_sqlite_are_no_damage(store):
    from lloco_engine import StoreCorrupt, StoreError

    with pytest.raises(StoreError) as caught, store._reading() as catalogue:
        catalogue.connection.execute(f"SELECT {','.join('?' * 300_000)}", [0] * 300_000)
    assert not isinstance(caught.value, StoreCorrupt) and "too many" in str(caught.value)
    assert store.verify() == []


def test_the_same_filter_is_looked_up_once_however_it_is_written(store, monkeypatch):
    seen = []
    former = Catalogue.allowed_window_ids
    monkeypatch.setattr(
        Catalogue, "allowed_window_ids", lambda self, wanted: seen.append(wanted) or former(self, wanted)
    )
    for filters in (
        {"n": [7, 8], "kind": "a"},
        {"kind": "a", "n": (8, 7, 8)},
        {"$and": [{"n": {"$in": [7.0, 8]}}, {"kind": {"$eq": "a"}}]},
    ):
        store.search(unit(0), top_k=1, filters=filters)
    assert len(seen) == 1
    store.search(unit(0), top_k=1, filters={"n": ["7", 8], "kind": "a"})
    store.search(unit(0), top_k=1, tenant="other", filters={"n": [7, 8], "kind": "a"})
    assert len(seen) == 3


def test_values_sort_as_text_as_they_do_themselves():
    dice = random.Random(1)
    numbers = [0, -0.0, 1, -1, 0.1, 0.30000000000000004, 5e-324, -5e-324, 1.7e308, -1.7e308, 2**53, 2**53 + 1, 10**899]
    numbers += [dice.choice([1, -1]) * dice.random() * 10 ** dice.randint(-20, 20) for _ in range(300)]
    numbers += [dice.randint(-(10**30), 10**30) for _ in range(300)]
    for one in dice.sample(numbers, 100):
        for other in numbers:
            assert (encode(one) < encode(other)) == (one < other) and (encode(one) == encode(other)) == (one == other)
    distinct = ["1", 1, True, "true", 1.5, "1.5", "", "s:", False, 0, -1, 10**30, "\0", "\1", "\1\1", "\0\1"]
    assert len({encode(value) for value in distinct}) == len(distinct)


def test_types_of_python_are_those_of_metadata():
    for value, kept in ((pathlib.Path("a/b"), "a/b"), (uuid.UUID(int=1), str(uuid.UUID(int=1))), (Colour.RED, "red")):
        assert parse_filter({"k": value}) == Condition("k", "in", (kept,))
