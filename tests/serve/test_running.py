"""What a server says of itself."""

from __future__ import annotations

import threading

from fastapi import FastAPI
from serve_cases import until

from lloco_engine.serve.running import ServerThatSays, uvicorn_config


def test_it_says_where_it_listens_and_when_it_has_stopped():
    said = []
    server = ServerThatSays(uvicorn_config(FastAPI(), "127.0.0.1", 0), said.append, "{address}/v1")
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: said, 30)
    port = server.servers[0].sockets[0].getsockname()[1]
    assert said == [f"listening on http://127.0.0.1:{port}/v1; Ctrl-C stops"]
    server.should_exit = True
    thread.join(30)
    assert said[1:] == ["stopped"]
