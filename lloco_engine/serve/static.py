"""The page at ``/`` with its files, and the API to read at ``/docs``. Nothing comes from another host."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from lloco_engine.serve.errors import not_found

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KINDS = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
_FOLDER = resources.files("lloco_engine.serve") / "page"


def _file(name: str) -> Response:
    """A file of the page, which is one of those that lie there: no path is made of what was asked for."""
    for entry in _FOLDER.iterdir() if _FOLDER.is_dir() else ():
        kind = _KINDS.get(name.rpartition(".")[2])
        if entry.name == name and kind and entry.is_file():
            headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
            return Response(entry.read_bytes(), media_type=kind, headers=headers)
    raise not_found("part of the page", name, "the page itself is at /")


@router.get("/")
def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}")
def part(name: str) -> Response:
    """A script, a style or a picture of the page."""
    return _file(name)


@router.get("/docs")
def docs(request: Request) -> Response:
    """The API as a page to read, without a script."""
    described = request.app.openapi()
    rows = [
        _operation(method, path, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in described.get("components", {}).get("schemas", {}).items()]
    text = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>LLoCO: the API</title>"
        "<meta name='viewport' content='width=device-width'></head><body><main><h1>The API</h1>"
        f"<p>{escape(described['info']['description'])} For programs: <a href='/openapi.json'>openapi.json</a>.</p>"
        f"<h2>Requests</h2><dl>{''.join(rows)}</dl><h2>Bodies</h2>{''.join(schemas)}</main></body></html>"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    said = escape(str(operation.get("description") or operation.get("summary", "")))
    names = ", ".join(escape(str(one["name"])) for one in operation.get("parameters", ()))
    taken = f" Parameters: {names}." if names else ""
    return f"<dt><code>{escape(method.upper())} {escape(path)}</code></dt><dd>{said}{taken}</dd>"


def _schema(name: str, schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{escape(str(about.get('description', '')))}</td></tr>"
        for field, about in schema.get("properties", {}).items()
    )
    return f"<h3>{escape(name)}</h3><table><tbody>{rows}</tbody></table>" if rows else ""
