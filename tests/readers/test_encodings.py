"""Encodings: what is declared or marked is honoured, what is clear is detected, what is not is refused."""

from __future__ import annotations

import pytest

from lloco_engine.errors import DocumentError
from lloco_engine.readers.encodings import declared_charset, decode
from lloco_engine.readers.read import read_paths

RUSSIAN = "Ключи лежат на полке возле окна, их нельзя забирать домой."
FRENCH = "Le café de l'hôtel ouvre à six heures, même l'été."
CHINESE = "钥匙放在窗边的架子上，请不要拿走。水泵每月需要加油。"
JAPANESE = "鍵は窓のそばの棚にあります。ポンプには油が必要です。"
KOREAN = "열쇠는 창문 옆 선반 위에 있습니다. 펌프는 기름이 필요합니다."
GREEK = "Τα κλειδιά βρίσκονται στο ράφι δίπλα στο παράθυρο."


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (RUSSIAN, "cp866"),
        (FRENCH, "cp1252"),
        (GREEK, "cp1253"),
        (CHINESE, "gb18030"),
        (CHINESE, "utf-16-le"),
        (CHINESE, "utf-16-be"),
        (GREEK, "utf-16-le"),
        (GREEK, "utf-16-be"),
        (RUSSIAN, "utf-16-be"),
        (JAPANESE, "cp932"),
        (JAPANESE, "euc_jp"),
        (JAPANESE, "iso2022_jp"),
        (KOREAN, "cp949"),
        (FRENCH, "utf-16-le"),
        (FRENCH, "utf-32-be"),
    ],
)
def test_a_clear_encoding_is_detected(text, encoding):
    assert decode(text.encode(encoding))[0] == text


POLISH = "Klucz leży na półce przy oknie. Pompa stoi w trzeciej hali, żółta, świeżo malowana."
THAI = "กุญแจอยู่บนชั้นข้างหน้าต่าง ปั๊มต้องใช้น้ำมัน"


@pytest.mark.parametrize(("text", "encoding"), [(POLISH, "cp1250"), (THAI, "utf-16-le"), (THAI, "cp874")])
def test_marks_and_odd_signs_tell_encodings_apart(text, encoding):
    assert decode(text.encode(encoding))[0] == text


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [
        (RUSSIAN, "cp1251", "iso-8859-1"),
        (RUSSIAN, "koi8-r", "windows-1251"),
        (RUSSIAN, "cp1251", "koi8-r"),
        (GREEK, "cp1253", "windows-1252"),
        (JAPANESE, "cp932", "iso-8859-1"),
        (KOREAN, "cp949", "iso-8859-1"),
        (THAI, "cp874", "iso-8859-1"),
        (CHINESE, "gb18030", "iso-8859-1"),
        (FRENCH, "utf-8", "iso-8859-1"),
    ],
)
def test_a_declaration_that_nobody_can_have_meant_is_not_followed(text, encoding, declared):
    assert decode(text.encode(encoding), declared=declared)[0] == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(FRENCH, "cp1252"), (POLISH, "iso8859-2"), (RUSSIAN.upper(), "cp1251"), (RUSSIAN.upper(), "koi8-r"),
     ("ÄÖÜ äöü a×b÷c", "cp1252"), (GREEK, "iso8859-7"), (KOREAN, "cp949"), ("đường phố", "cp1258")],
)  # fmt: skip
def test_a_declaration_that_is_right_is_followed(text, encoding):
    data = text.encode(encoding, "ignore")
    assert decode(data, declared=encoding)[0] == data.decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides(encoding):
    assert decode("né".encode(encoding))[0] == "né"


@pytest.mark.parametrize(
    ("page", "label"),
    [
        (b"<meta charset=gb2312>", "gb2312"),
        (b"<META HTTP-EQUIV='Content-Type' CONTENT='text/html; charset=windows-1251'>", "windows-1251"),
        (b"<?xml version='1.0' encoding='iso-8859-1'?><p>", "iso-8859-1"),
        (b"<p>", ""),
    ],
)
def test_a_page_declares_its_encoding(page, label):
    assert declared_charset(page) == label


def test_a_declaration_decides_what_alone_is_unclear_unless_it_lies():
    assert decode(b"\xe9", declared="iso-8859-2")[0] == "é"
    assert decode("né".encode(), declared="iso-8859-1") == ("né", "utf-8")
    assert decode(RUSSIAN.encode("cp1251"), declared="utf-8")[0] == RUSSIAN
    assert decode(b"n\xe9", declared="utf-16")[0] == "né"


def test_few_damaged_places_are_shown_as_such_and_noted():
    whole = ("café " * 30).encode()
    assert decode(whole + b"\xff") == ("café " * 30 + "\ufffd", "utf-8, 1 damaged")
    assert decode(b"x" * 500 + b"\0" + b"y" * 500) == ("x" * 500 + "\ufffd" + "y" * 500, "utf-8")


@pytest.mark.parametrize("data", [bytes(range(256)) * 8, b"\x7fELF\x02\x01\x01" + b"\0" * 64, b"\xef\xbb\xbfa\xff"])
def test_what_is_no_text_is_refused(data):
    with pytest.raises(DocumentError):
        decode(data)


def test_what_may_be_two_texts_is_refused_by_name():
    with pytest.raises(DocumentError, match=r"may be \S+ or \S+; save it as UTF-8"):
        decode(b'{"text": "\xa1"}')


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1251"])
def test_records_are_read_in_their_encoding(tmp_path, encoding):
    lines = '{"doc_id": "a", "text": "' + RUSSIAN + '"}\n\n{"doc_id": "b", "text": "\u040a"}\n'
    (tmp_path / "r.jsonl").write_bytes(lines.encode(encoding))  # U+040A holds the byte of a line end
    first, second = read_paths([tmp_path / "r.jsonl"])
    assert (first.doc_id, first.text) == ("a", RUSSIAN)
    assert first.encoding.replace("-", "").startswith(encoding.removesuffix("-sig").replace("-", "")[:5])
    assert (second.doc_id, second.source) == ("b", f"{tmp_path}/r.jsonl:3")
