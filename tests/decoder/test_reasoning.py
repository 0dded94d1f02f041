"""Decoders that think aloud: their thoughts come apart from the answer, have a budget, and are not read again."""

from __future__ import annotations

import pytest
import torch

from lloco_engine import ChunkConfig, Document, Engine, GenerateConfig, Turn
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.decoder.processors import Pipeline
from lloco_engine.decoder.template import Template
from lloco_engine.reasoning import Markers, find_markers, without_thoughts
from lloco_engine.testing import HashingEmbedder, tiny_decoder, tiny_tokenizer

HEAD = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}{{ 'OPEN' + "
    "m.reasoning_content + 'CLOSE' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
OPENS = HEAD + "{{ 'OPEN' }}{% endif %}"
PLAIN = HEAD + "{% endif %}"
PAIRS = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
]


def decoder_of(pair, template: str, added: bool, said: str, special: tuple[str, ...] = ()) -> LocalDecoder:
    """A decoder that always says this."""
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if added:
        tokenizer.add_tokens(list(pair))
    tokenizer.chat_template = template.replace("OPEN", pair[0]).replace("CLOSE", pair[1])
    decoder = LocalDecoder(tiny_decoder(max_position_embeddings=2048, vocab_size=len(tokenizer)), tokenizer, "tiny")
    script = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def scripted(ids, logits):
        token = script[min(ids.shape[1], len(script) - 1)]
        return torch.full_like(logits, -50.0).index_fill(1, torch.tensor([token]), 50.0)

    row = decoder._row

    def with_script(*arguments):
        made = row(*arguments)
        made.pipeline = Pipeline([scripted])
        return made

    decoder._row = with_script
    return decoder


def bare(tokens: int, **more) -> GenerateConfig:
    return GenerateConfig(tokens, **more)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("added", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("opens", [True, False], ids=["opened", "begun"])
def test_thoughts_come_apart_from_the_answer(pair, added, opens):
    said = ("" if opens else pair[0]) + "It is the pump. Not the crane." + pair[1] + "\n\nHall 3."
    decoder = decoder_of(pair, OPENS if opens else PLAIN, added, said)
    generation, pieces = decoder.stream(Prompt("Where?"), bare(12))
    assert "".join(pieces) == "Hall 3."
    assert (generation.text, generation.finish) == ("Hall 3.", "stop")
    assert generation.reasoning == "It is the pump. Not the crane."
    assert generation.warnings == ()


def test_thoughts_have_a_budget_and_then_the_decoder_answers():
    decoder = decoder_of(PAIRS[0], OPENS, True, "Thinking, " * 30)
    generation, pieces = decoder.stream(Prompt("Where?"), bare(5, reasoning_tokens=10))
    end = decoder.tokenizer.convert_tokens_to_ids("</think>")
    list(pieces)
    assert generation.token_ids.index(end) == 10
    assert len(generation.token_ids) == 16
    assert "ended for it" in generation.warnings[0]
    none, pieces = decoder.stream(Prompt("Where?"), bare(5, reasoning_tokens=0))
    list(pieces)
    assert none.token_ids[0] == end


def test_an_answer_that_ends_inside_its_thoughts_warns(tmp_path):
    decoder = decoder_of(PAIRS[0], OPENS, True, "Thinking")
    with Engine.open(
        tmp_path / "s", decoder=decoder, embedder=HashingEmbedder(), chunk=ChunkConfig(64, 32, 8)
    ) as engine:
        engine.ingest(Document("d", "The pump stands in hall three."))
        answer = engine.ask("Where?", generate=bare(5))
    assert (answer.text, answer.reasoning) == ("", "Thinking")
    assert any("inside the decoder's thoughts" in warning for warning in answer.warnings)


def test_thoughts_of_earlier_turns_are_not_read_again():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    template = Template.of(tokenizer)
    plain, thinking = (
        template.question_ids("And?", history=[Turn("user", "Where?"), Turn("assistant", said)])
        for said in ("Hall 3.", "<think>secret</think>\nHall 3.")
    )
    assert plain == thinking


def test_a_decoder_that_does_not_think_writes_such_words_as_text():
    assert Template.of(tiny_tokenizer()).markers is None
    assert find_markers(["<tool_call>", "</tool_call>", "<|end|>", "<b>", "</b>"]) is None


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_markers_are_known_by_their_names(pair):
    assert find_markers(["<|im_end|>", *pair]) == Markers(*pair)
    assert without_thoughts(f"{pair[0]}a{pair[1]}\n\nb") == "b"
    assert without_thoughts(f"a{pair[1]}\n\nb <i>c</i>") == "b <i>c</i>"
    assert without_thoughts("x < y, [1] and </i>") == "x < y, [1] and </i>"


@pytest.fixture
def thinking(tmp_path):
    decoder = decoder_of(PAIRS[0], OPENS, True, "It is the pump.</think>Hall 3.")
    chunk = ChunkConfig(64, 32, 8)
    with Engine.open(tmp_path / "s", decoder=decoder, embedder=HashingEmbedder(), chunk=chunk) as engine:
        engine.ingest(Document("d", "The pump stands in hall three."))
        yield engine


@pytest.mark.parametrize("streamed", [False, True])
def test_langchain_gets_thoughts_apart(thinking, streamed):
    from lloco_integrations.langchain import ChatLLoCO

    chat = ChatLLoCO(engine=thinking, max_tokens=12)
    if streamed:
        first, *rest = chat.stream("Where?")
        message = sum(rest, first)
    else:
        message = chat.invoke("Where?")
    assert message.text == "Hall 3."
    assert message.additional_kwargs["reasoning_content"] == "It is the pump."
    assert [block["type"] for block in message.content_blocks].count("reasoning") == 1


def test_llama_index_gets_thoughts_apart(thinking):
    from llama_index.core.base.llms.types import ChatMessage, ThinkingBlock

    from lloco_integrations.llama_index import LLoCOLLM

    llm = LLoCOLLM(thinking, max_tokens=12)
    message = llm.chat([ChatMessage("Where?")]).message
    assert message.content == "Hall 3."
    assert [block.content for block in message.blocks if isinstance(block, ThinkingBlock)] == ["It is the pump."]


def test_thoughts_of_a_frameworks_earlier_turns_are_not_read_again():
    from langchain_core.messages import AIMessage, HumanMessage
    from llama_index.core.llms import ChatMessage

    from lloco_integrations.langchain.messages import plain
    from lloco_integrations.llama_index.llm import _message

    said = "<think>secret</think>Hall 3."
    assert plain([AIMessage(said), HumanMessage("And?")])[0].text == "Hall 3."
    assert _message(ChatMessage(role="assistant", content=said)).text == "Hall 3."


CHANNELS = (  # as gpt-oss has it: thoughts and answer are messages of their own, and what marks them is several tokens
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
BETWEEN = f"<|end|><|start|>assistant{FINAL}"


def channels(said: str) -> LocalDecoder:
    return decoder_of(("", ""), CHANNELS, False, said, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"))


@pytest.mark.parametrize(
    ("said", "text", "reasoning"),
    [
        (f"{ANALYSIS}It is the pump.{BETWEEN}Hall 3.", "Hall 3.", "It is the pump."),
        (f"{FINAL}Hall 3.", "Hall 3.", ""),
        ("Hall 3.", "Hall 3.", ""),
        (f"{ANALYSIS}It is{BETWEEN}", "", "It is"),
    ],
)
def test_markers_of_several_tokens_are_no_text(said, text, reasoning):
    decoder = channels(said)
    assert decoder.template.markers == Markers(ANALYSIS, BETWEEN, FINAL)
    generation, pieces = decoder.stream(Prompt("Where?"), bare(12))
    assert "".join(pieces) == generation.text == text
    assert generation.reasoning == reasoning


def test_thoughts_between_markers_of_several_tokens_have_a_budget():
    decoder = channels(ANALYSIS + "Thinking, " * 30)
    generation, pieces = decoder.stream(Prompt("Where?"), bare(5, reasoning_tokens=10))
    list(pieces)
    close = decoder.tokenizer(BETWEEN, add_special_tokens=False)["input_ids"]
    at = generation.token_ids.index(close[0])
    assert generation.token_ids[at : at + len(close)] == close
    assert "ended for it" in generation.warnings[0]
