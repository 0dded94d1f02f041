"""LLoCO inside LlamaIndex: an index, query engine or chat engine reads segments where it read the text of chunks.

::

    from lloco_engine import Engine
    from lloco_integrations.llama_index import LLoCOLLM, LLoCONodePostprocessor

    engine = Engine.open("my-store")
    query_engine = index.as_query_engine(
        llm=LLoCOLLM(engine), node_postprocessors=[LLoCONodePostprocessor(engine, on_missing="compress")]
    )

Needs llama-index-core: ``pip install 'lloco[llama-index]'``.
"""

from lloco_integrations.llama_index.chat_engine import LLoCOContextChatEngine
from lloco_integrations.llama_index.citation import LLoCOCitationQueryEngine
from lloco_integrations.llama_index.embedding import LLoCOEmbedding
from lloco_integrations.llama_index.llm import LLoCOLLM
from lloco_integrations.llama_index.node import LLoCONode
from lloco_integrations.llama_index.postprocessor import LLoCONodePostprocessor
from lloco_integrations.llama_index.prompt_helper import LLoCOPromptHelper, TokenCounter
from lloco_integrations.llama_index.retriever import LLoCORetriever
from lloco_integrations.llama_index.transform import LLoCOTransform
from lloco_integrations.llama_index.vector_store import LLoCOVectorStore

__all__ = [
    "LLoCOCitationQueryEngine",
    "LLoCOContextChatEngine",
    "LLoCOEmbedding",
    "LLoCOLLM",
    "LLoCONode",
    "LLoCONodePostprocessor",
    "LLoCOPromptHelper",
    "LLoCORetriever",
    "LLoCOTransform",
    "LLoCOVectorStore",
    "TokenCounter",
]
