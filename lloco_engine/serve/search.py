"""Search without an answer: in a vector store, and vectors of texts to search with elsewhere."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from lloco_engine.serve.answers import file_of, source
from lloco_engine.serve.asking import EMBEDDINGS
from lloco_engine.serve.door import Asker, TheDoor
from lloco_engine.serve.errors import APIError
from lloco_engine.serve.filters import both, plain_filters
from lloco_engine.serve.groups import of_store
from lloco_engine.serve.schema import STRICT
from lloco_engine.serve.vector_stores import find_store
from lloco_engine.types import Hit

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["search"])
_MOST_TEXTS = 2048


class Ranking(BaseModel):
    """How results are ranked: by the store's own search."""

    model_config = STRICT

    ranker: Annotated[Literal["auto", "none"] | None, Field(description="There is one ranking.")] = None
    score_threshold: Annotated[float | None, Field(ge=0, le=1, description="Leave out what scores lower.")] = None


class SearchRequest(BaseModel):
    """A search of a vector store."""

    model_config = STRICT

    query: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    max_num_results: Annotated[int | None, Field(ge=1, le=50)] = None
    filters: Annotated[dict[str, Any] | None, Field(description="The API's, or the engine's own.")] = None
    ranking_options: Ranking | None = None
    rewrite_query: Annotated[Literal[False] | None, Field(description="The query is searched for as it is.")] = None


class EmbeddingRequest(BaseModel):
    """Texts to be embedded."""

    model_config = STRICT

    model: str
    input: str | Annotated[list[str], Field(min_length=1, max_length=_MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(description="The embedder's own; no other is served.")] = None
    user: Annotated[str | None, Field(description="A label, which is not read.")] = None


@router.post("/vector_stores/{store_id}/search", tags=["vector stores"])
def search(store_id: str, body: SearchRequest, door: TheDoor, caller: Asker) -> dict[str, Any]:
    """The chunks of a vector store that fit a query, best first, with the stretches that were found."""
    find_store(door, caller.tenant, store_id)
    query = body.query if isinstance(body.query, str) else body.query[0]
    if len(query) > door.limits.question_chars:
        message = (
            f"a query must have at most {door.limits.question_chars:,} characters, and this one has {len(query):,}"
        )
        raise APIError(400, message, "invalid_value", param="query")
    wanted = plain_filters(body.filters) if body.filters else None
    least = body.ranking_options.score_threshold if body.ranking_options else None
    hits = door.engine.retrieve(
        query,
        tenant=caller.tenant,
        filters=both(of_store(store_id), wanted),
        top_k=body.max_num_results or 10,
        min_score=least,
    )
    data = [_result(hit) for hit in hits]
    return {
        "object": "vector_store.search_results.page",
        "search_query": [query],
        "data": data,
        "has_more": False,
        "next_page": None,
    }


def _result(hit: Hit) -> dict[str, Any]:
    file, _ = file_of(hit.doc_id)
    plain = {key: value for key, value in hit.metadata.items() if isinstance(value, str | int | float | bool)}
    return {
        "file_id": file or hit.doc_id,
        "filename": hit.source or hit.doc_id,
        "score": min(1.0, max(0.0, hit.score)),
        "attributes": plain,
        "content": [{"type": "text", "text": hit.quote(one)} for one in hit.windows or (hit.span,)],
        "lloco": source(hit),
    }


@router.post("/embeddings")
async def embeddings(body: EmbeddingRequest, door: TheDoor, caller: Asker) -> dict[str, Any]:
    """Vectors of texts, by the store's own embedder."""
    embedder = door.engine.embedder
    if body.model not in (EMBEDDINGS, getattr(embedder, "name", EMBEDDINGS)):
        message = f"a model for embeddings must be {EMBEDDINGS!r}, not {body.model!r:.80}"
        raise APIError(404, message, "model_not_found", param="model")
    texts = [body.input] if isinstance(body.input, str) else body.input
    for number, text in enumerate(texts):
        if not text or len(text) > door.limits.question_chars:
            rule = f"a text must have from 1 to {door.limits.question_chars:,} characters"
            raise APIError(400, f"{rule}, and text {number} has {len(text):,}", "invalid_value", param="input")
    if body.dimensions not in (None, embedder.dim):
        message = f"dimensions must be {embedder.dim}, the embedder's own, not {body.dimensions}; leave it out"
        raise APIError(400, message, "invalid_value", param="dimensions")

    def work() -> tuple[Any, int]:
        return embedder.encode(texts), sum(len(door.engine.token_ids(text)) for text in texts)

    async with door.admission.place():
        vectors, tokens = await asyncio.to_thread(work)
    rows = [
        base64.b64encode(row.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else row.tolist()
        for row in vectors
    ]
    return {
        "object": "list",
        "model": body.model,
        "data": [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
