"""Words of every script, and which windows of a store have them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from store_cases import document, make_store, manifest, put, unit

from lloco_engine.config import StoreConfig
from lloco_engine.keyword_score import words
from lloco_engine.store import Store
from lloco_engine.types import Document


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Pump, the PUMP_7 no. A-113!", ["the", "pump", "7", "no", "a", "113"]),
        ("北方钟表厂。电话八", ["北方", "方钟", "钟表", "表厂", "电话", "话八"]),
        ("第5章 雨", ["第", "5", "章", "雨"]),
        ("時計は", ["時計", "計は"]),
        ("ﾊﾟｿｺﾝ", words("パソコン")),
        ("ポンプ", ["ポン", "ンプ"]),
        ("น้ำมัน", ["น้ํา", "ามั", "มัน"]),  # each character with its marks; NFKC parts sara am
        ("ក្រសួង", ["ក្រ", "រសួ", "សួង"]),
        ("ไทย\u200bคน", words("ไทยคน")),
        ("공장의", ["공장", "장의"]),
        ("\u1100\u1169\u11bc\u110c\u1161\u11bc", ["공장"]),  # the same syllables, written in jamo
        ("क्षेत्र में पंप", ["क्षेत्र", "में", "पंप"]),
        ("২০২৪ ٢٠٢٤ ２０２４", ["2024"]),
        ("المِضَخَّة المضخة المـضخة", ["المضخة"]),
        ("أحمد احمد", ["احمد"]),
        ("می‌خواهم", words("میخواهم")),
        ("הַמַּשְׁאֵבָה המשאבה", ["המשאבה"]),
        ("café cafe\u0301 CAFE", ["cafe"]),
        ("Maße MASSE GROẞ", ["masse", "gross"]),
        ("IĞDIR ığdır", ["igdir"]),
        ("за́мок ёлка елка", ["замок", "елка"]),
        ("йод", ["йод"]),
        ("co\u00adoperate zero\u200bwidth", ["cooperate", "zero", "width"]),
        ("Ｐｕｍｐ１２", ["pump12"]),
        ("Intel™ 5 ㎏", ["intel", "5"]),
        ("北方Pump有限公司", ["北方", "pump", "有限", "限公", "公司"]),
        ("🧑🏽‍🔧 🇩🇪 …", []),
        ("\ud800x", ["x"]),
    ],
)
def test_what_a_word_is(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("text", ["a" * 50_000 + "é", "ก\u200b" * 20_000, "\u0301\u0323" * 30_000, "é ⁇ " * 20_000])
def test_words_take_linear_time(text):
    words(text)  # the square of these would be minutes


LANGUAGES = {
    "Chinese": (
        "{}厂的主任是王建国，电话八八二三。",
        "谁是{}厂的主任",
        "北方钟表|南山茶叶|东港渔业|西岭煤矿",
    ),
    "Japanese": (
        "お知らせ。{}の所長は佐藤です。",
        "{}の所長は誰ですか",
        "北方時計工場|南山茶葉社|東港漁業隊|青石炭鉱",
    ),
    "Thai": (
        "ประกาศ{}มีผู้อำนวยการชื่อสมชาย",
        "ใครเป็นผู้อำนวยการ{}",
        "โรงงานนาฬิกา|โรงเรียนบ้านดอน|ตลาดน้ำขาว|วัดหนองแก",
    ),
    "Khmer": (
        "សេចក្ដីជូនដំណឹង{}មាននាយក",
        "តើនរណាជានាយក{}",
        "រោងចក្រនាឡិកា|ផ្សារទឹកស|សាលាភូមិថ្មី|វត្តភ្នំ",
    ),
    "Korean": (
        "알림. {}은 삼층에 있다.",
        "{}이 어디에 있습니까",
        "북방시계공장|남산찻집|동항어업단|서령탄광",
    ),
    "Hindi": (
        "सूचना। {} का निदेशक राम है।",
        "{} का निदेशक कौन है",
        "घड़ी कारखाना|चाय समिति|मछली दल|कोयला खान",
    ),
    "Arabic": (
        "إعلان. مديرُ {} هو أحمد.",
        "من مدير {}؟",
        "مَصنَع السّاعات|مَدرَسة القَرية|سوق السَّمَك|مَنجَم الفَحم",
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_question_finds_its_notice_by_its_words(language, tmp_path):
    notice, question, names = LANGUAGES[language]
    names = names.split("|")
    with make_store(tmp_path / "s") as store, store.writer() as writer:
        for name in names:
            text = notice.format(name)
            put(writer, Document(name, text), {text[at : at + 10]: unit(0) for at in range(0, len(text), 10)})
    with Store.open(tmp_path / "s") as store:
        for name in names:
            asked = question.format(name.translate(dict.fromkeys(range(0x64B, 0x653))))  # as people type Arabic
            assert store.search(unit(0), top_k=1, question=asked, lexical=0.5)[0].doc_id == name


def hits_of(store, tenant, question, filters=None):
    found = store.search(unit(1), top_k=6, tenant=tenant, question=question, lexical=0.5, filters=filters)
    return [(hit.doc_id, hit.ordinal, hit.score) for hit in found]


@pytest.mark.parametrize("tenant", ["", "red"])
@pytest.mark.parametrize("hnsw_above", [30, 1000])
def test_what_others_hold_does_not_change_a_tenants_scores(tmp_path, monkeypatch, tenant, hnsw_above):
    monkeypatch.setattr("lloco_engine.store.index._MOST_WITH", 15)
    own = [document(f"d{n}", 60, tenant=tenant, part=n % 2) for n in range(8)]
    others = [replace(document(f"d{n}", 60, seed=f"d{n % 4}"), tenant=f"other{n % 3}") for n in range(24)]
    question = "d1001 d2002 d3003 nowhere"
    with Store.create(tmp_path / "s", manifest(), StoreConfig(hnsw_above=hnsw_above)) as store:
        with store.writer() as writer:
            for one in own:
                put(writer, one)
        alone = hits_of(store, tenant, question), hits_of(store, tenant, question, {"part": 1})
        with store.writer() as writer:
            for one in others:
                put(writer, one)
        assert hits_of(store, tenant, question) == alone[0]
        assert hits_of(store, tenant, question, {"part": 1}) == alone[1]
        assert hits_of(store, "another", question) == []


def test_the_words_of_a_window_are_made_from_its_text(tmp_path):
    texts = ["पंप को तेल चाहिए", "Café 北方钟表厂", *(f"word{random.Random(n).random()}" for n in range(5))]
    with make_store(tmp_path / "s") as store, store.writer() as writer:
        for n, text in enumerate(texts):
            put(writer, Document(f"d{n}", text, tenant="red" if n % 2 else ""))
        with store._reading() as catalogue:
            rows = catalogue.connection.execute(
                "SELECT words.text, window_terms(d.tenant, substr(c.text, w.start - c.start + 1, w.end - w.start))"
                " FROM windows w JOIN chunks c USING (chunk_key) JOIN documents d USING (doc_key)"
                " LEFT JOIN words ON words.rowid = w.window_id"
            ).fetchall()
            assert rows and all(stored == made for stored, made in rows)
            (count,) = catalogue.connection.execute("SELECT count(*) FROM words").fetchone()
            assert count == len(rows)
