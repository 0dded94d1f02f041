"""Beam search: against every possible answer, against transformers, and in streams and batches alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from decoder_cases import OTHERS, TEXT, place, spiced, tiny, tokens, whole

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.beams import Beams
from lloco_engine.decoder.decoding import Row, decode
from lloco_engine.decoder.local import Generation, Prompt
from lloco_engine.decoder.processors import Pipeline, processors
from lloco_engine.decoder.stopping import TextStream
from lloco_engine.errors import ConfigError
from lloco_engine.testing import tiny_decoder, tiny_tokenizer

QUESTION = "Who keeps the mill?"
VOCABULARY, END = 4, 0


class Chances:
    """A decoder whose logits depend on all that was said: followed along the beams that it is told of."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.rows: list[tuple[int, ...]] = [()]

    def logits(self, said: tuple[int, ...]) -> torch.Tensor:
        seed = hash((self._seed, *said)) % 2**31
        return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def first(self) -> torch.Tensor:
        return self.logits(())[None]

    def reorder(self, origins) -> None:
        self.rows = [self.rows[origin] for origin in origins]

    def __call__(self, tokens) -> torch.Tensor:
        self.rows = [(*row, *new) for row, new in zip(self.rows, tokens, strict=True)]
        return torch.stack([self.logits(row) for row in self.rows])

    def score(self, answer: tuple[int, ...]) -> float:
        """The mean log probability of its tokens."""
        steps = (torch.log_softmax(self.logits(answer[:at]), -1)[token] for at, token in enumerate(answer))
        return float(sum(steps)) / len(answer)


def search(chances: Chances, config: GenerateConfig) -> list[int]:
    """An answer's tokens, with the end token where it ended by itself."""
    made = Generation()
    pipeline = Pipeline(processors(config, {END}))
    row = Row(made, TextStream(tiny_tokenizer()), pipeline, config.max_new_tokens, {END}, 0.0)
    list(decode(Beams(row, config.beams, config.max_new_tokens), chances.first(), chances))
    return made.token_ids + [END] * (made.finish == "stop")


def answers(longest: int, shortest: int = 0):
    """Every answer of at most so many tokens: ended, or cut off."""
    some = range(1, VOCABULARY)
    for size in range(longest + 1):
        for said in itertools.product(some, repeat=size):
            if size == longest:
                yield said
            elif size >= shortest:
                yield (*said, END)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shortest", [0, 2])
def test_with_enough_beams_the_likeliest_answer_is_found(seed, shortest):
    chances = Chances(seed)
    config = GenerateConfig(max_new_tokens=4, min_new_tokens=shortest, beams=3**4)
    found = search(chances, config)
    assert tuple(found) == max(answers(4, shortest), key=chances.score)


def test_one_beam_is_greedy_and_no_run_comes_twice():
    chances = Chances(1)
    config = GenerateConfig(max_new_tokens=6, min_new_tokens=6, no_repeat_ngram=2)
    found = search(chances, config)
    greedy: list[int] = []
    for _ in range(6):
        pairs = set(itertools.pairwise(greedy))
        logits = chances.logits(tuple(greedy))
        may = [n for n in range(1, VOCABULARY) if not greedy or (greedy[-1], n) not in pairs]
        greedy.append(max(may, key=lambda n: float(logits[n])))
    assert found == greedy


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("beams", [2, 4])
def test_answers_are_those_of_transformers(family, beams):
    decoder = tiny(family)
    reference = spiced(tiny_decoder(family))
    for question in (QUESTION, "And when?", "Why is that so?"):
        ids = decoder.template.prefix_ids + decoder.template.question_ids(question)
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = reference.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=10, num_beams=beams,
                length_penalty=1.0, pad_token_id=0, no_repeat_ngram_size=3,
            )[0, len(ids) :].tolist()  # fmt: skip
        expected = [token for token in out if token not in decoder.eos and token != 0]
        config = GenerateConfig(max_new_tokens=10, beams=beams, no_repeat_ngram=3)
        assert decoder.generate([Prompt(question)], config)[0].token_ids == expected


@pytest.mark.parametrize("reads", ["segments", "text"])
def test_streams_and_batches_say_the_same_and_no_less_likely_than_greedy(reads):
    decoder = tiny()
    prefix = place(decoder, [whole(decoder), *(whole(decoder, text) for text in OTHERS)])
    given = (prefix, None) if reads == "segments" else (None, tokens(decoder, TEXT))
    prompts = [Prompt(question, *given) for question in (QUESTION, "And when did she come?")]
    config, greedy = GenerateConfig(max_new_tokens=12, beams=4), GenerateConfig(max_new_tokens=12)
    made = decoder.generate(prompts, config)
    for prompt, one in zip(prompts, made, strict=True):
        streamed, pieces = decoder.stream(prompt, config)
        assert list(pieces) == [streamed.text]
        assert (streamed.token_ids, streamed.text, streamed.finish) == (one.token_ids, one.text, one.finish)
        assert one.finish in ("stop", "length")
        assert one.ttft_s > 0
    texts = [[one.text for one in decoder.generate(prompts, each)] for each in (config, greedy)]
    assert texts[0] != texts[1], "four beams find something else"


def test_a_stop_string_ends_what_beams_found():
    decoder = tiny()
    whole_text = decoder.generate([Prompt(QUESTION)], GenerateConfig(max_new_tokens=12, beams=3))[0].text
    stop = whole_text[len(whole_text) // 2 :][:2]
    made = decoder.generate([Prompt(QUESTION)], GenerateConfig(max_new_tokens=12, beams=3, stop=(stop,)))[0]
    assert (made.text, made.finish) == (whole_text[: whole_text.index(stop)], "stop")


def test_an_answer_of_nothing_streams_no_piece():
    decoder = tiny()
    whole_text = decoder.generate([Prompt(QUESTION)], GenerateConfig(max_new_tokens=12, beams=3))[0].text
    streamed, pieces = decoder.stream(
        Prompt(QUESTION), GenerateConfig(max_new_tokens=12, beams=3, stop=(whole_text[:1],))
    )
    assert list(pieces) == []
    assert (streamed.text, streamed.finish) == ("", "stop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"beams": 0}, "beams must be at least 1"), ({"beams": 2, "temperature": 0.5}, "temperature must be 0")],
)
def test_settings_have_rules(changes, message):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**changes)
