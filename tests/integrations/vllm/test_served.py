"""vLLM itself with the plug-in, against the engine's own decoder: one server of the embedded decoder for all tests.

``LLOCO_VLLM_PROMPTS`` says how many prompts the comparison takes (8; all: 100), ``LLOCO_VLLM_REQUESTS`` how many two
tenants ask (100; all: 1000), ``LLOCO_VLLM_FORGERIES`` how many requests are forged (200; all: 5000).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery_cases import forged, outdated
from vllm_server_cases import KEY, Server, has_vllm, ids_in, segments_of, served

from lloco_engine import GenerateConfig, PrefixConfig
from lloco_engine.adapters.loading import default_folder
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.demo import questions
from lloco_engine.models import embedded_decoder_folder
from lloco_engine.prefix import place
from lloco_integrations.vllm.params import FIELD

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not has_vllm(), reason="needs vLLM: make vllm-test")]

PROMPTS = int(os.environ.get("LLOCO_VLLM_PROMPTS", "8"))
REQUESTS = int(os.environ.get("LLOCO_VLLM_REQUESTS", "100"))
FORGERIES = int(os.environ.get("LLOCO_VLLM_FORGERIES", "200"))
TOGETHER = 10  # of the comparison's prompts
NEW = 12
ADAPTER = "default"
CHUNK = 24  # tokens of a pass, less than a prompt has


@pytest.fixture(scope="module")
def decoder(store: Path) -> LocalDecoder:
    """What answers must be equal to."""
    made = LocalDecoder.load("embedded")
    made.load_adapter(shipped(), ADAPTER)
    return made


@pytest.fixture(scope="module")
def server(store: Path, decoder: LocalDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all but those that need another."""
    folder = tmp_path_factory.mktemp("server")
    with start(store, folder, "--max-num-seqs", "16") as made:
        yield made


def shipped() -> Path:
    folder = default_folder()
    assert folder is not None
    return folder


def start(store: Path, folder: Path, *arguments: str, **more: Any) -> Any:
    adapters = {"adapters": {ADAPTER: shipped()}} | more
    common = "--max-model-len", "2048", "--generation-config", "vllm", "--block-size", "32"
    common = *common, "--enable-prompt-tokens-details"
    return served(embedded_decoder_folder(), store, folder, *common, *arguments, **adapters)


@dataclass
class Asked:
    """A question with its memory, for both."""

    prompt: Prompt
    ids: list[int]
    segments: list[str]
    template: int
    adapter: str | None

    def memory(self, server: Server, **more: Any) -> dict[str, Any] | None:
        if self.prompt.prefix is None:
            return None
        prefix = self.prompt.prefix
        told = {"focus": prefix.focus, "priors": tuple(map(float, prefix.prior))} | more
        return server.memory(self.segments, self.template, **told)

    def options(self) -> dict[str, Any]:
        return {"model": self.adapter or "base", "max_tokens": NEW}


def asked(
    decoder: LocalDecoder,
    store: Path,
    number: int,
    many: int,
    adapter: str | None = None,
    among: Sequence[str] = (),
) -> Asked:
    """A question of the demo's with so many segments, of which by turns 2 or all are read, some with priors."""
    draw = random.Random(number * 1000 + many)
    question = questions()[number % len(questions())].question
    chosen = draw.sample(among or ids_in(store), many)
    scores = [draw.uniform(0.2, 0.7) for _ in chosen] if number % 2 else None
    prefix = None
    if many:
        focus = PrefixConfig(focus=0 if number % 3 == 0 else 2)
        parts = segments_of(store, chosen)
        prefix = place(parts, focus, template_tokens=decoder.template_tokens, scores=scores)
    prompt = Prompt(question, prefix=prefix)
    ids = [*decoder.template.prefix_ids, *decoder.prompt_ids(prompt)]
    return Asked(prompt, ids, chosen, decoder.template_tokens, adapter)


@torch.inference_mode()
def expected_logits(decoder: LocalDecoder, one: Asked, said: Sequence[int] = ()) -> torch.Tensor:
    """Logits of the first token and of those behind what was said (1 + said, V)."""
    text = [*one.ids[one.template :], *said]
    cache = decoder.start_cache(1, len(text), one.adapter)
    offset = decoder.position(one.prompt) - cache.length
    wanted = 1 + len(said)
    hidden = decoder.step([text], offset, cache, decoder.memory([one.prompt.prefix]), one.adapter, wanted=wanted)
    return decoder.runner.logits(hidden)[0, -wanted:]


def expected(decoder: LocalDecoder, *every: Asked) -> list[list[int]]:
    """Of requests with one adapter."""
    made = decoder.generate([one.prompt for one in every], GenerateConfig(max_new_tokens=NEW), every[0].adapter)
    return [without_end(decoder, one.token_ids) for one in made]


def alone(decoder: LocalDecoder, one: Asked) -> list[int]:
    (made,) = expected(decoder, one)
    return made


def without_end(decoder: LocalDecoder, ids: list[int]) -> list[int]:
    return [one for one in ids if one not in decoder.eos]


def answered(decoder: LocalDecoder, server: Server, one: Asked, **more: Any) -> list[int]:
    return without_end(decoder, server.tokens(one.ids, one.memory(server), **one.options() | more))


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["base", "adapter"])
@pytest.mark.parametrize("many", [0, 1, 2, 4, 8])
def test_answers_are_the_local_decoders(decoder, server, store, many, adapter, capsys):
    """Where a head chooses among segments, one that is off the tie by rounding is read by one arithmetic and not by
    another. That is rare, and moves the engine's decoder as far from itself where it reads a prompt in pieces."""
    whole, chosen, same = [0.0], [0.0], 0

    def first(one: Asked) -> dict[int, float]:
        return server.logits(one.ids, one.memory(server), 1000, model=adapter or "base")

    with ThreadPoolExecutor(TOGETHER) as threads:
        for start in range(0, PROMPTS, TOGETHER):
            numbers = range(start, min(start + TOGETHER, PROMPTS))
            every = [asked(decoder, store, number, many, adapter) for number in numbers]
            logits = threads.map(first, every)
            made = threads.map(lambda one: answered(decoder, server, one), every)
            wanted = [expected_logits(decoder, one)[0] for one in every]
            for one, found, ours in zip(every, logits, wanted, strict=True):
                assert len(found) >= 1000
                chooses = one.prompt.prefix is not None and 0 < one.prompt.prefix.focus < many
                far = float((torch.tensor(list(found.values())) - ours[list(found)]).abs().max())
                (chosen if chooses else whole).append(far)
            same += sum(theirs == ours for theirs, ours in zip(made, expected(decoder, *every), strict=True))
    off = sum(far > 1e-3 for far in chosen)
    with capsys.disabled():
        print(
            f"\n{many} segments, {adapter or 'base'}: {PROMPTS} prompts, {same} answers equal, logits within", end=" "
        )
        print(f"{max(whole):.1e}, and {max(chosen):.1e} where 2 are chosen ({off} of {len(chosen) - 1} beyond 1e-3)")
    assert max(whole) <= 1e-3 and off <= max(1, PROMPTS // 20) and max(chosen) <= 0.5
    assert same >= PROMPTS * 0.99


def test_many_at_once_answer_as_one_by_one(decoder, server, store):
    every = [asked(decoder, store, n, (0, 1, 2, 4)[n % 4], (None, ADAPTER)[n // 4 % 2]) for n in range(16)]
    wanted = [alone(decoder, one) for one in every]
    for _ in range(2):  # the second time from the prefix cache
        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(lambda one: answered(decoder, server, one), every)) == wanted


def test_the_prefix_cache_is_kept_apart_by_memory_and_tenant(server, store):
    draw, (one, other) = random.Random(0), ids_in(store)[:2]
    prompt = [draw.randint(1000, 20000) for _ in range(120)]  # that nobody has asked yet
    blue = server.memory([one], 24, tenant="blue")
    said = []
    for memory in (server.memory([one], 24), server.memory([other], 24), None, blue) * 2:
        answer = server.post(prompt, memory).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        said.append((cached, answer["choices"][0]["token_ids"]))
    assert [cached for cached, _ in said] == [0] * 4 + [96] * 4
    tokens = [made for _, made in said]
    assert tokens[:4] == tokens[4:] and tokens[0] == tokens[3] and len({*map(tuple, tokens)}) == 3


def test_requests_of_two_tenants_do_not_cross(decoder, server, store, capsys):
    """Both ask the same, 50 at a time: from the prefix cache or not, in batches and pool with all others, each answer
    is that of its own memory alone, by the logits of every token, which no other memory gives."""
    ids, many = ids_in(store), 3
    every = [("", asked(decoder, store, number, 0)) for number in range(5)]
    for number in range(5):
        for tenant, theirs in (("red", ids[:4]), ("blue", ids[4:8])):
            every += [(tenant, asked(decoder, store, number, read, among=theirs)) for read in (1, 2)]
    tokens = [alone(decoder, one)[:many] for _, one in every]
    assert {len(one) for one in tokens} == {many}
    wanted = torch.stack(
        [expected_logits(decoder, one, said[:-1]) for (_, one), said in zip(every, tokens, strict=True)]
    )
    draw = random.Random(0)
    order = [draw.randrange(len(every)) for _ in range(REQUESTS)]
    salts = [f"{number}" if draw.random() < 0.2 else None for number in range(REQUESTS)]

    def ask(number: int, salt: str | None) -> tuple[list[int], torch.Tensor]:
        """The tokens, and how far each token's logits are from those of every request (requests, tokens)."""
        tenant, one = every[number]
        memory = one.memory(server, tenant=tenant)
        said, tops = server.told(one.ids, memory, 20, max_tokens=many, **{} if salt is None else {"cache_salt": salt})
        away = [
            (wanted[:, step, list(top)] - torch.tensor(list(top.values()))).abs().amax(1)
            for step, top in enumerate(tops)
        ]
        return said, torch.stack(away, 1)

    furthest, nearest = 0.0, float("inf")
    with ThreadPoolExecutor(50) as threads:
        for number, (said, away) in zip(order, threads.map(ask, order, salts), strict=True):
            others = [other for other in range(len(every)) if other != number]
            furthest, nearest = max(furthest, float(away[number].max())), min(nearest, float(away[others, 0].min()))
            assert said == tokens[number] and furthest <= 1e-3 < 0.05 < nearest
    with capsys.disabled():
        print(f"\n{REQUESTS} requests, logits within {furthest:.1e} of their own, {nearest:.2f} from all others'")


def test_an_answer_says_that_it_has_read(decoder, server, store):
    one, plain = asked(decoder, store, 5, 2), asked(decoder, store, 5, 0)
    assert server.post(one.ids, one.memory(server)).json()["kv_transfer_params"] == {FIELD: {"segments": 2}}
    assert server.post(plain.ids).json()["kv_transfer_params"] is None


def test_forged_requests_fail_alone(decoder, server, store):
    one = asked(decoder, store, 6, 2)
    wanted, good = alone(decoder, one), one.memory(server)
    assert good is not None
    other = asked(decoder, store, 7, 1).memory(server, tenant="blue")
    assert other is not None
    draw = random.Random(0)
    made = chain(outdated(good[FIELD], KEY), forged(good[FIELD], other[FIELD], draw))
    every = [{FIELD: value} for value in islice(made, FORGERIES)]
    more = [{}, {"prompt_logprobs": 1}, {"stream": True}, {"n": 2}]

    def ask(memory: dict[str, Any]) -> bool:
        answer = server.post(one.ids, memory, **draw.choice(more))
        return '"error"' not in answer.text or re.search(r'"token_ids":\s*\[\s*\d', answer.text) is not None

    with ThreadPoolExecutor(12) as threads:
        told = threads.map(ask, every)
        right = [answered(decoder, server, one) for _ in range(5)]
        assert not any(told)
    assert right == [wanted] * 5 and answered(decoder, server, one) == wanted


def test_prompt_logprobs_do_not_go_round_the_memory(decoder, server, store):
    one = asked(decoder, store, 8, 2)
    assert answered(decoder, server, one, prompt_logprobs=1) == alone(decoder, one)


def test_missing_and_damaged_segments_fail_their_readers_alone(decoder, store, tmp_path):
    """On a copy of the store, under a server whose passes, cache and pool are too small for what is asked."""
    copy = tmp_path / "store"
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("catalogue*", "index"))
    ids = ids_in(copy)
    mib = 3.2 * max(page_mib(copy, one) for one in ids)
    tight = "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "6", "--num-gpu-blocks-override", "7"
    tight = *tight, "--max-model-len", "160"
    with start(copy, tmp_path, *tight, pool_mib=mib) as server:
        every = [asked(decoder, copy, n, (1, 2, 3, 0)[n % 4]) for n in range(20)]
        wanted = [alone(decoder, one) for one in every]
        with ThreadPoolExecutor(10) as threads:
            assert list(threads.map(lambda one: answered(decoder, server, one), every)) == wanted
        assert server.metric("vllm:num_preemptions_total") > 0, "the cache was large enough for all"

        too_many = asked(decoder, copy, 1, 8)
        assert server.post(too_many.ids, too_many.memory(server)).status_code == 500
        bad, gone = ids[0], ids[1]
        for number in range(8):  # others take the pages of those two
            one = asked(decoder, copy, number, 1)
            answered(decoder, server, one)
        path = next(copy.glob(f"segments/*/{bad}.safetensors"))
        data = bytearray(path.read_bytes())
        data[-7] ^= 0x40
        path.write_bytes(data)
        next(copy.glob(f"segments/*/{gone}.safetensors")).unlink()
        good = asked(decoder, copy, 0, 0)
        for name in (bad, gone, "0" * 32):
            refused = server.post(good.ids, server.memory([name], good.template))
            assert refused.status_code == 500 or name in (bad, gone)  # what lies in the pool is read on
        server.kill()
    with start(copy, tmp_path, pool_mib=mib) as server:
        for name in (bad, gone, "0" * 32):
            assert server.post(good.ids, server.memory([name], good.template)).status_code == 500
        sound = next(one for one in every if one.segments and not {bad, gone} & set(one.segments))
        assert answered(decoder, server, sound) == alone(decoder, sound)


def page_mib(store: Path, segment: str) -> float:
    from lloco_integrations.vllm.pool import pages_needed
    from lloco_integrations.vllm.shelf import page_bytes

    (found,) = segments_of(store, [segment])
    return pages_needed(found.lengths.tolist(), 1)[0] * page_bytes(found.keys.shape[1]) / 2**20


def test_three_ranks_read_as_one(decoder, store, tmp_path):
    with start(store, tmp_path, "--tensor-parallel-size", "3", pool_mib=64) as server:
        every = [asked(decoder, store, n, (0, 1, 4)[n % 3], (None, ADAPTER)[n % 2]) for n in range(6)]
        with ThreadPoolExecutor(6) as threads:
            made = list(threads.map(lambda one: answered(decoder, server, one), every))
        assert made == [alone(decoder, one) for one in every]
        signed = every[1].memory(server)
        assert signed is not None
        forged = {FIELD: json.loads(json.dumps(signed[FIELD])) | {"tenant": "another"}}
        assert server.post(every[1].ids, forged).status_code == 500


def test_requests_without_a_memory_are_untouched(decoder, server, store, tmp_path):
    every = [asked(decoder, store, n, 0) for n in range(4)]
    with_plugin = [server.logits(one.ids, None, 1000) for one in every]
    with start(store, tmp_path, plugin=False) as plain:
        assert [plain.logits(one.ids, None, 1000) for one in every] == with_plugin
