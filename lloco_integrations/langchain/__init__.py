"""LLoCO in LangChain: drop-in classes whose prompts hold handles instead of text.

::

    engine = Engine.open("lloco-store")
    retriever = LLoCORetriever(engine=engine, k=4)
    llm = ChatLLoCO(engine=engine)
    chain = {"context": retriever | format_docs, "question": RunnablePassthrough()} | prompt | llm

Installed by the extra ``lloco[langchain]``.
"""

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError("lloco_integrations.langchain needs langchain-core: pip install 'lloco[langchain]'") from error

from lloco_integrations.handles import HandleFragment, Handles
from lloco_integrations.langchain.chat import ChatLLoCO
from lloco_integrations.langchain.compressor import LLoCODocumentCompressor
from lloco_integrations.langchain.documents import LLoCODocument
from lloco_integrations.langchain.llm import LLoCOLLM
from lloco_integrations.langchain.messages import handle_block
from lloco_integrations.langchain.retriever import LLoCORetriever
from lloco_integrations.langchain.vectorstore import EngineEmbeddings, LLoCOStoreRetriever, LLoCOVectorStore

__all__ = [
    "ChatLLoCO",
    "EngineEmbeddings",
    "HandleFragment",
    "Handles",
    "LLoCODocument",
    "LLoCODocumentCompressor",
    "LLoCOLLM",
    "LLoCORetriever",
    "LLoCOStoreRetriever",
    "LLoCOVectorStore",
    "handle_block",
]
