"""Hints: words are spelled as the sources spell them, and those that are asked for are preferred."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decoder_cases import TEXT, place, tiny, tokens, whole

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.hints import Pieces, hints
from lloco_engine.decoder.hints.pointing import Asked
from lloco_engine.decoder.local import Prompt
from lloco_engine.decoder.processors import Pipeline
from lloco_engine.errors import ConfigError


class Letters:
    """A tokenizer whose tokens are these texts."""

    TOKENS = (
        "Ed",
        "win",
        "gar",
        " Marsh",
        ".",
        "wins",
        "w",
        " ",
        "Edwin",
        "ing",
        "ed",
        "report",
        "Ma",
        "rsh",
        "E",
        "a",
        "2",
        "7",
        "0",
        "7th",
    )
    WRITTEN = {"Edwin": ("Ed", "win"), "edwin": ("ed", "win"), "Edgar": ("Ed", "gar"), "Marsh": ("Ma", "rsh")}
    WITHIN = {"a Marsh": ("a", " Marsh"), "a Edwin": ("a", " ", "Ed", "win")}

    def __call__(self, text, **_):
        known = {"a": ("a",)} | self.WRITTEN | self.WITHIN
        return {"input_ids": ids(*known.get(text, (".",)))}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.TOKENS[number] for number in ids)


def ids(*texts: str) -> list[int]:
    return [Letters.TOKENS.index(text) for text in texts]


def hinted(logits: torch.Tensor, answers, source: str, question: str = "", **weights: float) -> torch.Tensor:
    """Logits of what follows each answer."""
    made = hints(weights, Pieces(Letters()), source, question)
    return Pipeline(made.values())(logits, answers)


def made_likelier(source: str, *answer: str) -> set[str]:
    logits = torch.zeros(1, len(Letters.TOKENS))
    spelled = hinted(logits, [ids(*answer)], source, spelling=3.0)
    assert set(spelled[0].tolist()) <= {0.0, 3.0}
    return {token for token, logit in zip(Letters.TOKENS, spelled[0].tolist(), strict=True) if logit}


def test_a_begun_word_goes_on_as_a_word_of_the_sources():
    assert made_likelier("It was Edwin Marsh.", "Ed") == {"win", "w"}
    assert made_likelier("EDGAR and Edwin", " ", "Ed") == {"win", "w", "gar"}
    assert made_likelier("It was Edwin Marsh.", " Marsh", " ", "Ed", "w") == set(), "no token goes on to edwin"


def test_nothing_is_changed_between_words_after_a_whole_word_or_for_words_that_are_not_there():
    for answer in ((), ("Ed", " "), ("Edwin",), ("Ed", "gar"), ("Edwin", ".")):
        assert made_likelier("It was Edwin Marsh.", *answer) == set()
    assert made_likelier("A report.", "report") == set(), "its inflections are the decoder's own"
    assert made_likelier("", "Ed") == set()


@pytest.mark.parametrize(
    ("source", "answer", "expected"),
    [
        ("A torque of 27 newton metres.", "27", {"2", "7", "0", "7th"}),
        ("A torque of 27 newton metres.", "a27", set()),  # no number that the source has
        ("It has 27 or 270.", "27", {"2", "7", "7th"}),
        ("It has 2, and then 27.", "2", {"2", "0", "7th"}),
        ("On the 27th.", "27", set()),
        ("Ed has 27.", "Ed", set()),
    ],
)
def test_a_number_of_the_sources_is_not_made_longer_than_they_have_it(source, answer, expected):
    logits = torch.zeros(1, len(Letters.TOKENS))
    pieces = ids("Ed") if answer == "Ed" else ids(*answer)
    spelled = hinted(logits, [pieces], source, spelling=3.0)[0].tolist()
    assert {token for token, logit in zip(Letters.TOKENS, spelled, strict=True) if logit < 0} == expected
    assert set(spelled) <= {0.0, 3.0, -3.0}


def test_only_the_likeliest_tokens_are_looked_at_and_each_row_has_its_own_word(monkeypatch):
    monkeypatch.setattr("lloco_engine.decoder.hints.spelling._CANDIDATES", 2)
    logits = torch.zeros(2, len(Letters.TOKENS))
    logits[:, ids("gar", "ing")] = 1.0
    spelled = hinted(logits, [ids("Ed"), ids("win")], "Edgar", spelling=3.0)
    assert spelled[0, ids("gar")].tolist() == [4.0] and float(spelled.sum()) == 4 + 3


def pointed_to(
    source: str, question: str, *answer: str, first: str = "report", pointing: float = 3.0
) -> dict[str, float]:
    """By how much tokens are made likelier where ``first`` is the likeliest one."""
    logits = torch.zeros(1, len(Letters.TOKENS))
    logits[0, ids(first)] = 0.5
    more = (hinted(logits, [ids(*answer)], source, question, pointing=pointing) - logits)[0].tolist()
    return {token: round(amount, 3) for token, amount in zip(Letters.TOKENS, more, strict=True) if amount}


SOURCE = "The keeper of Orrin is Edwin Marsh. The weather is fine. The barley is ripe. The mayor is Edgar."
QUESTION = "Who is the keeper of Orrin?"


def test_words_beside_those_of_the_question_are_likelier_to_be_begun_and_gone_on_to():
    begun = pointed_to(SOURCE, QUESTION)
    assert {"Ed", "ed", "Ma", " Marsh"} <= set(begun) and begun[" Marsh"] > begun["Ed"] == begun["ed"] > 0
    assert begun["Ed"] == pytest.approx(begun[" Marsh"] * (2 / 5) ** 0.5, abs=0.01), "two letters of five say less"
    assert set(pointed_to(SOURCE, QUESTION, "Ed")) == {"win"}, "the mayor is called otherwise"
    doubled = pointed_to(SOURCE, QUESTION, pointing=6.0)
    assert doubled["Ed"] == pytest.approx(2 * begun["Ed"], abs=0.01)


def test_words_are_pointed_to_as_the_tokenizer_writes_them():
    assert {"Edwin", "E", "w"}.isdisjoint(pointed_to(SOURCE, QUESTION)), "no way to write a word begins so"
    assert pointed_to(SOURCE, QUESTION, "E") == {}, "nor goes on so"
    assert set(pointed_to(SOURCE, QUESTION, "Ma")) == {"rsh"}
    assert " Marsh" in (begun := pointed_to(SOURCE, QUESTION, "a", first=" Marsh")) and "Ma" not in begun, (
        "it would join"
    )


def test_a_word_that_the_tokenizer_cannot_write_is_not_pointed_to(monkeypatch):
    monkeypatch.setattr(Letters, "WRITTEN", Letters.WRITTEN | {"Edwin": (" ",), "edwin": ()})
    assert set(pointed_to(SOURCE, QUESTION)) & {"Ed", "ed", "Ma"} == {"Ed", "Ma"}, "only within a text"


def test_an_answer_neither_begins_with_the_questions_words_nor_is_nothing_else():
    asked = "Who is the report of Orrin?"
    source = "The report of Orrin is by Edwin Marsh. The weather is fine. The barley is ripe. The mayor is in."
    assert " Marsh" in pointed_to(source, asked, first="report")
    assert " Marsh" in pointed_to(source, asked, "report", first="."), "it would end"
    assert pointed_to(source, asked, "a", " ", first="report") == {}, "a sentence may take them up"
    assert pointed_to(source, asked, "report", " ", "Edwin", first=".") == {}, "something was said"
    assert pointed_to(source, asked, "a", first=".") == {}, "and an answer without a word of either is the decoder's"


def test_nothing_is_pointed_to_where_grammar_the_question_or_the_end_comes_next():
    assert pointed_to(SOURCE + " It reports.", QUESTION + " Reports?", "a", " ") == {}, "report begins a word of it"
    assert pointed_to("The report is. Report it. A report is. The report was of Edwin.", "Was it?") == {}, (
        "it is common"
    )
    assert pointed_to(SOURCE, QUESTION, first=".") == {}
    assert pointed_to(SOURCE, "Why Xanadu?") == {}, "no sentence has a word of it"
    assert pointed_to("", QUESTION) == {}


def test_what_was_said_is_not_asked_for_again():
    assert pointed_to(SOURCE, QUESTION, "Edwin", " ") == {}
    assert pointed_to(SOURCE, QUESTION, "Edwin", first=" Marsh") == {}
    assert " Marsh" in pointed_to(SOURCE, QUESTION, "report", first=" Marsh"), "what was said is none of the sources'"


def test_a_word_counts_by_its_sentence_and_its_rarity():
    asked = Asked(SOURCE, QUESTION)
    assert asked.amount("edwin") == asked.amount("marsh") > 10 * asked.amount("edgar")
    assert asked.amount("keeper") == asked.amount("orrin") == asked.amount("is") == 0, "the question's own"
    assert asked.amount("ed") == 0 and set(asked.amounts) >= {"edwin", "marsh"}
    other = Asked("Orrin has a keeper, Edwin. The mayor of Orrin was Edgar. The weather. A dog.", "Orrin, keeper?")
    assert 0 < other.amount("edgar") < other.amount("edwin") / 8, "it has a third of the question"
    common = Asked("Its keeper is old Edwin. The old mill. An old dog. A cat.", "Who is the keeper?")
    assert 0 < common.amount("old") < common.amount("edwin") / 2
    assert asked.tells("edwin") and asked.tells("xanadu")
    assert not asked.tells("the") and not asked.tells("keep")
    assert asked.echoes("keeper") and asked.echoes("keep") and not asked.echoes("the") and not asked.echoes("edwin")
    assert not Asked(SOURCE, "") and not Asked("", QUESTION) and not Asked(SOURCE, "Why?")


def test_answers_are_spelled_as_the_source_streamed_and_in_batches_and_guessing_changes_nothing():
    decoder = tiny()
    prefix = place(decoder, [whole(decoder)])
    plain = Prompt("Who?", prefix)
    spelled = Prompt("Who?", prefix, draft=TEXT)
    config = GenerateConfig(24, hints=("spelling",), spelling=50.0)
    (batched,) = decoder.generate([spelled], config)
    generation, pieces = decoder.stream(spelled, config)
    assert "".join(pieces) == batched.text and generation.token_ids == batched.token_ids
    (off,) = decoder.generate([spelled], GenerateConfig(24))
    assert off.token_ids == decoder.generate([plain], GenerateConfig(24))[0].token_ids != batched.token_ids
    assert (off.hints, batched.hints, generation.hints) == ((), ("spelling",), ("spelling",))
    both = decoder.generate([plain, spelled], config)
    assert [one.hints for one in both] == [(), ("spelling",)], "without sources there are no hints"
    assert [one.token_ids for one in both] == [off.token_ids, batched.token_ids]
    assert tokens(decoder, TEXT)


def test_answers_point_streamed_and_in_batches_from_the_first_token_on_and_guessing_changes_nothing():
    decoder = tiny()
    prefix = place(decoder, [whole(decoder)])
    asking = Prompt("Who is the keeper?", prefix, draft=TEXT)
    off = GenerateConfig(24)
    on = GenerateConfig(24, hints="pointing", pointing=200.0)
    (plain,), (pointed,) = decoder.generate([asking], off), decoder.generate([asking], on)
    assert plain.token_ids[0] != pointed.token_ids[0]
    for lookup in (False, True):
        generation, pieces = decoder.stream(asking, replace(on, lookup=lookup))
        assert "".join(pieces) == pointed.text and generation.token_ids == pointed.token_ids
    both = decoder.generate([replace(asking, draft=""), asking], on)
    assert [one.token_ids for one in both] == [plain.token_ids, pointed.token_ids]


def test_beams_are_hinted_too():
    decoder = tiny()
    asking = Prompt("Who is the keeper?", place(decoder, [whole(decoder)]), draft=TEXT)
    plain, hinted = (
        decoder.generate([asking], GenerateConfig(12, beams=3, hints=on, pointing=200.0 if on else None))[0]
        for on in ((), ("pointing",))
    )
    assert plain.token_ids != hinted.token_ids
    assert (plain.hints, hinted.hints) == ((), ("pointing",))


def test_hints_are_off_unless_they_are_named():
    assert GenerateConfig().hint_weights == {}
    assert GenerateConfig(hints="spelling, pointing") == GenerateConfig(hints=("spelling", "pointing"))
    assert GenerateConfig(hints=("spelling,pointing",)).hint_weights == {"spelling": 3.0, "pointing": 8.0}
    assert GenerateConfig(hints="pointing", pointing=1, spelling=0).hint_weights == {"pointing": 1}
    assert GenerateConfig(hints="pointing", pointing=0).hint_weights == {}
    with pytest.raises(ConfigError, match="hints must be some of spelling, pointing, not 'guessing'"):
        GenerateConfig(hints=("guessing",))
    with pytest.raises(ConfigError, match="add 'spelling' to hints"):
        GenerateConfig(hints="pointing", spelling=3.0)


@pytest.mark.parametrize("name", ["spelling", "pointing"])
def test_a_weight_below_zero_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        GenerateConfig(**{name: -1.0})
