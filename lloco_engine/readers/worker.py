"""The process that reads files which take a parser: ``python -m lloco_engine.readers.worker``, started by `apart`.

Requests come on stdin, answers go to stdout: `TAKEN`, a line of JSON, then as many bytes as it says. It ends with its
stdin, by itself after a file that left much memory behind, or by an alarm of its own where a file takes too long and no
parent is left to end it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from typing import IO, Any

from lloco_engine.config import ReadConfig
from lloco_engine.errors import DocumentError
from lloco_engine.readers.formats import parse
from lloco_engine.readers.parsed import TAKEN

__all__ = ["serve"]

_GRACE = 5  # seconds after the parent's own limit
_MOST_LEFT = 200 * 2**20  # bytes that files may leave behind in a process; one with more ends
_SPARE = 8 * 2**20  # bytes let go of when memory runs out, so that there is room to say so


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are none left."""
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["size"])
        if len(data) < request["size"]:
            return
        answers.write(TAKEN)
        answers.flush()
        config = ReadConfig.from_json(request["config"])
        head, body = _answer(request["suffix"], data, config)
        del data
        answers.write(json.dumps(head | {"size": len(body)}).encode("ascii") + b"\n")
        answers.write(body)
        answers.flush()
        del body
        if _resident() > _MOST_LEFT:
            return  # so that no file has less room because of those before it


def _answer(suffix: str, data: bytes, config: ReadConfig) -> tuple[dict[str, Any], bytes]:
    if hasattr(signal, "alarm"):
        signal.alarm(math.ceil(config.max_seconds) + _GRACE)
    spare = bytearray(_SPARE)
    try:
        with _memory(config.max_memory):
            parsed = parse(suffix, data, config)
            pages = [[page.number, page.label, page.span.start, page.span.end] for page in parsed.pages]
            head = {"title": parsed.title, "encoding": parsed.encoding, "pages": pages}
            return head, parsed.text.encode("utf-8", "surrogatepass")
    except DocumentError as error:
        return {"error": str(error)}, b""
    except MemoryError:
        del spare
        return {"error": "", "memory": True}, b""
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _resident() -> int:
    """Bytes of memory that the process has now; 0 where that is not told."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


@contextlib.contextmanager
def _memory(limit: int) -> Any:
    """Let the process have ``limit`` bytes, where the system can see to it."""
    try:
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    except (ImportError, ValueError, OSError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> None:
    """Serve on stdin and stdout, with nothing else able to write there."""
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
