"""The embedded decoder itself: the same text as transformers, and a compressed passage that answers."""

from __future__ import annotations

import pytest
import torch

from lloco_engine.compress import registry
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.config import GenerateConfig
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.prefix import Room, assemble
from lloco_engine.tokenizing import encode
from lloco_engine.types import Prefix, Segment

PASSAGE = (
    "Velmora Pumps was founded in 1931 in the harbour town of Astrelin by the engineer Ilse Kontar. Its first pump, "
    "the Heron, drained the salt meadows behind the town in a single winter. After the flood of 1958 the works moved "
    "to a hill above the river, where forty people build nine kinds of pumps to this day. The firm belongs to its "
    "workers; its director, Tomas Brandel, is chosen by them every three years. Its best known machine, the "
    "Kingfisher, lifts two hundred litres a second and stands in the lock of Orvane."
)
FACTS = [
    ("Who founded Velmora Pumps?", "Ilse Kontar"),
    ("In which town was Velmora Pumps founded?", "Astrelin"),
    ("Who is the director of the firm?", "Tomas Brandel"),
]
PROMPTS = ["What is the capital of France?", "Write one sentence about rain.", FACTS[0][0]]
COUNT = 16


@pytest.fixture(scope="module")
def passage_ids(embedded_decoder) -> list[int]:
    return encode(embedded_decoder.tokenizer, PASSAGE)


@pytest.fixture(scope="module")
def compressed(embedded_decoder, passage_ids) -> list[Segment]:
    """The passage at 8x and 32x."""
    return registry.get("attention_matching").compress(embedded_decoder, passage_ids, [8, 32])


def place(decoder: LocalDecoder, segment: Segment) -> Prefix:
    return assemble([segment], room=Room.of(decoder, 100)).prefix


def test_greedy_text_is_transformers_own(embedded_decoder, passage_ids):
    decoder = embedded_decoder
    prefix = place(decoder, Uncompressed().compress(decoder, passage_ids, [1])[0])
    for number, question in enumerate(PROMPTS):
        reads = number == 2  # the last one has the passage to read
        ids = decoder.template.prefix_ids + passage_ids * reads + decoder.template.question_ids(question)
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = decoder.runner.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=COUNT
            )[0, len(ids) :].tolist()
        expected = [token for token in out if token not in decoder.eos]
        for lookup in (True, False):
            config = GenerateConfig(max_new_tokens=COUNT, lookup=lookup)
            asked = Prompt(question, prefix if reads else None, draft=PASSAGE if reads else "")
            made, pieces = decoder.stream(asked, config)
            assert "".join(pieces) == made.text
            assert made.token_ids == expected, question


def test_a_compressed_passage_answers_where_nothing_to_read_does_not(embedded_decoder, passage_ids, compressed):
    decoder = embedded_decoder
    answers = [answer for _, answer in FACTS]

    def loss(prefix=None, context=None) -> float:
        prompts = [Prompt(question, prefix, context) for question, _ in FACTS]
        losses = decoder.answer_losses(prompts, answers)
        return sum(one for one, _ in losses) / sum(count for _, count in losses)

    nothing, full = loss(), loss(context=passage_ids)
    eight, thirty_two = (loss(place(decoder, segment)) for segment in compressed)
    assert compressed[0].slots == pytest.approx(len(passage_ids) / 8, abs=1)
    assert full < nothing - 1
    assert (nothing - eight) / (nothing - full) > 0.8
    assert thirty_two < nothing


def test_a_batch_answers_as_one_by_one(embedded_decoder, compressed):
    decoder, config = embedded_decoder, GenerateConfig(max_new_tokens=8)
    prompts = [Prompt(FACTS[1][0], place(decoder, compressed[0])), Prompt(PROMPTS[0]), Prompt("Hi")]
    together = decoder.generate(prompts, config)
    assert [one.token_ids for one in together] == [decoder.generate([p], config)[0].token_ids for p in prompts]
