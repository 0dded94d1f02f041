"""Numbers are one word for the hints of an answer: no part of one, and no other number, is ever hinted at."""

from __future__ import annotations

import pytest
import torch

from lloco_engine.decoder.hints import Pieces, hints
from lloco_engine.decoder.hints.pointing import Asked
from lloco_engine.decoder.hints.words import WORD
from lloco_engine.decoder.processors import Pipeline

LETTERS = "0123456789.,-:/ abcdefghijklmnopqrstuvwxyz\u202f"


class Characters:
    """A tokenizer with a token for each character."""

    def __call__(self, texts, **_):
        if isinstance(texts, str):
            return {"input_ids": ids(texts)}
        return {"input_ids": [ids(text) for text in texts]}

    def decode(self, numbers, skip_special_tokens=True):
        return "".join(LETTERS[number] for number in numbers)


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text.lower()]


def changed(source: str, answer: str, question: str = "", pointing: float = 0.0) -> dict[str, float]:
    """What each next character gains or loses."""
    made = hints({"spelling": 3.0, "pointing": pointing}, Pieces(Characters()), source, question)
    logits = torch.zeros(1, len(LETTERS))
    return dict(zip(LETTERS, Pipeline(made.values())(logits, [ids(answer)])[0].tolist(), strict=True))


def likelier(source: str, answer: str) -> set[str]:
    return {letter for letter, gain in changed(source, answer).items() if gain > 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,320 rpm, 12.75 mm.", ["3,320", "rpm", "12.75", "mm"]),
        ("1 000 and 12 345,67 in 1951 300 times", ["1 000", "and", "12 345,67", "in", "1951", "300", "times"]),
        ("from -5 to (-0.85), .5 or 1e-5", ["from", "-5", "to", "-0.85", "or", ".5", "1e-5"]),
        ("at 12:30 on 2020-01-15, p. 12-15", ["at", "12:30", "on", "2020-01-15", "p", "12-15"]),
        ("M8x1.25, 1\u202f284, 1\u2019284, 3/4, v1.2.3", ["M8x1.25", "1\u202f284", "1\u2019284", "3/4", "v1.2.3"]),
        ("It's the Harrow-9, built in 1951.", ["It's", "the", "Harrow", "9", "built", "in", "1951"]),
    ],
)
def test_a_number_is_one_word(text, expected):
    found = WORD.findall(text)
    assert sorted(found) == sorted(expected)


def test_only_whole_numbers_are_asked_for():
    asked = Asked(
        "The cut-out speed is 3,320 rpm. The belt is 12.75 mm thick. It is cold.", "What is the cut-out speed?"
    )
    assert asked.amount("3,320") > 0 and not asked.amount("320") and not asked.amount("3")


def test_a_number_goes_on_behind_its_separator():
    source = "It is 3,320 rpm or 12.75 mm."
    assert likelier(source, "3") == {","} and likelier(source, "it is 3,") == {"3"}
    assert likelier(source, "3,3") == {"2"} and likelier(source, "12") == {"."} and likelier(source, "12.") == {"7"}
    assert likelier("It holds 1 000 litres.", "1") == {" "} and likelier("It holds 1 000 litres.", "1 0") == {"0"}
    assert likelier("It is -5 degrees.", "-") == {"5"}
    assert likelier(source, "rpm, ") == likelier(source, "rpm,") == set()


def test_a_number_of_the_sources_is_not_made_another():
    source = "It has 12 pans and weighs 3,320 kg."
    for answer in ("12", "3,320"):
        gains = changed(source, answer)
        assert all(gains[digit] < 0 for digit in "0123456789") and gains[","] == gains["."] == gains[" "] == 0.0
    assert changed(source, "12, ")["3"] == 0.0, "another number may be begun"


def test_a_part_of_a_number_is_not_pointed_to():
    source = "The weight of the mill is 3,640 kg. The hall is cold. The lift is old. The book is green."
    gains = changed(source, "the weight is ", "What is the weight of the mill?", 8.0)
    assert gains["3"] > 0 and gains["6"] == gains["4"] == 0.0
