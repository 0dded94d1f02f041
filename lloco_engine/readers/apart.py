"""Reading a file in a process of its own, which can be ended: one process, started when it is first needed, kept for
the next file, and started again after it had to be ended.

It is a plain subprocess that speaks JSON over pipes: no pickle, nothing of ``__main__`` is imported, and it ends with
its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading

from lloco_engine.config import ReadConfig
from lloco_engine.errors import DocumentError
from lloco_engine.readers.parsed import TAKEN, Parsed
from lloco_engine.types import Page, Span

__all__ = ["parse_apart"]


def parse_apart(suffix: str, data: bytes, config: ReadConfig) -> Parsed:
    """As `formats.parse`, within ``config.max_seconds`` and ``config.max_memory``.

    Safe from several threads, which take turns, and after a fork.

    Raises:
        DocumentError: names the rule that the file breaks.
    """
    return _reader.parse(suffix, data, config)


class _Reader:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def parse(self, suffix: str, data: bytes, config: ReadConfig) -> Parsed:
        with self._lock:
            used = self._process is not None
            try:
                return self._parse(suffix, data, config)
            except _NotTaken:
                if not used:
                    raise
                return self._parse(suffix, data, config)  # it had ended while it waited

    def _parse(self, suffix: str, data: bytes, config: ReadConfig) -> Parsed:
        process = self._started()
        expired = threading.Event()

        def end() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(config.max_seconds, end)
        timer.daemon = True
        code: int | None = None
        taken = False
        answer: Parsed | DocumentError | None = None
        timer.start()
        try:
            _hand_over(process, suffix, data, config)
            taken = True
            answer = _answer(process, config)
        except (OSError, ValueError):  # the pipe broke, or the answer did
            answer = None
        finally:
            timer.cancel()
            if answer is None or isinstance(answer, _OutOfMemory) or expired.is_set():
                code = self._end()
        if isinstance(answer, DocumentError):
            raise answer
        if answer is not None:
            return answer
        if expired.is_set():
            raise DocumentError(
                f"a file must be read within {config.max_seconds:g} seconds, and this one was not; raise max_seconds"
            )
        raise (DocumentError if taken else _NotTaken)(
            f"a file must be read within {config.max_memory:,} bytes of memory, and this one ended its reader "
            f"(exit code {code}); raise max_memory, or repair the file"
        )

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            # What can be imported here can be there, and nothing else: -P keeps the working folder out.
            path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lloco_engine.readers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        return self._process

    def _end(self) -> int | None:
        """End the process; its exit code, None where there is none."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return process.wait()

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a forked child: the process is the parent's."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is None:
            return
        process.returncode = 0  # not ours to wait for
        nowhere = os.open(os.devnull, os.O_RDWR)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not pipe.closed:
                os.dup2(nowhere, pipe.fileno())  # what a buffer still holds goes nowhere
        os.close(nowhere)


def _hand_over(process: subprocess.Popen[bytes], suffix: str, data: bytes, config: ReadConfig) -> None:
    """Give the process a file, and wait until it says that it has it.

    Raises:
        OSError, ValueError: the process had ended before.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    request = {"suffix": suffix, "size": len(data), "config": config.to_json()}
    process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
    process.stdin.write(data)
    process.stdin.flush()
    if process.stdout.readline() != TAKEN:
        raise ValueError("not taken")


def _answer(process: subprocess.Popen[bytes], config: ReadConfig) -> Parsed | DocumentError:
    """What the process answers of the file that it has, which may be an error.

    Raises:
        OSError, ValueError: the process ended before its answer did.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise ValueError("no answer")
    head = json.loads(line)
    body = process.stdout.read(head["size"])
    if len(body) < head["size"]:
        raise ValueError("half an answer")
    if head.get("memory"):
        return _OutOfMemory(config)
    if "error" in head:
        return DocumentError(head["error"])
    pages = tuple(Page(number, label, Span(start, end)) for number, label, start, end in head["pages"])
    return Parsed(head["title"], body.decode("utf-8", "surrogatepass"), head["encoding"], pages)


class _NotTaken(DocumentError):
    """The process ended before it had the file, which another may read; one that ends its reader is not tried twice."""


class _OutOfMemory(DocumentError):
    def __init__(self, config: ReadConfig) -> None:
        super().__init__(
            f"a file must be read within {config.max_memory:,} bytes of memory, and this one needs more; "
            "raise max_memory, or split it"
        )


_reader = _Reader()
atexit.register(_reader.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reader.forget)
