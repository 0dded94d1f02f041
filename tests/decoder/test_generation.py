"""Choosing tokens, turning them into text, guessing ahead: no model."""

from __future__ import annotations

import pytest
import torch

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.decoding import draw, greedy
from lloco_engine.decoder.drafting import Draft
from lloco_engine.decoder.processors import Pipeline, processors
from lloco_engine.decoder.stopping import TextStream
from lloco_engine.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def read(stream: TextStream, tokens) -> list[str]:
    """What is shown after each token until the stream stops, and at the end."""
    shown = []
    for token in tokens:
        shown.append(stream.push(token))
        if stream.stopped:
            return shown
    return [*shown, stream.finish()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- choosing -------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])


def choose(logits, config, generator=None, answers=None, ends=()) -> torch.Tensor:
    """The next token of each row, as the decoder's loop chooses it."""
    answers = [[]] * len(logits) if answers is None else answers
    logits = Pipeline(processors(config, ends))(logits, answers)
    return (draw(generator) if config.temperature else greedy)(logits)


def drawn(config: GenerateConfig, count: int = 4000) -> torch.Tensor:
    """How often each token comes, over many rows."""
    logits = PROBABILITIES.log().expand(count, -1)
    return torch.bincount(choose(logits, config, generator()), minlength=5) / count


def test_temperature_0_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [9.0, 3.0, 1.0]])
    assert choose(logits, GenerateConfig(top_p=0.1), None).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_sharpens_or_flattens_the_distribution(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    found = drawn(GenerateConfig(temperature=temperature))
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [1]), (0.39, [1]), (0.5, [1, 2]), (0.8, [1, 2, 3]), (0.9, [1, 2, 3, 4]), (1.0, range(5))]
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_it(top_p, kept):
    found = drawn(GenerateConfig(temperature=1.0, top_p=top_p))
    expected = torch.zeros(5)
    expected[list(kept)] = PROBABILITIES[list(kept)]
    assert set(found.nonzero()[:, 0].tolist()) == set(kept)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.03)


def test_top_p_follows_the_temperature():
    # at a temperature of 4 the likeliest token has 0.27, so that half the mass takes two; at 1/4 it has 0.82
    assert set(drawn(GenerateConfig(temperature=4.0, top_p=0.5)).nonzero()[:, 0].tolist()) == {1, 2, 3}
    assert set(drawn(GenerateConfig(temperature=0.25, top_p=0.5)).nonzero()[:, 0].tolist()) == {1}


@pytest.mark.parametrize(("count", "kept"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (0, range(5)), (9, range(5))])
def test_only_so_many_of_the_likeliest_are_drawn(count, kept):
    found = drawn(GenerateConfig(temperature=1.0, sample_top_k=count))
    expected = torch.zeros(5)
    expected[list(kept)] = PROBABILITIES[list(kept)]
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.03)


def test_what_was_said_is_less_likely_by_the_penalty():
    config = GenerateConfig(repetition_penalty=2.0)
    logits = torch.tensor([[4.0, -4.0, 3.0, 0.0, 1.0]])
    processed = Pipeline(processors(config, ()))(logits, [[0, 1, 1]])
    assert processed.tolist() == [[2.0, -8.0, 3.0, 0.0, 1.0]]
    assert choose(logits, config, answers=[[0]]).tolist() == [2]


def test_nothing_is_processed_where_a_step_is_greedy_and_free():
    assert processors(GenerateConfig(top_p=0.5, sample_top_k=3), {1}) == []
    logits = torch.zeros(1, 5)
    assert Pipeline([])(logits, [[]]) is logits


def test_a_seeded_generator_repeats_itself():
    logits, config = PROBABILITIES.log().expand(50, -1), GenerateConfig(temperature=1.0, top_p=0.95)
    first = choose(logits, config, generator(1))
    assert torch.equal(choose(logits, config, generator(1)), first)
    assert not torch.equal(choose(logits, config, generator(2)), first)


@pytest.mark.parametrize(("size", "forbidden"), [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (4, []), (9, [])])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_run_of_tokens_comes_twice(size, forbidden, temperature):
    config = GenerateConfig(temperature=temperature, no_repeat_ngram=size)
    favourites = torch.eye(5) * 50  # each row's likeliest is another token
    chosen = choose(favourites, config, generator(), [[1, 2, 3, 1, 3, 3, 1]] * 5).tolist()
    assert [token for token in range(5) if chosen[token] != token] == forbidden
    assert not set(chosen) & set(forbidden)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_end_before_its_time(temperature):
    config = GenerateConfig(temperature=temperature, min_new_tokens=2)
    favourites = torch.eye(5)[[4, 4, 4, 0]] * 50
    chosen = choose(favourites, config, generator(), [[], [1], [1, 2], [1]], {3, 4}).tolist()
    assert not set(chosen[:2]) & {3, 4}
    assert chosen[2:] == [4, 0], "it may end now, and another token is never held back"


def test_choosing_leaves_the_logits_alone():
    logits = PROBABILITIES.log().expand(3, -1).clone()
    before = logits.clone()
    choose(
        logits,
        GenerateConfig(temperature=1.0, top_p=0.5, no_repeat_ngram=1, min_new_tokens=3),
        generator(),
        [[0, 1]] * 3,
        {4},
    )
    assert torch.equal(logits, before)


# -- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        "na\u00efve caf\u00e9 \u20ac 3",
        "\U0001f600 \U0001f468\u200d\U0001f469 ok",
        "\u65e5\u672c\u8a9e",
        "a\n\n b",
    ],
)
def test_pieces_join_to_the_text_and_no_character_is_split(text):
    stream = TextStream(TOKENIZER)
    shown = read(stream, ids(text))
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown)


def test_text_is_shown_as_soon_as_it_is_certain():
    assert read(TextStream(TOKENIZER), ids("abc")) == ["a", "b", "c", ""]
    assert read(TextStream(TOKENIZER), ids("a\u20acb")) == ["a", "", "", "\u20ac", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_such():
    stream = TextStream(TOKENIZER)
    shown = read(stream, ids("a\u20ac")[:-1])
    assert shown[:3] == ["a", "", ""]
    assert set(shown[3]) == {"\ufffd"}
    assert "".join(shown) == "a" + shown[3]


def test_special_tokens_are_not_shown():
    stream = TextStream(TOKENIZER)
    assert "".join(read(stream, [*ids("a"), TOKENIZER.bos_token_id, *ids("b")])) == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two", (".",), "one"),
        ("one END two", (" END",), "one"),
        ("one ENJOY", ("END",), "one ENJOY"),
        ("one EN", ("END",), "one EN"),
        ("ababac", ("abac",), "ab"),
        ("first second", ("second", "first"), ""),
        ("xxend", ("end of it", "end"), "xx"),
        ("\u20ac\u20ac.", ("\u20ac\u20ac",), ""),
        ("ab", ("never",), "ab"),
    ],
)
def test_nothing_of_a_stop_string_is_ever_shown(text, stop, expected):
    stream = TextStream(TOKENIZER, stop)
    shown = read(stream, ids(text))
    assert "".join(shown) == expected
    assert stream.stopped == (expected != text)
    if stream.stopped:  # and nothing of what follows it
        assert [*map(stream.push, ids(" more")), stream.finish()] == [""] * (len(ids(" more")) + 1)


def test_only_what_may_become_a_stop_string_is_held_back():
    assert read(TextStream(TOKENIZER, ("xyz",)), ids("axyb")) == ["a", "", "", "xyb", ""]


def test_a_stop_string_inside_one_token_is_found():
    the = ids("the")
    assert len(the) == 1
    stream = TextStream(TOKENIZER, ("h",))
    assert read(stream, [*ids("a"), *the]) == ["a", "t"]
    assert stream.stopped


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, tokens, **options):
        self.decoded += len(tokens)
        return TOKENIZER.decode(tokens, **options)


def test_a_long_text_costs_as_much_by_token_as_a_short_one():
    text = "Gr\u00fc\u00dfe, \U0001f468\u200d\U0001f469 und 3 \u20ac the end. " * 100
    tokens, costs = ids(text), []
    for part in (tokens[:400], tokens):
        counting = Counting()
        stream = TextStream(counting, ("never to be seen",))
        shown = read(stream, part)
        assert "".join(shown) == TOKENIZER.decode(part)
        costs.append(counting.decoded / len(part))
    assert len(tokens) > 3000
    assert costs[1] < 1.1 * costs[0] < 50


# -- guessing -------------------------------------------------------------------------------------------------------


def test_a_guess_is_what_followed_the_last_two_tokens():
    draft = Draft([1, 2, 3, 4, 5, 6])
    assert draft.guess([9, 1, 2]) == [3, 4, 5]
    assert draft.guess([3, 4]) == [5, 6]
    assert draft.guess([5, 6]) == []  # nothing follows
    assert draft.guess([2, 1]) == []
    assert draft.guess([2]) == []
    assert draft.guess([]) == []


def test_the_latest_time_counts_and_the_answer_itself_is_looked_up():
    draft = Draft([1, 2, 3, 4])
    draft.extend([1, 2, 7])
    draft.extend([8])
    assert draft.guess([1, 2]) == [7, 8]
    assert len(draft.guess([1, 2])) <= Draft.SIZE
    assert Draft().guess([1, 2]) == []
