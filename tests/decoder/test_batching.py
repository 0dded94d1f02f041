"""Steps that several answers share: what each is given is what it would be given alone, whatever the others do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from any_decoder_cases import SERVED, tiny_of
from decoder_cases import OTHERS, TEXT, place, save_adapter, tiny, whole

from lloco_engine.config import GenerateConfig
from lloco_engine.decoder import batching, memory
from lloco_engine.decoder.batching import LIMIT, Batching, Stream
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.decoder.processors import Pipeline
from lloco_engine.testing import tiny_tokenizer

ANY = ("gemma2", "gpt_oss", "mixtral", "opt", "qwen2, some layers sliding", "llama4_text", "gemma4_text", "deepseek_v3")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LONG = GenerateConfig(max_new_tokens=24, min_new_tokens=24)


# -- one pass for several streams -----------------------------------------------------------------------------------


def streams_of(decoder: LocalDecoder, prompts: Sequence[Prompt], room: int = 16) -> list[Stream]:
    """A stream for each prompt, which has been read."""
    made = []
    for prompt in prompts:
        ids = decoder.prompt_ids(prompt)
        cache = decoder.start_cache(1, len(ids) + room, None)
        offset, memory = decoder.position(prompt) - cache.length, decoder.memory([prompt.prefix])
        decoder.step([ids], offset, cache, memory, None, wanted=1)
        made.append(Stream(decoder._batching, cache, memory, None, offset))
    return made


def prompts_of(decoder: LocalDecoder, focus: int = 1) -> list[Prompt]:
    """Without segments, with several and with one, some in half precision; of different lengths."""
    one, *more = (whole(decoder, text) for text in (TEXT, *OTHERS))
    half = replace(one, keys=one.keys.half(), values=one.values.half())
    return [
        Prompt("Who keeps the mill?", replace(place(decoder, [half, *more]), focus=focus)),
        Prompt("Who?"),
        Prompt("Why does a tram carry a dog on the green line?", place(decoder, [half])),
        Prompt("How many wheels?", place(decoder, more), context=None),
    ]


@torch.inference_mode()
def read_together(decoder: LocalDecoder, prompts: Sequence[Prompt]) -> None:
    together, alone = streams_of(decoder, prompts), streams_of(decoder, prompts)
    for turn in range(3):
        for number, (one, other) in enumerate(zip(together, alone, strict=True)):
            one.ask([5 + number + turn + at for at in range(1 + (number + turn) % 3)])
            other.ask(one.tokens)
        found = decoder._shared_step(together)
        for one, other, logits in zip(together, alone, found, strict=True):
            torch.testing.assert_close(logits, decoder._shared_step([other])[0], **CLOSE)
            assert one.cache.length == other.cache.length
            for mine, its in zip(one.cache.keys, other.cache.keys, strict=True):
                torch.testing.assert_close(mine[:, :, : one.cache.length], its[:, :, : one.cache.length], **CLOSE)


@pytest.mark.parametrize("focus", [0, 1, 2])
@pytest.mark.parametrize("reads", ["kernel", "torch"])
def test_streams_read_together_what_they_read_alone(monkeypatch, reads, focus):
    if reads == "torch":
        monkeypatch.setattr(memory.cpu_kernel, "reader", lambda *_: None)
    decoder = tiny()
    read_together(decoder, prompts_of(decoder, focus))
    read_together(decoder, [Prompt("Who?"), Prompt("Who keeps the mill?")])  # none has segments


@pytest.mark.parametrize("name", ANY)
def test_any_decoder_reads_streams_together(name):
    kind, changes = SERVED[name]
    decoder = LocalDecoder(tiny_of(kind, **changes), tiny_tokenizer(), "tiny")
    read_together(decoder, [Prompt(text * 3) for text in (TEXT, *OTHERS)])


def test_a_step_that_does_not_fit_one_cache_leaves_all_as_they_were():
    decoder = tiny()
    roomy, full = streams_of(decoder, [Prompt("Who?")])[0], streams_of(decoder, [Prompt("Who?")], room=0)[0]
    before = roomy.cache.length, full.cache.length
    for one in (roomy, full):
        one.ask([5])
    with torch.inference_mode(), pytest.raises(ValueError, match="the cache holds"):
        decoder._shared_step([roomy, full])
    assert (roomy.cache.length, full.cache.length) == before


# -- who runs a step ------------------------------------------------------------------------------------------------


class Steps:
    """A decoder that answers each token with its double, and keeps which streams shared a step."""

    def __init__(self) -> None:
        self.shared: list[list[Stream]] = []
        self.fails: Callable[[Sequence[Stream]], bool] = lambda _: False
        self.batching = Batching(self.run)

    def run(self, streams: Sequence[Stream]) -> list[torch.Tensor]:
        self.shared.append(list(streams))
        time.sleep(0.001)  # others come meanwhile
        if self.fails(streams):
            raise ArithmeticError("one of these cannot be run")
        return [torch.tensor([[2.0 * token for token in one.tokens]]) for one in streams]

    def stream(self, adapter: str | None = None) -> Stream:
        return Stream(self.batching, None, None, adapter, 0)


def together(*work: Callable[[], object]) -> list[object]:
    """What calls give, each in a thread of its own; errors are given too."""
    given: dict[int, object] = {}

    def do(number: int) -> None:
        try:
            given[number] = work[number]()
        except Exception as error:
            given[number] = error

    threads = [threading.Thread(target=do, args=(number,), daemon=True) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return [given[number] for number in range(len(work))]


def many_steps(stream: Stream, first: int, count: int = 30) -> Callable[[], list[float]]:
    def work() -> list[float]:
        try:
            return [float(stream([[first + at]])[0, 0]) for at in range(count)]
        finally:
            stream.close()

    return work


def doubles(first: int, count: int = 30) -> list[float]:
    return [2.0 * (first + at) for at in range(count)]


def test_every_stream_is_given_its_own():
    steps = Steps()
    adapters = [None, "a", "b"]
    work = [many_steps(steps.stream(adapters[number % 3]), 100 * number) for number in range(9)]
    assert together(*work) == [doubles(100 * number) for number in range(9)]
    assert all(len({one.adapter for one in shared}) == 1 for shared in steps.shared)
    assert max(map(len, steps.shared)) > 1
    assert not steps.batching.crowded


def test_streams_that_keep_pace_share_every_step(monkeypatch):
    monkeypatch.setattr(batching, "_SHORTEST_S", 5.0)  # so long as this is waited for who was there before
    monkeypatch.setattr(batching, "_LONGEST_S", 5.0)
    steps = Steps()
    all_there = threading.Barrier(4)

    def work(number: int) -> list[float]:
        run = many_steps(steps.stream(), number)
        all_there.wait(30)
        return run()

    assert together(*(partial(work, number) for number in range(4))) == [doubles(number) for number in range(4)]
    sizes = list(map(len, steps.shared))
    assert sum(sizes) == 120
    behind = sizes[sizes.index(4) :]  # once all have come, none is left out until it has ended
    assert behind == sorted(behind, reverse=True)
    assert len(behind) <= 30


def test_the_first_in_the_queue_are_run_first_and_no_more_than_the_limit():
    steps = Steps()
    first, gate = steps.stream(), threading.Event()
    steps.fails = lambda streams: not gate.wait(10)  # a step that takes until all have come
    others = [steps.stream() for _ in range(LIMIT + 3)]
    held = threading.Thread(target=lambda: (first([[1]]), first.close()))
    held.start()
    arrived = []

    def come(stream: Stream) -> Callable[[], None]:
        def work() -> None:
            stream([[1]])
            stream.close()

        return work

    threads = []
    for other in others:  # one after the other
        threads.append(threading.Thread(target=come(other)))
        threads[-1].start()
        while other not in steps.batching._queue:
            pass
        arrived.append(other)
    gate.set()
    for thread in (held, *threads):
        thread.join(10)
    assert [shared for shared in steps.shared if shared != [first]] == [arrived[:LIMIT], arrived[LIMIT:]]


def test_who_does_not_come_back_is_waited_for_once():
    steps = Steps()
    idle = steps.stream()
    both = threading.Barrier(2)

    def once() -> float:
        both.wait()
        return float(idle([[1]])[0, 0])  # and asks for no other step, as one whose reader is slow

    busy = many_steps(steps.stream(), 7)
    assert together(once, lambda: (both.wait(), busy())[1]) == [2.0, doubles(7)]
    assert steps.batching._expected <= {idle}
    assert float(idle([[4]])[0, 0]) == 8.0


def test_streams_that_one_thread_reads_in_turn_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(batching, "_SHORTEST_S", 5.0)
    monkeypatch.setattr(batching, "_LONGEST_S", 5.0)
    steps = Steps()
    one, other = steps.stream(), steps.stream()
    began = time.perf_counter()
    found = [float(stream([[at]])[0, 0]) for at in range(10) for stream in (one, other)]
    assert found == [2.0 * at for at in range(10) for _ in range(2)]
    assert time.perf_counter() - began < 5


def test_prompts_are_read_together_up_to_a_piece_between_two_steps(monkeypatch):
    monkeypatch.setattr(batching, "_SHORTEST_S", 5.0)
    monkeypatch.setattr(batching, "_LONGEST_S", 5.0)
    monkeypatch.setattr(batching, "PIECE", 10)
    steps = Steps()
    with steps.batching.turn(1000) as most:
        assert most == 1000, "nobody else is answered"
    running, gate = steps.stream(), threading.Event()
    running([[1]])
    steps.fails = lambda streams: not gate.wait(10)  # a step that takes until it is let go
    stepping = threading.Thread(target=lambda: running([[2]]))
    stepping.start()
    while len(steps.shared) < 2:
        time.sleep(0.001)
    read = []

    def reads() -> None:
        for left in (6, 4, 1000):
            with steps.batching.turn(left) as most:
                read.append((most, gate.is_set()))

    reading = threading.Thread(target=reads)
    reading.start()
    while len(read) < 2:
        time.sleep(0.001)
    gate.set()
    for thread in (stepping, reading):
        thread.join(10)
    assert read == [(6, False), (4, False), (10, True)]


def test_a_step_that_fails_is_run_one_by_one_and_harms_none_but_the_one_at_fault():
    steps = Steps()
    bad = steps.stream()
    steps.fails = lambda streams: bad in streams
    work = [many_steps(steps.stream(), number) for number in range(3)]
    *good, failed = together(*work, many_steps(bad, 50))
    assert good == [doubles(number) for number in range(3)]
    assert isinstance(failed, ArithmeticError)


def test_who_is_interrupted_while_running_a_step_leaves_the_others_going():
    steps = Steps()
    interrupted = steps.stream()

    def fails(streams: Sequence[Stream]) -> bool:
        if threading.current_thread().name == "interrupted" and len(steps.shared) > 5:
            raise KeyboardInterrupt
        return False

    steps.fails = fails
    ended = []

    def work() -> None:
        threading.current_thread().name = "interrupted"
        try:
            many_steps(interrupted, 1, 10_000)()
        except KeyboardInterrupt:
            ended.append(True)

    others = [many_steps(steps.stream(), number) for number in range(3)]
    assert together(*others, work)[:3] == [doubles(number) for number in range(3)]
    assert ended == [True]


# -- whole answers --------------------------------------------------------------------------------------------------


Job = tuple[Prompt, GenerateConfig, str | None]


def answered(decoder: LocalDecoder, job: Job, started: threading.Barrier | None = None) -> list[int]:
    generation, pieces = decoder.stream(*job)
    if started is not None:
        started.wait(10)
    "".join(pieces)
    return generation.token_ids


def beside(decoder: LocalDecoder, jobs: Sequence[Job]) -> list[object]:
    """The answers of all at the same time, some steps of which were shared."""
    started, shared = threading.Barrier(len(jobs)), []
    run = decoder._joint.run
    decoder._joint.run = lambda streams: (shared.append(len(streams)), run(streams))[1]
    try:
        return together(*(lambda job=job: answered(decoder, job, started) for job in jobs))
    finally:
        decoder._joint.run = run
        assert shared, "no step was shared"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> LocalDecoder:
    made = tiny()
    for number, name in enumerate(("north", "south")):
        folder = tmp_path_factory.mktemp("adapters") / name
        save_adapter(folder, number)
        made.load_adapter(folder, name)
    return made


def jobs_of(decoder: LocalDecoder) -> list[Job]:
    one, other, third, fourth = prompts_of(decoder)
    drafted = replace(one, draft=TEXT)
    return [
        (drafted, LONG, None),
        (other, replace(LONG, temperature=1.0, seed=3), None),
        (third, replace(LONG, temperature=0.7, top_p=0.9, seed=4), "north"),
        (fourth, replace(LONG, repetition_penalty=1.3, no_repeat_ngram=2), "south"),
        (one, replace(LONG, beams=3, min_new_tokens=0), None),
        (third, LONG, "north"),
        (replace(other, context=TEXT), LONG, None),
    ]


def test_answers_are_the_same_beside_others_as_alone(decoder):
    jobs = jobs_of(decoder)
    alone = [answered(decoder, job) for job in jobs]
    for _ in range(2):
        assert beside(decoder, jobs) == alone


def test_an_answer_that_ends_early_leaves_the_others(decoder):
    prompt = prompts_of(decoder)[0]
    text = decoder.generate([prompt], LONG)[0].text
    stopped = (prompt, replace(LONG, stop=(text[6:9],)), None)
    short = (prompt, GenerateConfig(max_new_tokens=3), None)
    jobs = [stopped, short, *jobs_of(decoder)[:3]]
    assert beside(decoder, jobs) == [answered(decoder, job) for job in jobs]


def test_a_long_prompt_is_read_in_pieces_between_the_steps_of_others(decoder, monkeypatch):
    monkeypatch.setattr(batching, "PIECE", 16)
    prompt = replace(prompts_of(decoder)[1], context=TEXT * 2)
    job = (prompt, LONG, None)
    alone = answered(decoder, job)
    read, step = [], decoder.step

    def noted(inputs, *given, **more):
        read.append(len(inputs[0]))
        return step(inputs, *given, **more)

    monkeypatch.setattr(decoder, "step", noted)
    generation, pieces = decoder.stream(prompts_of(decoder)[0], LONG)
    next(pieces)
    while not decoder._batching._expected:
        next(pieces, None)
    read.clear()
    assert answered(decoder, job) == alone
    assert read[:4] == [16] * 4
    "".join(pieces)
    assert generation.finish == "length"


def test_an_error_in_one_answer_s_processor_is_its_own(decoder, monkeypatch):
    call = Pipeline.__call__

    def failing(self, logits, answers):
        if len(answers[0]) == 5 and threading.current_thread().name == "fails":
            raise ArithmeticError("a processor of this answer's own")
        return call(self, logits, answers)

    monkeypatch.setattr(Pipeline, "__call__", failing)
    job = (prompts_of(decoder)[0], LONG, None)
    alone = answered(decoder, job)
    started = threading.Barrier(3)

    def fails() -> list[int]:
        threading.current_thread().name = "fails"
        return answered(decoder, job, started)

    found = together(fails, *[lambda: answered(decoder, job, started)] * 2)
    assert isinstance(found[0], ArithmeticError)
    assert found[1:] == [alone, alone]
    assert not decoder._batching._expected


def test_an_answer_that_is_dropped_or_closed_is_not_waited_for(decoder):
    job = (prompts_of(decoder)[0], LONG, None)
    alone = answered(decoder, job)
    streams = [decoder.stream(*job)[1] for _ in range(3)]
    for pieces in streams:
        for _ in range(3):
            next(pieces)
    streams.pop().close()
    del streams[0], pieces
    assert answered(decoder, job) == alone
    "".join(streams.pop())
    assert not decoder._batching._expected
