"""Learning offline: passes with gradients, plans, checkpoints, and whole runs on a tiny decoder."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import OTHERS, TEXT, place, tiny, tokens, whole
from peft import LoraConfig

from lloco_engine.decoder.local import Prompt
from lloco_engine.finetune.passes import answer_logits

QUESTIONS = ["Who is the keeper?", "Who came from the north?", "When?"]
ANSWERS = ["Ada Brandt", "She did, in 1874.", "1874"]


def adapted(**changes):
    """A decoder with a new adapter that is no longer without effect, and the adapter's parameters."""
    decoder = tiny(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parameters = decoder.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "new")
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
    return decoder, parameters


# -- passes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "segments", "text", "none", "one"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_questions_give_the_losses_and_gradients_of_each_alone(kind, family):
    decoder, parameters = adapted(family=family)
    segments = [whole(decoder), *(whole(decoder, text) for text in OTHERS)]
    prefix = {"memory": place(decoder, segments[:1]), "segments": place(decoder, segments)}.get(kind)
    context = tokens(decoder, TEXT) if kind in ("text", "one") else None
    asked = QUESTIONS[:1] if kind == "one" else QUESTIONS
    prompts = [Prompt(question, prefix, context) for question in asked]
    end = decoder.tokenizer.eos_token_id
    gold = [[*tokens(decoder, answer), end] for answer in ANSWERS[: len(asked)]]

    made = answer_logits(decoder, prompts, gold, "new")
    loss = torch.nn.functional.cross_entropy(made.logits, made.targets, reduction="none")
    found = torch.autograd.grad(loss.sum(), list(parameters.values()))

    # the slow reference: each question alone, token by token after the template, every key kept with its graph
    expected = decoder.answer_losses(prompts, ANSWERS[: len(asked)], "new")
    assert [round(float(part.sum()), 3) for part in loss.detach().split([len(answer) for answer in gold])] == [
        round(total, 3) for total, _ in expected
    ]
    difference = 1e-3
    for parameter, gradient in zip(parameters.values(), found, strict=True):
        where = int(gradient.abs().argmax())
        flat = parameter.data.view(-1)
        before = float(flat[where])
        sides = []
        for sign in (1, -1):
            flat[where] = before + sign * difference
            decoder._prefix_cache.clear()  # the template is read with the adapter too
            sides.append(sum(total for total, _ in decoder.answer_losses(prompts, ANSWERS[: len(asked)], "new")))
        flat[where] = before
        slope = (sides[0] - sides[1]) / (2 * difference)
        assert float(gradient.view(-1)[where]) == pytest.approx(slope, rel=0.05, abs=0.01)
