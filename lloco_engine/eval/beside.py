"""``python -m lloco_engine.eval.beside``: how many tokens a second one engine makes, asked by 1, 2, 4 and 8 threads.

All ask the same questions over the same hits of one store, the demo's by default, and each count of threads takes its
turn in each round, so that a machine that becomes slower meanwhile does not count. Answers are compared with those
given alone, token by token.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lloco_engine.config import GenerateConfig
from lloco_engine.engine import Engine
from lloco_engine.errors import LLoCOError

if TYPE_CHECKING:
    from lloco_engine.types import Answer, Hit

__all__ = ["main", "run"]


def run(
    engine: Engine,
    questions: Sequence[str],
    threads: Sequence[int] = (1, 2, 4, 8),
    new_tokens: int = 64,
    rounds: int = 3,
) -> dict[str, Any]:
    """Measure.

    Args:
        engine: is asked.
        questions: what it is asked in every measurement, each once.
        threads: how many ask beside each other; the first is what the others are compared with.
        new_tokens: greedy tokens of every answer.
        rounds: of measurements of each count of threads, after one that warms up.

    Returns:
        JSON-ready, by count of threads: ``tokens_per_s`` of all together from the first question to the last token, and
        ``decode_tokens_per_s`` of as many answers as there are threads from their first tokens on; ``over_first`` and
        ``decode_over_first``, medians of ratios within a round; ``ttft_s``, the median first token; ``same_answers``,
        the share that are token for token those that one thread was given before.
    """
    from lloco_engine.eval.machine import circumstances
    from lloco_engine.eval.timing import median_ratio

    generate = GenerateConfig(new_tokens, min_new_tokens=new_tokens)
    hits = [tuple(engine.retrieve(question)) for question in questions]
    asked = list(zip(questions, hits, strict=True))
    alone, _ = _ask_all(engine, asked, 1, generate)
    speeds: dict[int, list[float]] = {count: [] for count in threads}
    decoding: dict[int, list[float]] = {count: [] for count in threads}
    first_tokens: dict[int, list[float]] = {count: [] for count in threads}
    same = dict.fromkeys(threads, 0)
    for _ in range(rounds):
        for count in threads:
            answers, took = _ask_all(engine, asked, count, generate)
            speeds[count].append(sum(len(answer.token_ids) for answer in answers) / took)
            each_s = [answer.usage.decode_s for answer in answers]
            decoding[count].append(count * (new_tokens - 1) / median(each_s))
            first_tokens[count].append(median(answer.usage.ttft_s for answer in answers))
            same[count] += sum(a.token_ids == b.token_ids for a, b in zip(answers, alone, strict=True))
    runner = engine.local_decoder.runner
    return {
        "tokens_per_s": {count: median(each) for count, each in speeds.items()},
        "over_first": {
            count: median_ratio(list(zip(speeds[threads[0]], each, strict=True))) for count, each in speeds.items()
        },
        "decode_tokens_per_s": {count: median(each) for count, each in decoding.items()},
        "decode_over_first": {
            count: median_ratio(list(zip(decoding[threads[0]], each, strict=True))) for count, each in decoding.items()
        },
        "ttft_s": {count: median(each) for count, each in first_tokens.items()},
        "same_answers": {count: number / (rounds * len(asked)) for count, number in same.items()},
        "questions": len(asked),
        "new_tokens": new_tokens,
        "rounds": rounds,
        **circumstances(runner.device, runner.dtype),
    }


def _ask_all(
    engine: Engine, asked: Sequence[tuple[str, tuple[Hit, ...]]], threads: int, generate: GenerateConfig
) -> tuple[list[Answer], float]:
    """The answers, asked for by so many threads, and the seconds that all of them took."""
    answers: dict[int, Answer] = {}
    failed: list[BaseException] = []
    rest = iter(range(len(asked)))

    def work() -> None:
        try:
            for number in rest:
                question, hits = asked[number]
                answers[number] = engine.ask(question, hits=hits, generate=generate)
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - began
    if failed:
        raise failed[0]
    return [answers[number] for number in range(len(asked))], took


@contextmanager
def _demo(store: Path | None) -> Iterator[Engine]:
    """An engine over a store, or over the demo's, which is filled where it is not."""
    from lloco_engine.demo import documents_folder
    from lloco_engine.models import cache_folder

    with Engine.open(store or cache_folder() / "demo" / "store-16") as engine:
        if store is None:
            engine.ingest(documents_folder())
        yield engine


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    from lloco_engine.demo import questions
    from lloco_engine.eval.machine import check_writable, write_json

    parser = argparse.ArgumentParser(prog="python -m lloco_engine.eval.beside", description=__doc__)
    parser.add_argument("--store", type=Path, metavar="DIR", help="of documents (default: the demo's)")
    parser.add_argument("--threads", default="1,2,4,8", metavar="NUMBERS", help="how many ask (1,2,4,8)")
    parser.add_argument("--questions", type=int, default=8, metavar="N", help="of the demo's questions (8)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here too")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.json is not None:
            check_writable(chosen.json)
        with _demo(chosen.store) as engine:
            some = [question.question for question in questions()][: chosen.questions]
            result = run(engine, some, [int(one) for one in chosen.threads.split(",")], chosen.tokens, chosen.rounds)
    except LLoCOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for count, speed in result["tokens_per_s"].items():
        decoding = result["decode_tokens_per_s"][count], result["decode_over_first"][count]
        print(
            f"{count:>3} beside each other: {speed:6.1f} tokens/s from question to end, "
            f"{result['over_first'][count]:.2f} times; {decoding[0]:6.1f} from first token to last, {decoding[1]:.2f} "
            f"times; first token {result['ttft_s'][count]:.3f} s; {result['same_answers'][count]:.0%} as alone"
        )
    if chosen.json is not None:
        write_json(chosen.json, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
