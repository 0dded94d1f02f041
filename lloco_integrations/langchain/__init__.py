"""LLoCO in LangChain: drop-in classes whose prompts hold handles instead of text."""

from lloco_integrations.langchain.documents import LLoCODocument
from lloco_integrations.langchain.vectorstore import EngineEmbeddings, LLoCOVectorStore

__all__ = ["EngineEmbeddings", "LLoCODocument", "LLoCOVectorStore"]
