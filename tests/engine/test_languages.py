"""Notices in five languages, each with one question: how many are found first, and among the four that are read.

``python tests/engine/test_languages.py`` prints the figures of docs/languages.md: made-up notices and the embedded
embedder.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(next(place for place in Path(__file__).parents if place.name == "tests")))

from store_cases import manifest, segment, tokens

from lloco_engine.config import RetrieveConfig
from lloco_engine.embedder import Embedder
from lloco_engine.retrieve import Retriever
from lloco_engine.store import Store
from lloco_engine.types import Chunk, Document, Span

# language: (eight places, five kinds of works, notice, question); a notice is of one place and one kind
LANGUAGES = {
    "Chinese": (
        "北方 南山 东港 西岭 白河 青石 金沙 红旗",
        "钟表厂 茶叶社 渔业队 煤矿 面粉厂",
        "通知。{place}{works}的仓库在{n}号楼，电话是{number}。每月{day}日检查设备，全体人员必须到场签字，不得缺席。",
        "{place}{works}的电话是多少？",
    ),
    "Japanese": (
        "北方 南山 東港 西岭 白河 青石 金沙 赤城",
        "時計工場 製茶所 漁業組合 炭鉱 製粉所",
        "お知らせ。{place}{works}の倉庫は{n}号棟、電話は{number}番です。毎月{day}日に設備を点検し、全員が署名しなければなりません。",
        "{place}{works}の電話番号は何番ですか",
    ),
    "Thai": (
        "ดอนเมือง บางนา หนองแก ท่าเรือ บ้านไร่ สวนหลวง เขาใหญ่ แม่สาย",
        "โรงงานนาฬิกา สหกรณ์ชา กองประมง เหมืองถ่านหิน โรงสีข้าว",
        "ประกาศ{works}{place}มีคลังสินค้าอยู่ที่อาคาร{n} หมายเลขโทรศัพท์{number} ตรวจอุปกรณ์ทุกวันที่{day}ของเดือน พนักงานทุกคนต้องลงชื่อ",
        "หมายเลขโทรศัพท์ของ{works}{place}คืออะไร",
    ),
    "Hindi": (
        "रामपुर सीतापुर गंगानगर नीलगिरि सोनपुर लालगढ़ हरिपुर चंदनपुर",
        "घड़ी कारखाना,चाय समिति,मछली केंद्र,कोयला खदान,आटा मिल",
        "सूचना। {place} {works} का गोदाम भवन {n} में है और टेलीफोन {number} है। हर महीने की {day} तारीख को जाँच होती है।",
        "{place} {works} का टेलीफोन नंबर क्या है?",
    ),
    "Arabic": (
        "الشَّمال الجَنوب المَيناء الوادي النَّهر الجَبَل الرَّمل القَلعة",
        "مَصنَع السّاعات,تَعاونيّة الشّاي,فِرقة الصَّيد,مَنجَم الفَحم,مَطحَنة الدَّقيق",
        "إعلان. مَخزَنُ {works} في {place} يَقَعُ في المَبنى {n} ورَقمُ الهاتِفِ {number}. تُفحَصُ المُعَدّات في اليَوم {day} من كُلِّ شَهر.",
        "ما رقم هاتف {works} في {place}؟",
    ),
}
_VOWELS = dict.fromkeys(range(0x64B, 0x653))


def notices(language: str) -> list[tuple[str, str]]:
    """Forty notices with a question each; who asks writes Arabic without vowels."""
    places, works, notice, question = LANGUAGES[language]
    names = list(product(places.split(), works.split(",") if "," in works else works.split()))
    return [
        (
            notice.format(place=place, works=kind, n=n + 3, number=8800 + n * 7, day=n % 28 + 1),
            question.format(place=place, works=kind).translate(_VOWELS),
        )
        for n, (place, kind) in enumerate(names)
    ]


def found(language: str, folder: Path, embedder: Embedder) -> tuple[int, int]:
    """How many of forty questions find their notice first, and among four."""
    texts = notices(language)
    with Store.create(folder / language, manifest(embedder_dim=embedder.dim)) as store:
        with store.writer() as writer:
            for n, (text, _) in enumerate(texts):
                chunk = Chunk(str(n), 0, Span(0, len(text)), text, tokens(text), (Span(0, len(text)),))
                name = writer.segment_id("", chunk.token_ids)
                stats = [writer.save_segment(name, segment(text))]
                vectors = [embedder.encode([text])]
                writer.put_document(Document(str(n), text), [chunk], [name], vectors, seconds=0.0, segment_stats=stats)
        retriever = Retriever(store, embedder)
        hits = [retriever.retrieve(question, RetrieveConfig(top_k=4)) for _, question in texts]
    ranks = [[hit.doc_id for hit in of_one] for of_one in hits]
    first = sum(rank[0] == str(n) for n, rank in enumerate(ranks))
    return first, sum(str(n) in rank for n, rank in enumerate(ranks))


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_notices_are_found_in_languages_that_the_embedder_does_not_know(language, tmp_path):
    first, among_four = found(language, tmp_path, Embedder())
    assert first >= 36 and among_four >= 39


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for language in LANGUAGES:
            print(language, *found(language, Path(folder), Embedder()))
