"""Several vLLM servers of one decoder over HTTP: which of them answers, and what is done when one does not.

They share nothing. A server that has read a segment lately has it in memory, so requests for one go to the same server
while that answers: by rendezvous hashing (Thaler and Ravishankar 1998), where a server that comes or goes moves its own
share of the segments and no others.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from lloco_engine import ConfigError, DecoderUnavailable

__all__ = ["Replicas", "Served", "parse_urls"]

_CONNECT_S, _WRITE_S = 5.0, 60.0
_DOWN_S = 5.0  # for which a server that failed is asked last
_PROVEN_S = 300.0  # after which a server is proven again: it may be another one by then
_DONE = "[DONE]"
_SHOWN = 600  # characters of what a server says
_FAILED = ("abort", "error")  # as which vLLM ends what it could not finish


@dataclass(frozen=True)
class Served:
    """A model of a server: ``longest`` are the tokens of its prompts and answers together, 0 where it does not say."""

    name: str
    longest: int


class _Failure(Exception):
    """A server did not answer, and another one may; ``down`` where that is no matter of the request."""

    def __init__(self, said: str, *, down: bool = True) -> None:
        super().__init__(said)
        self.down = down


def parse_urls(place: str) -> list[str]:
    """The servers that a decoder's name says, with commas between them.

    Raises:
        ConfigError: one is no address, or is there twice.
    """
    urls = []
    for one in place.split(","):
        url = one.strip().rstrip("/").removesuffix("/v1")
        parts = urlsplit(url)
        try:
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number
            sound = False
        if not sound or parts.query or parts.fragment or url in urls:
            raise ConfigError(
                "a decoder on vLLM must be 'vllm:http://host:port', several with commas between, each once, not "
                f"{one!r}"
            )
        urls.append(url)
    return urls


class Replicas:
    """The servers, asked from several threads.

    Args:
        urls: of `parse_urls`.
        api_key: that the servers were started with; "" for none.
        patience: seconds without a byte after which a server is given up.
    """

    def __init__(self, urls: Sequence[str], api_key: str = "", patience: float = 600.0) -> None:
        self.urls = tuple(urls)
        self._down: dict[str, float] = {}  # until when
        self._proven: dict[str, float] = {}  # when
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=httpx.Timeout(patience, connect=_CONNECT_S, write=_WRITE_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    def close(self) -> None:
        """Let go of all connections."""
        self._client.close()

    def models(self) -> dict[str, list[Served]]:
        """What each server that answers serves.

        Raises:
            DecoderUnavailable: none answers.
        """
        found: dict[str, list[Served]] = {}
        failures = []
        for url in self.urls:
            try:
                response = self._client.get(f"{url}/v1/models", timeout=30.0)
                _check_status(response)
                found[url] = [
                    Served(str(one["id"]), int(one.get("max_model_len") or 0)) for one in response.json()["data"]
                ]
            except (httpx.HTTPError, _Failure, ValueError, KeyError, TypeError, AttributeError) as error:
                failures.append(f"{url}: {_said(error)}")
        if not found:
            raise DecoderUnavailable(
                f"a vLLM server must answer, and none does ({'; '.join(failures)}); `lloco vllm-args` prints the "
                "command that starts one"
            )
        return found

    def prove(self, url: str, forbidden: Mapping[str, Any]) -> None:
        """See that a server refuses what it must: one without LLoCO's connector would answer without the memory.

        Args:
            url: which.
            forbidden: a request for a completion that must be refused.

        Raises:
            DecoderUnavailable: it answers.
        """
        now = time.monotonic()
        if now - self._proven.get(url, -_PROVEN_S) < _PROVEN_S:
            return
        response = self._client.post(f"{url}/v1/completions", json=dict(forbidden))
        if response.status_code == httpx.codes.OK:
            raise DecoderUnavailable(
                f"the vLLM server at {url} must refuse a memory that has expired, and does not, so it reads none: "
                "start it with LLoCO's connector (--kv-transfer-config), as `lloco vllm-args` prints"
            )
        if response.status_code not in (400, 500):  # as which a memory is refused
            _check_status(response)
        self._proven[url] = now

    def prove_all(self, urls: Iterable[str], forbidden: Mapping[str, Any]) -> None:
        """`prove` each of some servers.

        Raises:
            DecoderUnavailable: one answers, or cannot be reached.
        """
        for url in urls:
            try:
                self.prove(url, forbidden)
            except (httpx.HTTPError, _Failure) as error:
                raise DecoderUnavailable(f"the vLLM server at {url} does not answer: {_said(error)}") from error

    def complete(
        self, body: Callable[[], Mapping[str, Any]], key: str, forbidden: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Ask one of the servers for a completion, another one if that does not begin to answer.

        Args:
            body: makes the request, anew for each server.
            key: requests with the same one go to the same server while that answers.
            forbidden: as `prove` takes it, where the request has a memory.

        Yields:
            the events of the answer, each with a choice.

        Raises:
            DecoderUnavailable: no server begins to answer, one breaks off, or refuses.
        """
        failures = []
        for url in self._order(key):
            begun = 0
            try:
                if forbidden is not None:
                    self.prove(url, forbidden)
                for event in self._events(url, body()):
                    begun += 1
                    yield event
                self._down.pop(url, None)
                return
            except (httpx.HTTPError, _Failure) as error:
                if not isinstance(error, _Failure) or error.down:
                    self._down[url] = time.monotonic() + _DOWN_S
                    self._proven.pop(url, None)
                if begun:
                    raise DecoderUnavailable(
                        f"the vLLM server at {url} broke off in the middle of an answer: {_said(error)}; ask again"
                    ) from error
                failures.append(f"{url}: {_said(error)}")
        raise DecoderUnavailable(
            f"no vLLM server answers: {'; '.join(failures)}; where it is a memory that cannot be read, the servers' "
            "logs say why"
        )

    def _order(self, key: str) -> list[str]:
        """The servers in the order in which they are asked: by rendezvous, those that failed just now last."""
        now = time.monotonic()

        def rank(url: str) -> tuple[bool, bytes]:
            return self._down.get(url, 0.0) <= now, hashlib.sha256(f"{key}\n{url}".encode()).digest()

        return sorted(self.urls, key=rank, reverse=True)

    def _events(self, url: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with self._client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                _check_status(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == _DONE:
                    return
                event = _parsed(data)
                if "error" in event:
                    error = event["error"] if isinstance(event["error"], dict) else {"message": event["error"]}
                    _refuse(url, error.get("code"), str(error.get("message")))
                if event.get("choices"):
                    if event["choices"][0].get("finish_reason") in _FAILED:
                        raise _Failure("it could not finish the answer")
                    yield event
        raise _Failure("it closed the connection")


def _parsed(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise _Failure(f"it sends what is no JSON: {data:.80}") from error
    if not isinstance(event, dict):
        raise _Failure(f"it sends what is no event: {data:.80}")
    return event


def _check_status(response: httpx.Response) -> None:
    """Raise where a server does not answer with 200."""
    if response.status_code == httpx.codes.OK:
        return
    said = response.text
    try:
        body = response.json()
        said = str((body.get("error") or body)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    _refuse(str(response.request.url.copy_with(path="/")).rstrip("/"), response.status_code, said)


def _refuse(url: str, status: object, said: str) -> None:
    """Raise what a server says: another one is asked where it is not the request's fault."""
    said = " ".join(said.split())[:_SHOWN]
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        raise DecoderUnavailable(f"the vLLM server at {url} refuses the request ({status}): {said}")
    raise _Failure(f"{status}: {said}", down=status != 500)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
