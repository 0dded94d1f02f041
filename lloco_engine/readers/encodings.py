"""Bytes -> text: a byte order mark, else UTF-8, else the encoding that is declared, else the one that is detected.

A text in another encoding that happens to be valid UTF-8 is next to impossible, and declarations lie, so UTF-8 goes
before them. What is detected is refused unless one decoding is clearly the best: no text is better than a false one.
"""

from __future__ import annotations

import codecs
import re
import unicodedata

from lloco_engine.errors import DocumentError

__all__ = ["UnclearEncoding", "declared_charset", "decode", "find_encoding", "is_wide"]

_MARKS = (  # the longer first: a mark of UTF-32 begins with one of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
_SAMPLE = 64 * 1024  # bytes that an encoding is detected from
_CANDIDATES = (
    "iso2022_jp_2", "gb18030", "big5hkscs", "cp932", "euc_jis_2004", "cp949",
    "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "cp874",
    "iso8859-2", "iso8859-5", "iso8859-6", "iso8859-7", "iso8859-8", "iso8859-15", "iso8859-16", "koi8-r", "koi8-u",
    "mac-roman", "mac-cyrillic", "cp437", "cp850", "cp852", "cp866",
)  # fmt: skip
_SELDOM = {
    "mac-roman",
    "mac-cyrillic",
    "cp437",
    "cp850",
    "cp852",
    "cp866",
    "cp1258",
    "iso8859-15",
    "iso8859-16",
    "iso8859-6",
}
_SELDOM_WEIGHT = 0.9
_CLEAR = 0.9  # the second best decoding must be less likely than this share of the best
_WHOLE = 20  # characters beyond ASCII that are right, for each place in UTF-8 that is not
_DAMAGED = 200  # bytes for each that is a control character, in a text that was damaged and is not binary
_CONTROLS = bytes((*range(9), *range(14, 27), *range(28, 32)))
_ODD_WIDE = 0.02  # of UTF-16 and UTF-32 without a mark
_ODD_WEIGHT = 4  # how much what is odd counts among decodings that are about as likely
_ODD = 0.12  # share of the characters beyond ASCII that may be odd
_ALONE = re.compile(r"(?<![^\W_])[^\W\d_](?![^\W_])")
_WORD = re.compile(r"[^\W\d_]{3,}")
_ENOUGH = 20  # characters beyond ASCII that it takes to doubt a declaration
_WORDS = "àÀáéÉèêíóÓòúùåÅöÖæøØý"
_DECLARED = (
    re.compile(rb"""<meta\b[^>]{0,512}?\bcharset\s{0,16}=\s{0,16}["']?\s{0,16}([\w:.-]{2,40})""", re.IGNORECASE),
    re.compile(rb"""^\s{0,64}<\?xml\b[^>]{0,256}?\bencoding\s{0,16}=\s{0,16}["']([\w:.-]{2,40})["']""", re.IGNORECASE),
)


class UnclearEncoding(DocumentError):
    """No encoding can be told for a text, though it may well be one."""


def decode(data: bytes, *, declared: str = "") -> tuple[str, str]:
    """Bytes as text, and the name of their encoding (Python's; a byte order mark is dropped).

    Args:
        data: a whole text.
        declared: an encoding that the text names itself, as WHATWG labels it; "" for none.

    Raises:
        DocumentError: the bytes are binary, or no encoding can be told for them.
    """
    encoding, mark = find_encoding(data, declared=declared)
    try:
        text = data[mark:].decode(encoding)
        return (text.replace("\0", "\ufffd") if "\0" in text else text), encoding
    except UnicodeDecodeError as error:
        if encoding == "utf-8" and (bad := _damage(data)):
            return data[mark:].decode("utf-8", "replace").replace("\0", "\ufffd"), f"utf-8, {bad} damaged"
        raise DocumentError(
            f"a text must be whole in its encoding, and byte {error.start + mark} is not {encoding} ({error.reason}); "
            "save it as UTF-8"
        ) from error


def find_encoding(data: bytes, *, declared: str = "", whole: bool = True) -> tuple[str, int]:
    """The encoding of a text and the length of its byte order mark.

    Args:
        data: the text, or its beginning.
        declared: an encoding that the text names itself; "" for none.
        whole: False where ``data`` may end in the middle of a character.

    Raises:
        DocumentError: the bytes are binary, or no encoding can be told for them.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding, len(mark)
    if wide := _wide_without_mark(data):
        return wide, 0
    controls = len(data) - len(data.translate(None, _CONTROLS))
    if controls * _DAMAGED > len(data):
        at = next(place for place, byte in enumerate(data) if byte in _CONTROLS)
        what = "NUL; if it is UTF-16, save it as UTF-8" if data[at] == 0 else f"control character {data[at]:#04x}"
        raise DocumentError(f"a text must not be binary, and byte {at} is {what}")
    if data.isascii() and b"\x1b$" not in data:
        return "utf-8", 0
    if not data.isascii() and (_decodes(data, "utf-8", whole) or _damage(data)):
        return "utf-8", 0
    if (named := _codec(declared)) and _decodes(data, named, whole):
        return _unless_false(named, data, whole), 0
    return _detect(data, whole), 0


def _unless_false(named: str, data: bytes, whole: bool) -> str:
    """The encoding that is declared; where nobody writes what it makes of the text, the one that is clear."""
    text = codecs.getincrementaldecoder(named)().decode(_around_high_bytes(data)[:_SAMPLE], final=False)
    strange = [word for word in _WORD.findall(text) if not word.isascii()]
    odd, capitals = _oddness(text), sum(map(str.isupper, strange))  # capitals: KOI8-R and windows-1251 swap case
    false = odd > _ODD or sum(map(_is_mojibake, strange)) * 2 > len(strange) or (odd and capitals * 2 > len(strange))
    if not false or sum(char >= "\x80" for char in text) < _ENOUGH:
        return named
    try:
        return _detect(data, whole)
    except UnclearEncoding:
        return named


def _is_mojibake(word: str) -> bool:
    """Whether a word has letters of the Latin alphabet, and none of those that all its languages write most."""
    return all(char >= "\x80" and _script(char) in ("LATIN", "SIGN", "") for char in word)


def _damage(data: bytes) -> int:
    """How many places of a text that is UTF-8 but for a few are not; 0 where it is not UTF-8 at all."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    beyond = sum(1 for char in text if char >= "\x80") if len(text) < _SAMPLE else len(data) - len(text)
    return bad if 0 < bad * _WHOLE <= beyond else 0


def is_wide(encoding: str) -> bool:
    """Whether a line end of an encoding is more than one byte."""
    return encoding in _WIDE


def declared_charset(data: bytes) -> str:
    """The encoding that HTML or XML names in its first 4,096 bytes; "" for none."""
    head = data[:4096]
    for pattern in _DECLARED:
        if found := pattern.search(head):
            return found[1].decode("ascii", "replace")
    return ""


def _codec(label: str) -> str:
    """Python's codec for a WHATWG label; "" where there is none or it cannot be (a page in ASCII is not UTF-16)."""
    import webencodings

    if not label or (known := webencodings.lookup(label)) is None:
        return ""
    name = {"euc-kr": "cp949", "shift_jis": "cp932", "gbk": "gb18030", "big5": "big5hkscs"}.get(known.name, "")
    name = name or known.codec_info.name
    return "" if name.startswith(("utf-16", "x-user", "replacement")) else name


def _decodes(data: bytes, encoding: str, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(data, final=whole)
    except (UnicodeDecodeError, LookupError):
        return False
    return True


def _wide_without_mark(data: bytes) -> str:
    """UTF-16 or UTF-32 that bears no mark; "" where the bytes are neither."""
    head = data[:_SAMPLE]
    if len(head) < 4 or len(data) % 2:
        return ""
    if b"\0" not in head:
        if head.isascii() or _decodes(head, "utf-8", False):
            return ""
        # Text without a NUL is UTF-16 only where nearly all of it is in one writing system of the East.
        ranked = [name for name in ("utf-16-le", "utf-16-be") if _is_eastern(head[: len(head) // 2 * 2], name)]
        return ranked[0] if len(ranked) == 1 else ""
    for width in (4, 2):
        part = head[: len(head) // width * width]
        if len(data) % width or not part:
            continue
        texts = {}
        for name in (f"utf-{8 * width}-le", f"utf-{8 * width}-be"):
            if _decodes(part, name, False):
                text = part.decode(name, "ignore")
                if "\0" not in text and _oddness(text) <= _ODD_WIDE and _plain(text):
                    texts[name] = text
        # The bytes of the characters' blocks are few; those within a block are many, whichever way they are read.
        blocks = sorted((len({ord(char) >> 8 for char in text}), name) for name, text in texts.items())
        if blocks and (len(blocks) == 1 or blocks[0][0] < blocks[1][0]):
            return blocks[0][1]
    return ""


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "M"


def _plain(text: str) -> bool:
    """Whether a text is mostly letters, digits and spaces below U+3000 or common Han, Kana and Hangul."""
    good = sum(char.isalnum() or char.isspace() or char in ".,;:!?'\"()-/" or _is_mark(char) for char in text)
    blocks = {ord(char) >> 8 for char in text if char.isalpha()}
    return good >= 0.7 * len(text) and (len(blocks) <= 6 or all(0x30 <= block <= 0xD7 for block in blocks if block > 5))


def _is_eastern(data: bytes, encoding: str) -> bool:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return False
    usual = sum(
        "\u3000" <= char <= "\u30ff" or "\u4e00" <= char <= "\u9fa5" or char in "\uff0c\uff01\uff1f" for char in text
    )
    punctuation = sum(char in "\u3002\u3001\uff0c\u306e\u7684\u3092\u306b\u306f\u662f\u4e86\u5728" for char in text)
    return len(text) >= 4 and usual == len(text) and punctuation * 40 >= len(text)


def _detect(data: bytes, whole: bool) -> str:
    import chardet

    sample = data if len(data) <= _SAMPLE else _around_high_bytes(data)
    whole = whole and len(sample) == len(data)
    ranked: list[tuple[float, str, str]] = []
    for found in chardet.detect_all(sample, ignore_threshold=True, compat_names=False, include_encodings=_CANDIDATES):
        name = str(found["encoding"] or "")
        if not name or not _decodes(sample, name, whole):
            continue
        text = codecs.getincrementaldecoder(name)().decode(sample, final=whole)
        if (odd := _oddness(text)) <= _ODD:
            weight = (_SELDOM_WEIGHT if name in _SELDOM else 1.0) * (1 - odd) ** _ODD_WEIGHT
            ranked.append((float(found["confidence"] or 0.0) * weight, name, text))
    ranked.sort(key=lambda entry: -entry[0])
    if ranked:
        score, name, text = ranked[0]
        rival = next((entry for entry in ranked if entry[2] != text), None)
        if rival is None or rival[0] < _CLEAR * score:
            return name
        raise UnclearEncoding(
            f"a text's encoding must be clear, and this one may be {name} or {rival[1]}; save it as UTF-8"
        )
    at = next(place for place, byte in enumerate(sample) if byte > 127) if not sample.isascii() else 0
    raise UnclearEncoding(f"a text must be in an encoding that can be told, and byte {at} fits none; save it as UTF-8")


def _around_high_bytes(data: bytes) -> bytes:
    """A sample with many bytes beyond ASCII, from the first of them on, beginning at a line."""
    first = re.search(rb"[\x80-\xff\x1b]", data)
    start = data.rfind(b"\n", 0, first.start()) + 1 if first else 0
    start = max(start, first.start() - 4096) if first else 0
    return data[start : start + _SAMPLE]


def _oddness(text: str) -> float:
    """Share of a text's characters beyond ASCII that no one writes where they stand.

    Odd are: control and private characters, those that are not assigned, a letter beside one of another alphabet, a
    sign between two letters, a capital after a small letter, and a letter alone that is no word.
    """
    strange = 0
    odd = 0.0
    alone = _ALONE.findall(text)
    odd += sum(char >= "\x80" and char not in _WORDS and _script(char) == "LATIN" for char in alone)
    before, kind = "", ""
    for char in text:
        if char < "\x80":
            if char < " " and char not in "\t\n\r\f\x1b":
                odd += 1
            now = "LATIN" if char.isalpha() else ""
        else:
            strange += 1
            now = _script(char)
            if now == "ODD" or (now == "SIGN" and kind not in ("", "SIGN")):
                odd += 1
        if char >= "\x80" or (before and before >= "\x80"):
            mixed = now and kind and now != kind and not {now, kind} & {"SIGN", "HAN", "ODD"}
            odd += bool(mixed) or (now == kind and char.isupper() and before.islower())
        before, kind = char, now
    return float(odd / max(strange, 1))


def _script(char: str) -> str:
    """The alphabet of a character beyond ASCII ("HAN": of the East); or "SIGN", "ODD", and "" for what is neutral."""
    category = unicodedata.category(char)
    if category in ("Cc", "Cn", "Co", "Cs"):
        return "ODD"
    if category[0] == "L" or category == "Mn":
        name = unicodedata.name(char, "").split(" ")
        word = name[0] if name else ""
        if word in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "HALFWIDTH", "FULLWIDTH", "BOPOMOFO", "KATAKANA-HIRAGANA"):
            return "HAN"
        if category == "Mn" and word == "COMBINING":
            return ""
        return "" if word in ("FEMININE", "MASCULINE") else word
    if category[0] == "S" or char in "\u00b6\u00a7":
        return "SIGN" if char not in "\u20ac\u00b0\u00a3" else ""
    return ""
