"""What the tests of the LlamaIndex integration share."""

from __future__ import annotations

from integration_cases import TENANTS, TOPICS, gated, story
from llama_index.core import VectorStoreIndex
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode

from lloco_engine import Engine
from lloco_integrations.llama_index import LLoCOEmbedding

QUESTION = "List the halls of the pump."  # the tiny decoder says many different things to it


def nodes(tenant: str = "red", topics: tuple[str, ...] = TOPICS) -> list[TextNode]:
    """The chunks that a store of `integration_cases` knows, as another index holds them."""
    return [TextNode(text=story(t, tenant), id_=f"{t}-{tenant}", metadata={"file": f"{t}.txt"}) for t in topics]


def plain_index(engine: Engine, tenant: str = "red") -> VectorStoreIndex:
    """An index of LlamaIndex's own make, which knows nothing of segments."""
    return VectorStoreIndex(nodes(tenant), embed_model=LLoCOEmbedding(engine))


def chat_memory() -> ChatMemoryBuffer:
    """Memory in a list: the default one opens a database in a thread that it leaves to the garbage collector."""
    return ChatMemoryBuffer.from_defaults(token_limit=3000)


__all__ = ["QUESTION", "TENANTS", "TOPICS", "chat_memory", "gated", "nodes", "plain_index", "story"]
