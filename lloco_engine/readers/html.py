"""HTML -> the text that a browser shows. The tree is built as the HTML standard says, so no broken page loses text.

Left out is what a browser does not show: see `visibility` for styles, `_UNSEEN` for elements. ``<noscript>`` counts
where it is not closed, or where a page has no other text. An ``alt`` counts for a picture of a formula only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lloco_engine.errors import DocumentError
from lloco_engine.readers.encodings import declared_charset, decode
from lloco_engine.readers.parsed import Parsed
from lloco_engine.readers.visibility import Look, Styles

if TYPE_CHECKING:
    from selectolax.lexbor import LexborHTMLParser, LexborNode

__all__ = ["parse_html", "text_of_html"]

_UNSEEN = {
    "head", "script", "style", "template", "iframe", "noembed", "audio", "video", "canvas", "datalist", "rp",
    "annotation", "annotation-xml", "mphantom", "defs", "symbol", "clippath", "mask", "marker", "pattern", "desc",
    "metadata",
}  # fmt: skip
_FALLBACK = {"noscript", "noframes"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "center", "dd", "details", "dialog", "dir", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr",
    "html", "legend", "listing", "main", "menu", "nav", "ol", "p", "plaintext", "pre", "section", "summary", "table",
    "textarea", "ul", "xmp",
}  # fmt: skip
_LINES = {"br", "li", "tr", "option", "caption", "mtr", "text"}
_LINES_AFTER = {"select", "text", "svg"}
_VERBATIM = {"pre", "textarea", "xmp", "listing", "plaintext"}
_BETWEEN = {  # what a formula's parts are joined by
    "msup": ("^",), "msub": ("_",), "msubsup": ("_", "^"), "mover": ("^",), "munder": ("_",), "munderover": ("_", "^"),
    "mfrac": ("/",), "mroot": (", ",),
}  # fmt: skip
_RAW = ("title", "textarea", "iframe", "xmp", "noembed", "noframes")  # swallow a page whole when they are not closed
_SHOWN_RAW = ("title", "textarea", "xmp")  # whose text counts, up to the next tag
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"}
_CLOSES_ITSELF = {"p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "option", "optgroup", "rt", "rp",
                  "colgroup", "html", "head", "body"}  # fmt: skip
_TAG = re.compile(r"<(/?)([A-Za-z][^\s/>]{0,64})")
_SHOWN_INPUTS = {"", "text", "search", "tel", "url", "email", "number", "button", "submit", "reset", "date", "time"}
_MOST_SCRIPTS = 64
_TEMPLATE = re.compile(
    r"<(?P<end>/?)template(?P<said>\b[^>]*)>|(?P<style><style\b.*?</style\s*>)", re.IGNORECASE | re.DOTALL
)
_WHOLE = re.compile(r"-?\d{1,9}")
_FORMULA = re.compile(r"(?:^|[\s_-])(?:math|latex|tex|equation|formula)", re.IGNORECASE)
_NUMERALS = {  # how the items of a list are numbered, by its attribute and in style sheets
    "a": "a", "lower-alpha": "a", "lower-latin": "a", "A": "A", "upper-alpha": "A", "upper-latin": "A",
    "i": "i", "lower-roman": "i", "I": "I", "upper-roman": "I",
}  # fmt: skip
_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"),
          (9, "ix"), (5, "v"), (4, "iv"), (1, "i"))  # fmt: skip
_INVISIBLE_SIGNS = dict.fromkeys(range(0x2061, 0x2065))


def parse_html(data: bytes, max_nesting: int) -> Parsed:
    """A page's text, paragraphs parted by blank lines; titled by ``<title>``, else by its first ``<h1>``.

    Raises:
        DocumentError: its encoding cannot be told, or it nests deeper than ``max_nesting``.
    """
    source, encoding = decode(data, declared=declared_charset(data))
    title, text = text_of_html(source, max_nesting)
    return Parsed(title, text, encoding)


def text_of_html(source: str, max_nesting: int) -> tuple[str, str]:
    """Title and text of a page; raises like `parse_html`."""
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    _check_nesting(source, max_nesting)
    source, fallback = _close_raw(_open_shadows(source))
    try:
        tree = LexborHTMLParser(source)
    except SelectolaxError as error:
        raise MemoryError from error  # no page is beyond the standard's parser
    page = _Page(tree, fallback)
    text = page.text()
    if not text and not fallback:
        text = _Page(tree, True).text()
    return page.title(), text


def _check_nesting(source: str, most: int) -> None:
    """Refuse what would take the square of its depth: a tag that closes none looks through all that are open."""
    depth, opened = 0, dict[str, int]()
    for found in _TAG.finditer(source):
        name = found[2].lower()
        if name in _VOID or name in _CLOSES_ITSELF:
            continue
        if not found[1]:
            opened[name] = opened.get(name, 0) + 1
            depth += 1
            if depth > most:
                raise DocumentError(
                    f"HTML must have at most {most:,} tags open at once, and at character {found.start()} it has more; "
                    "raise max_nesting, or close them"
                )
        elif opened.get(name):
            opened[name] -= 1
            depth -= 1


def _close_raw(source: str) -> tuple[str, bool]:
    """The page with those elements closed that would take all that follows for their text, and whether ``<noscript>``
    is left open."""
    small = source.lower() if len(source.lower()) == len(source) else source
    for name in _RAW:
        start = small.rfind(f"<{name}")
        if start < 0 or small[start + len(name) + 1 : start + len(name) + 2] not in (" ", ">", "\n", "\t", "/"):
            continue
        if small.rfind(f"</{name}") < start and (end := small.find(">", start)) > 0:
            place = small.find("<", end) if name in _SHOWN_RAW else end + 1
            place = len(small) if place < 0 else place
            source = f"{source[:place]}</{name}>{source[place:]}"
            small = f"{small[:place]}</{name}>{small[place:]}"
    return source, small.rfind("<noscript") > small.rfind("</noscript")


@dataclass
class _List:
    """A list that is open: the number of its next item, what comes after that, and how numbers are written.

    ``kind`` is "1", "a", "A", "i" or "I"; "" for a list without numbers.
    """

    number: int = 1
    step: int = 1
    kind: str = ""


class _Page:
    """One walk through a tree, without recursion."""

    def __init__(self, tree: LexborHTMLParser, fallback: bool) -> None:
        self._tree = tree
        self._fallback = fallback
        self._styles = Styles(tree)
        self._pieces: list[str] = []
        self._heading: list[str] | None = None
        self._in_heading = False
        self._verbatim = 0
        self._formula = 0
        self._raised = False
        self._lists: list[_List] = []
        self._readings: list[
            tuple[int, list[str]]
        ] = []  # of each ruby that is open: where its reading begins, those before

    def title(self) -> str:
        """The page's title; "" where it has none."""
        for node in self._tree.css("title"):
            parent = node.parent
            if parent is None or (parent.tag or "").lower() not in ("svg", "g", "path", "symbol"):
                return " ".join((node.text(deep=True) or "").split())
        return " ".join("".join(self._heading or ()).split())

    def text(self) -> str:
        """The page's text."""
        self._walk()
        text = "\n".join(line.rstrip(" \t") for line in "".join(self._pieces).split("\n"))
        text = re.sub(r"\n[ \t](?! )", "\n", text)  # what a collapsed space or a row's first cell left; code stays
        return re.sub(r" ?\t ?", "\t", re.sub(r"\n{3,}", "\n\n", text)).strip()

    def _walk(self) -> None:
        root = self._tree.root
        if root is None:
            return
        opened: list[tuple[LexborNode, Look, str, str]] = []  # node, look, tag, what is written when it ends
        node: LexborNode | None = root
        look = self._styles.outset(self._tree)
        while node is not None or opened:
            if node is None:
                ended, look, tag, closing = opened.pop()
                self._leave(tag, closing)
                node = ended.next
                continue
            if node.is_text_node:
                if look.seen:
                    self._data(node.text_content or "")
                node = node.next
                continue
            tag = (node.tag or "").lower()
            if not node.is_element_node and tag not in ("-document",):
                node = node.next
                continue
            attributes = node.attributes if node.is_element_node else {}
            inner = self._styles.of(node, attributes, look)
            if self._skipped(node, tag, attributes, inner):
                node = node.next
                continue
            closing = self._enter(node, tag, attributes, inner)
            opened.append((node, look, tag, closing))
            look, node = inner, node.first_child

    def _skipped(self, node: LexborNode, tag: str, attributes: Mapping[str, str | None], look: Look) -> bool:
        child = node.first_child
        if tag == "script" and (attributes.get("type") or "").lower().startswith("math/tex") and not look.hidden:
            self._data(f" ${(child.text_content or '').strip() if child is not None else ''}$ ")
            return True
        if tag == "title":
            return True
        if tag == "dialog" and "open" not in attributes:
            return True
        return look.hidden or tag in _UNSEEN or (tag in _FALLBACK and not self._fallback)

    def _enter(self, node: LexborNode, tag: str, attributes: Mapping[str, str | None], look: Look) -> str:
        """Write what stands before an element; returns what stands after it."""
        self._break(tag, opens=True)
        closing = ""
        if self._formula:
            closing = self._enter_part(node, tag)
        if tag == "math":
            self._formula += 1
        elif tag in _VERBATIM:
            self._verbatim += 1
        elif tag == "h1" and self._heading is None:
            self._heading, self._in_heading = [], True
        elif tag in ("ol", "ul", "menu"):
            self._lists.append(_list_of(node, attributes, look) if tag == "ol" else _List())
        elif tag == "li" and self._lists and self._lists[-1].kind:
            self._number(self._lists[-1], attributes, look)
        elif tag == "q" and look.seen:
            self._data("\u201c")
            return "\u201d"
        elif tag == "ruby":
            self._readings.append((0, []))
        elif tag in ("rt", "rtc") and self._readings:
            self._readings[-1] = (len(self._pieces), self._readings[-1][1])
        elif tag == "sup":
            self._raised = True
        elif tag == "img" and look.seen and _FORMULA.search(attributes.get("class") or ""):
            self._data(f" {attributes.get('alt') or ''} ")
        elif tag == "input" and look.seen and (attributes.get("type") or "").lower() in _SHOWN_INPUTS:
            self._data(f" {attributes.get('value') or attributes.get('placeholder') or ''} ")
        return closing

    def _number(self, opened: _List, attributes: Mapping[str, str | None], look: Look) -> None:
        """Write the number of a list's item, unless its styles say that it has none."""
        value = attributes.get("value") or ""
        number = int(value) if _WHOLE.fullmatch(value) else opened.number
        opened.number = number + opened.step
        kind = _NUMERALS.get(attributes.get("type") or look.numbers, opened.kind)
        if look.numbers != "none":
            self._pieces.append(f"{_numeral(number, kind)}. ")

    def _enter_part(self, node: LexborNode, tag: str) -> str:
        parent = node.parent
        above = (parent.tag or "").lower() if parent is not None else ""
        joints = _BETWEEN.get(above)
        if above == "mmultiscripts" and tag not in ("none", "mprescripts"):
            self._pieces.append(_script_sign(node))
            joints = ()
        elif joints is not None:
            place, before = 0, node.prev
            while before is not None and place <= len(joints):
                place += before.is_element_node
                before = before.prev
            if place:
                self._pieces.append(joints[min(place, len(joints)) - 1])
        if tag in ("msqrt", "mroot"):
            self._pieces.append("√(")
            return ")"
        if joints is None:
            return ""
        first = node.first_child
        if tag in ("mrow", "mstyle", "mfrac") and first is not None and first.next is not None:
            self._pieces.append("(")
            return ")"
        return ""

    def _leave(self, tag: str, closing: str) -> None:
        if closing:
            self._pieces.append(closing)
        self._break(tag, opens=False)
        if tag == "math":
            self._formula -= 1
        elif tag in _VERBATIM:
            self._verbatim -= 1
        elif tag == "h1":
            self._in_heading = False
        elif tag in ("ol", "ul", "menu"):
            self._lists.pop()
        elif tag in ("rt", "rtc") and self._readings:
            begin, readings = self._readings[-1]
            readings.append("".join(self._pieces[begin:]).strip())
            del self._pieces[begin:]
        elif tag == "ruby" and any(readings := self._readings.pop()[1]):
            self._pieces.append(f"({''.join(readings)})")
        elif tag == "sup":
            self._raised = False

    def _data(self, data: str) -> None:
        if self._in_heading and self._heading is not None:
            self._heading.append(data)
        if self._formula:
            data = data.translate(_INVISIBLE_SIGNS).strip()
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self._pieces or self._pieces[-1][-1:].isspace():
                data = data.lstrip()
        if not data:
            return
        if self._raised:
            self._raised = False
            if self._pieces and self._pieces[-1][-1:].isdigit() and data[0] in "0123456789+-\u2212":
                self._pieces.append("^")
        self._pieces.append(data)

    def _break(self, tag: str, *, opens: bool) -> None:
        if tag in _BLOCKS:
            self._pieces.append("\n\n")
        elif (opens and tag in _LINES) or (not opens and tag in _LINES_AFTER):
            self._pieces.append("\n")
        elif opens and tag in ("td", "th", "mtd"):
            self._pieces.append("\t")


def _script_sign(node: LexborNode) -> str:
    """What stands before a part of ``mmultiscripts``: the base has nothing, then indices and powers take turns."""
    place, before = 0, node.prev
    while before is not None and before.tag != "mprescripts" and place < _MOST_SCRIPTS:
        place += before.is_element_node
        before = before.prev
    return "^_"[place % 2] if before is None and place else "" if before is None else "_^"[place % 2]


def _open_shadows(source: str) -> str:
    """A page whose shadow trees, which browsers show, are plain elements; their style sheets hold for no other text."""
    if "shadowrootmode" not in source.lower():
        return source
    opened: list[bool] = []

    def plain(found: re.Match[str]) -> str:
        if found["style"]:
            return "" if any(opened) else found[0]
        if not found["end"]:
            opened.append("shadowrootmode" in found["said"].lower())
            return "<div>" if opened[-1] else found[0]
        return "</div>" if opened and opened.pop() else found[0]

    return _TEMPLATE.sub(plain, source)


def _list_of(node: LexborNode, attributes: Mapping[str, str | None], look: Look) -> _List:
    """What a numbered list begins with."""
    start, backwards = attributes.get("start") or "", "reversed" in attributes
    number = int(start) if _WHOLE.fullmatch(start) else 1
    if backwards and not start:
        number, child = 0, node.first_child
        while child is not None:
            number, child = number + (child.tag == "li"), child.next
    if look.numbers == "none":
        return _List()
    return _List(number, -1 if backwards else 1, _NUMERALS.get(look.numbers or attributes.get("type") or "", "1"))


def _numeral(number: int, kind: str) -> str:
    """A number as a list writes it: in digits where letters or Roman numerals have none for it."""
    text = ""
    if kind in ("a", "A") and number > 0:
        while number:
            number, letter = divmod(number - 1, 26)
            text = chr(ord("a") + letter) + text
    elif kind in ("i", "I") and 0 < number < 4000:
        for value, letters in _ROMAN:
            text += letters * (number // value)
            number %= value
    return (text.upper() if kind in ("A", "I") else text) or str(number)
