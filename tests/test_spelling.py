"""Words that an answer has begun, spelled as the sources spell them."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import TEXT, place, tiny, tokens, whole

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.local import Prompt
from lloco_engine.decoder.spelling import Pieces, Speller
from lloco_engine.errors import ConfigError


class Letters:
    """A tokenizer whose tokens are these texts."""

    TOKENS = ("Ed", "win", "gar", " Marsh", ".", "wins", "w", " ", "Edwin", "ing", "ed", "report")

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ids(".")}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.TOKENS[number] for number in ids)


def ids(*texts: str) -> list[int]:
    return [Letters.TOKENS.index(text) for text in texts]


def made_likelier(source: str, *answer: str) -> set[str]:
    logits = torch.zeros(1, len(Letters.TOKENS))
    spelled = Speller(Pieces(Letters()), source, 3.0).spell(logits, [ids(*answer)])
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


def test_only_the_likeliest_tokens_are_looked_at_and_each_row_has_its_own_word(monkeypatch):
    monkeypatch.setattr("lloco_engine.decoder.spelling._CANDIDATES", 2)
    logits = torch.zeros(2, len(Letters.TOKENS))
    logits[:, ids("gar", "ing")] = 1.0
    spelled = Speller(Pieces(Letters()), "Edgar", 3.0).spell(logits, [ids("Ed"), ids("win")])
    assert spelled[0, ids("gar")].tolist() == [4.0] and float(spelled.sum()) == 4 + 3


def test_answers_are_spelled_as_the_source_streamed_and_in_batches_and_guessing_changes_nothing():
    decoder = tiny()
    prefix = place(decoder, [whole(decoder)])
    plain = Prompt("Who?", prefix)
    spelled = Prompt("Who?", prefix, spelling=TEXT, draft=TEXT)
    config = GenerateConfig(24, spelling=50.0)
    (batched,) = decoder.generate([spelled], config)
    generation, pieces = decoder.stream(spelled, config)
    assert "".join(pieces) == batched.text and generation.token_ids == batched.token_ids
    (off,) = decoder.generate([spelled], GenerateConfig(24, spelling=0.0))
    assert off.token_ids == decoder.generate([plain], GenerateConfig(24))[0].token_ids != batched.token_ids
    both = decoder.generate([plain, spelled], config)
    assert [one.token_ids for one in both] == [off.token_ids, batched.token_ids]
    assert tokens(decoder, TEXT)


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ConfigError, match="spelling"):
        GenerateConfig(spelling=-1.0)
