"""Memories of requests to vLLM that nobody with the key has signed as they are."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lloco_integrations.vllm.params import FIELD, Memory, sign

_SHAPELESS: tuple[Any, ...] = (None, 7, -1, 1.5, True, "", "x" * 64, [], {}, float("nan"), [[[]]], 10**400)
_CHARACTERS = '0123456789abcdef"{}[],:.- eE+tT'


def forged(signed: Mapping[str, Any], other: Mapping[str, Any], draw: random.Random) -> Iterator[Any]:
    """Values for `FIELD`, without end: each is a good one altered somewhere, made by another, or nothing of the kind.

    Args:
        signed, other: two good ones, of different segments.
        draw: what is altered, and how.
    """
    signed, other = same = [json.loads(json.dumps(one)) for one in (signed, other)]
    text = json.dumps(signed)

    def but(**changes: Any) -> dict[str, Any]:
        return {**signed, **changes}

    def digits(many: int) -> str:
        return f"{draw.getrandbits(4 * many):0{many}x}"

    def memory(**changes: Any) -> Memory:
        return Memory.of({name: value for name, value in but(**changes).items() if name != "signature"})

    def crossed() -> dict[str, Any]:
        return {name: draw.choice((signed, other))[name] for name in signed}

    def mistyped() -> Any:
        place = draw.randrange(len(text))
        put = draw.choice(("", draw.choice(_CHARACTERS), text[place] * 2))
        try:
            return json.loads(text[:place] + put + text[place + 1 :])
        except ValueError:
            return None

    kinds: list[Callable[[], Any]] = [
        lambda: but(signature=digits(64)),
        lambda: but(segments=[digits(32), *signed["segments"][1:]]),
        lambda: but(segments=[*signed["segments"], digits(32)], priors=[]),
        lambda: but(segments=[f"../{digits(29)}"]),
        lambda: but(tenant=draw.choice(["", "red ", "RED", "blue", "\ud800", "\u0000"])),
        lambda: but(expires=signed["expires"] + draw.choice([-1, 1, 1000])),
        lambda: but(focus=signed["focus"] + draw.randint(1, 9)),
        lambda: but(template=signed["template"] + draw.choice([-1, 1])),
        lambda: but(store=digits(64)),
        lambda: but(**{draw.choice(list(signed)): draw.choice(_SHAPELESS)}),
        lambda: but(**{digits(8): 1}),
        lambda: {name: signed[name] for name in draw.sample(list(signed), len(signed) - 1)},
        lambda: draw.choice(_SHAPELESS),
        crossed,
        mistyped,
        lambda: sign(memory(), [draw.randbytes(32)])[FIELD],
    ]
    while True:
        made = draw.choice(kinds)()
        if made not in same:  # 0 and 0.0 say the same
            yield made


def outdated(signed: Mapping[str, Any], key: bytes) -> list[dict[str, Any]]:
    """Such as are signed, of another time and another store."""
    told = {name: value for name, value in signed.items() if name != "signature"}
    changes: tuple[dict[str, Any], ...] = ({"expires": int(time.time()) - 1}, {"expires": 0}, {"store": "0" * 64})
    return [sign(Memory.of({**told, **one}), [key])[FIELD] for one in changes]
