"""What a page's styles hide: inline styles, ``<style>`` sheets and the attributes that stand for styles.

Hidden is what has ``display: none``, ``visibility: hidden``, no opacity or font size, a place far off the screen, or
the colour of its ground. Rules may stand in layers and within other rules. Not done: style sheets in files, sizes,
clips and transforms of boxes, variables, scripts, states such as ``:hover``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lloco_engine.errors import DocumentError

if TYPE_CHECKING:
    from selectolax.lexbor import LexborHTMLParser, LexborNode

__all__ = ["Look", "Styles"]

_FAR = -999.0  # pixels; text left of or above that is off every screen
_MOST_RULES = 5_000
_DEEPEST = 8  # rules inside each other
_LONGEST_SELECTOR = 2_000  # characters, which rules inside each other may multiply
_LONGEST_STYLE = 65_536  # characters of one attribute, each of which takes hundreds of bytes to parse
_STATES = re.compile(r"::|:(?!not\(|is\(|where\(|root|first-|last-|only-|nth-|empty)")
_TRACKED = {
    "display", "visibility", "opacity", "font-size", "font", "color", "background", "background-color",
    "background-image", "position", "left", "top", "text-indent", "content-visibility", "list-style", "list-style-type",
}  # fmt: skip

_NO_NUMBERS = {"inside", "outside", "inherit", "initial", "unset"}
_OF_SVG = {"svg", "g", "text", "tspan", "textpath", "switch", "foreignobject"}  # attributes of which are styles
_ATTRIBUTES = ("display", "visibility", "opacity", "font-size")

Colour = tuple[float, float, float, float]
Declared = dict[str, tuple[bool, list[Any]]]  # property -> (important, tokens)


@dataclass(frozen=True)
class Look:
    """How an element's text looks. A colour that cannot be told is None."""

    hidden: bool = False  # with everything in it
    invisible: bool = False  # unless a descendant is visible
    no_size: bool = False
    numbers: str = ""  # of a list or an item, as its own styles say: "none", "lower-roman"
    colour: Colour | None = (0.0, 0.0, 0.0, 1.0)
    ground: Colour | None = (1.0, 1.0, 1.0, 1.0)

    @property
    def seen(self) -> bool:
        """Whether text of the element itself is seen."""
        if self.hidden or self.invisible or self.no_size:
            return False
        if self.colour is None:
            return True
        return self.colour[3] > 0 and (self.ground is None or self.colour[:3] != self.ground[:3])


class Styles:
    """The styles of one page."""

    def __init__(self, tree: LexborHTMLParser) -> None:
        self._inline: dict[str, Declared] = {}
        self._of_node: dict[int, list[tuple[tuple[bool, int, int, int], int, Declared]]] = {}
        order = 0
        for sheet in tree.css("style"):
            if not _on_screen(sheet.attributes.get("media") or ""):
                continue
            for selector, declared, layered in _rules(sheet.text_content or sheet.text(deep=True) or ""):
                order += 1
                if order > _MOST_RULES:
                    return
                try:
                    nodes = tree.css(selector)
                except Exception:  # a selector that the parser does not know
                    continue
                for node in nodes:
                    weight = (not layered, *_specificity(selector))
                    self._of_node.setdefault(node.mem_id, []).append((weight, order, declared))

    def outset(self, tree: LexborHTMLParser) -> Look:
        """How a page looks before its own styles: black on white, or on what a style sheet in a file may say."""
        files = any("stylesheet" in (link.attributes.get("rel") or "").lower() for link in tree.css("link[rel]"))
        return Look(ground=None, colour=None) if files else Look()

    def of(self, node: LexborNode, attributes: Mapping[str, str | None], before: Look) -> Look:
        """How an element looks within one that looks like ``before``."""
        rules = self._of_node.get(node.mem_id)
        style = attributes.get("style")
        hidden = "hidden" in attributes or "popover" in attributes
        drawn = [name for name in _ATTRIBUTES if name in attributes] if (node.tag or "").lower() in _OF_SVG else []
        colours = "color" in attributes or "bgcolor" in attributes or "text" in attributes
        if not (rules or style or hidden or drawn or colours):
            return before if not before.numbers else replace(before, numbers="")
        declared: Declared = {}
        for name, attribute in (("color", "color"), ("color", "text"), ("background-color", "bgcolor")):
            if (attributes.get(attribute)) and (attribute != "text" or node.tag == "body"):
                declared |= self._parse(f"{name}:{attributes[attribute]}")
        for name in drawn:
            declared |= self._parse(f"{name}:{attributes[name]}")
        if hidden:
            declared["display"] = (False, _tokens("none"))
        for _, _, more in sorted(rules or (), key=lambda rule: rule[:2]):
            _lay(declared, more)
        if style:
            _lay(declared, self._parse(style))
        return _look(declared, before)

    def _parse(self, style: str) -> Declared:
        if len(style) > _LONGEST_STYLE:
            raise DocumentError(
                f"a style attribute must have at most {_LONGEST_STYLE:,} characters, and one has {len(style):,}; "
                "take it out: what it hides cannot be told"
            )
        if style not in self._inline:
            self._inline[style] = _declarations(style)
        return self._inline[style]


def _lay(declared: Declared, more: Declared) -> None:
    for name, (important, tokens) in more.items():
        if important or not declared.get(name, (False,))[0]:
            declared[name] = (important, tokens)


def _look(declared: Declared, before: Look) -> Look:
    values = {name: tokens for name, (_, tokens) in declared.items()}
    hidden = before.hidden or _word(values, "display") == "none" or _word(values, "content-visibility") == "hidden"
    if "opacity" in values and _number(values["opacity"]) == 0:
        hidden = True
    placed = _word(values, "position") in ("absolute", "fixed")
    if any(_is_far(values.get(name)) for name in (("left", "top", "text-indent") if placed else ("text-indent",))):
        hidden = True
    invisible, no_size = before.invisible, before.no_size
    if word := _word(values, "visibility"):
        invisible = word in ("hidden", "collapse") or (word == "inherit" and invisible)
    if size := values.get("font-size") or _size_of_font(values.get("font", ())):
        number = _number(size)
        relative = getattr(size[0], "lower_unit", "") in ("em", "ex", "") and size[0].type != "ident"
        no_size = number == 0 or (no_size and (relative or size[0].type == "percentage"))
    colour, ground = before.colour, before.ground
    if tokens := values.get("color"):
        colour = _colour(tokens, before.colour)
    for name in ("background", "background-color", "background-image"):
        if tokens := values.get(name):
            ground = _ground(tokens, ground)
    listed = [
        token.lower_value
        for name in ("list-style", "list-style-type")
        for token in values.get(name, ())
        if token.type == "ident"
    ]
    numbers = next((word for word in reversed(listed) if word not in _NO_NUMBERS), "")
    return Look(hidden, invisible, no_size, numbers, colour, ground)


def _declarations(style: str) -> Declared:
    import tinycss2

    return _declared(tinycss2.parse_blocks_contents(style, skip_comments=True, skip_whitespace=True))


def _declared(nodes: Sequence[Any]) -> Declared:
    found: Declared = {}
    for node in nodes:
        if node.type == "declaration" and node.lower_name in _TRACKED:
            value = [token for token in node.value if token.type not in ("whitespace", "comment")]
            if value:
                _lay(found, {node.lower_name: (node.important, value)})
    return found


def _rules(css: str) -> Iterator[tuple[str, Declared, bool]]:
    """The rules of a sheet: selector, what it declares, whether it stands in a layer (what is in none outweighs it)."""
    import tinycss2

    opened: list[tuple[Iterator[Any], str, bool]] = [
        (iter(tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)), "", False)
    ]
    while opened:
        rules, around, layered = opened[-1]
        rule = next(rules, None)
        if rule is None:
            opened.pop()
        elif rule.type == "at-rule" and rule.content is not None and _applies(rule):
            inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
            opened.append((iter(inner), around, layered or rule.lower_at_keyword == "layer"))
        elif rule.type == "qualified-rule":
            inner = tinycss2.parse_blocks_contents(rule.content, skip_comments=True, skip_whitespace=True)
            selectors = [_within(around, selector) for selector in _split(rule.prelude) if selector]
            selectors = [one for one in selectors if len(one) <= _LONGEST_SELECTOR]
            if declared := _declared(inner):
                yield from ((one, declared, layered) for one in selectors if not _STATES.search(one))
            if selectors and len(opened) < _DEEPEST and any(one.type in ("qualified-rule", "at-rule") for one in inner):
                opened.append((iter(inner), ", ".join(selectors), layered))


def _applies(rule: Any) -> bool:
    """Whether the rules in an at-rule hold for a page on a screen, as far as can be told."""
    import tinycss2

    asked = tinycss2.serialize(rule.prelude).strip().lower()
    if rule.lower_at_keyword == "media":
        return _on_screen(asked)
    return rule.lower_at_keyword == "layer" or (rule.lower_at_keyword == "supports" and not asked.startswith("not"))


def _on_screen(medium: str) -> bool:
    return medium.strip().lower() in ("", "all", "screen", "only screen", "screen, print", "print, screen")


def _within(around: str, selector: str) -> str:
    """A selector as it is written within a rule of another."""
    if not around:
        return selector
    outer = f":is({around})"
    return selector.replace("&", outer) if "&" in selector else f"{outer} {selector}"


def _split(prelude: Sequence[Any]) -> Iterator[str]:
    import tinycss2

    part: list[Any] = []
    for token in (*prelude, None):
        if token is None or (token.type == "literal" and token.value == ","):
            yield tinycss2.serialize(part).strip()
            part = []
        else:
            part.append(token)


def _specificity(selector: str) -> tuple[int, int, int]:
    names = len(re.findall(r"(?:^|[\s>+~(])[A-Za-z]", selector))
    return selector.count("#"), len(re.findall(r"[.\[:]", selector)), names


def _tokens(text: str) -> list[Any]:
    import tinycss2

    return list(tinycss2.parse_component_value_list(text))


def _word(values: Mapping[str, list[Any]], name: str) -> str:
    tokens = values.get(name)
    return str(tokens[0].lower_value) if tokens and tokens[0].type == "ident" else ""


def _has(tokens: Sequence[Any] | None, word: str) -> bool:
    return any(token.type == "ident" and token.lower_value == word for token in tokens or ())


def _number(tokens: Sequence[Any]) -> float | None:
    first = tokens[0]
    return float(first.value) if first.type in ("number", "dimension", "percentage") else None


def _size_of_font(tokens: Sequence[Any]) -> list[Any]:
    """The size in what ``font`` declares: its first length, or a number that is no weight."""
    return [
        token
        for token in tokens
        if token.type in ("dimension", "percentage") or (token.type == "number" and token.value == 0)
    ][:1]


def _is_far(tokens: Sequence[Any] | None) -> bool:
    if not tokens or (number := _number(tokens)) is None:
        return False
    pixels = {"em": 16, "rem": 16, "in": 96, "cm": 38, "vw": 10, "vh": 10}.get(getattr(tokens[0], "lower_unit", ""), 1)
    return number * pixels <= _FAR


def _colour(tokens: Sequence[Any], inherited: Colour | None) -> Colour | None:
    from tinycss2.color3 import parse_color

    if _has(tokens, "inherit"):
        return inherited
    found = parse_color(tokens[0])
    if found is None or isinstance(found, str):
        return None
    return (round(found[0], 3), round(found[1], 3), round(found[2], 3), float(found[3]))


def _ground(tokens: Sequence[Any], before: Colour | None) -> Colour | None:
    if any(
        token.type == "url" or (token.type == "function" and token.lower_name not in ("rgb", "rgba", "hsl", "hsla"))
        for token in tokens
    ):
        return None
    for token in tokens:
        if (found := _colour([token], None)) is not None:
            return found if found[3] == 1 else before if found[3] == 0 else None
    return (
        before
        if all(
            token.type != "ident" or token.lower_value in ("none", "transparent", "inherit", "initial")
            for token in tokens
        )
        else None
    )
