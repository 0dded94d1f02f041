"""A server of vLLM's completions API for tests: real HTTP, and real answers of a tiny decoder.

It reads the segments of a request from the store's folder by itself, once their signature is verified, and decodes with
passes of its own: what it has in common with an engine is the decoder's weights.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.serve.running import listening
from lloco_engine.store.files import Layout
from lloco_engine.store.manifest import Manifest
from lloco_engine.store.segments import SegmentFiles
from lloco_engine.types import Prefix
from lloco_integrations.vllm.client import served_name
from lloco_integrations.vllm.params import Memory, Refused, store_fingerprint, verify

KEY = b"k" * 64


@dataclass
class Server:
    """One replica.

    Args:
        store: its folder.
        decoder: its own, with the adapters that it serves.
        fails: this many requests are answered with 500, as vLLM does: before the answer, or as its first event.
        breaks: events after which an answer is cut off; 0: none is.
        names: that it serves the decoder as; None is as it should.
        longest: tokens of prompt and answer.
    """

    store: Path
    decoder: LocalDecoder
    fails: int = 0
    fails_in_stream: bool = False
    reads: bool = True  # segments, as a server does that was started with the connector
    breaks: int = 0
    names: list[str] | None = None
    longest: int = 4096
    bodies: list[dict] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    sent: int = 0  # tokens

    def __post_init__(self) -> None:
        self.manifest = Manifest.load(self.store / "manifest.json")
        self.files = SegmentFiles.of(Layout(self.store), self.manifest.form)
        routes = [Route("/v1/models", self.models), Route("/v1/completions", self.complete, methods=["POST"])]
        self.app = Starlette(routes=routes)

    @property
    def served(self) -> list[str]:
        own = [served_name(self.manifest.decoder_fingerprint)] if self.names is None else self.names
        return [*own, *self.decoder.adapters]

    def models(self, _):
        return JSONResponse({"data": [{"id": name, "max_model_len": self.longest} for name in self.served]})

    async def complete(self, request):
        body = await request.json()
        if not body.get("stream"):
            return self.probed(body)
        self.bodies.append(body)
        if self.fails:
            self.fails -= 1
            if not self.fails_in_stream:
                return refusal(500, "EngineCore encountered an issue")
            return StreamingResponse(iter([event({"error": {"message": "a segment is missing", "code": 500}})]))
        if body["model"] not in self.served:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        try:
            fingerprint = store_fingerprint(json.loads((self.store / "manifest.json").read_text()))
            memory = verify(body.get("kv_transfer_params"), [KEY], store=fingerprint)
        except Refused as error:
            return refusal(400, str(error))
        return StreamingResponse(self.events(body, memory), media_type="text/event-stream")

    def probed(self, body: dict) -> JSONResponse:
        """What a request for no stream gets, which only says whether memories are verified here."""
        if self.reads:
            try:
                verify(body["kv_transfer_params"], [KEY])
            except Refused as error:
                return refusal(500, str(error))
        return JSONResponse({"choices": [{"text": "", "finish_reason": "length"}]})

    def events(self, body: dict, memory: Memory | None) -> Iterator[bytes]:
        finish = "length"
        for number, token in enumerate(self.tokens(body, memory), 1):
            self.sent += 1
            yield event({"choices": [{"index": 0, "text": "", "token_ids": [token], "finish_reason": None}]})
            if number == self.breaks:
                raise ConnectionResetError("killed")
            if token in body["stop_token_ids"]:
                finish = "stop"
        yield event({"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": finish}]})
        yield b"data: [DONE]\n\n"

    @torch.inference_mode()
    def tokens(self, body: dict, memory: Memory | None) -> Iterator[int]:
        """Greedy, or drawn by the request's seed; the end token is the last one."""
        decoder, most = self.decoder, body["max_tokens"]
        adapter = None if body["model"].startswith("lloco-") else body["model"]
        draw = None if body["seed"] is None else torch.Generator().manual_seed(body["seed"])
        read, offset = None, 0
        if "prompt_embeds" in body:
            vectors = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
            assert len(vectors) + most <= self.longest
            cache = decoder.new_cache(1, len(vectors) + most)
            hidden = decoder.step(vectors[None], 0, cache, None, adapter, wanted=1)
        else:
            template = decoder.template.prefix_ids
            assert body["prompt"][: len(template)] == template
            assert len(body["prompt"]) + most <= self.longest
            ids = body["prompt"][len(template) :]
            cache = decoder.start_cache(1, len(ids) + most, adapter)
            if memory is not None:
                self.memories.append(memory)
                assert memory.template == len(template)
                segments = tuple(self.files.read(one) for one in memory.segments)
                offset = max(segment.source_tokens for segment in segments)
                start = memory.template + offset
                prefix = Prefix(segments, (0,) * len(segments), start, focus=memory.focus, prior=memory.priors)
                read = decoder.memory([prefix])
            hidden = decoder.step([ids], offset, cache, read, adapter, wanted=1)
        for number in range(most):
            logits = decoder.runner.logits(hidden[:, -1])[0]
            if number < body["min_tokens"]:
                logits[body["stop_token_ids"]] = -torch.inf
            if body["temperature"]:
                weights = torch.softmax(logits / body["temperature"], 0)
                token = int(torch.multinomial(weights, 1, generator=draw))
            else:
                token = int(logits.argmax())
            yield token
            if token in body["stop_token_ids"]:
                return
            hidden = decoder.step([[token]], offset, cache, read, adapter, wanted=1)


def event(value: dict) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "Error", "param": None, "code": status}}, status)


@contextmanager
def running(*servers: Server) -> Iterator[list[str]]:
    """The servers' addresses while the block runs."""
    if not servers:
        yield []
        return
    with listening(servers[0].app) as address, running(*servers[1:]) as others:
        yield [address, *others]
