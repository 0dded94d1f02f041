"""LangChain's own suites for chat models and retrievers, offline. The vector store's is in test_langchain_vectorstore.

Left out, each because the decoder completes text and does nothing else: tool calling, tool choice and structured output
(so also loops of agents and few-shot tool calls), JSON mode, and image, audio and PDF inputs. Model override in a call:
the decoder is the store's. Recorded HTTP calls: there are none. Serialisation: an engine is an open store, which does
not go into JSON.
"""

from __future__ import annotations

from typing import Any

import langchain_cases as cases
import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from lloco_integrations.langchain import ChatLLoCO, LLoCORetriever

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with cases.open_engine(tmp_path_factory.mktemp("standard") / "store", cases.decoder()) as made:
        made.ingest([cases.fact(topic) for topic in ("pump", "crane", "tram", "mill", "lock")])
        yield made


class _OnTheEngine:
    @pytest.fixture(autouse=True)
    def _with_engine(self, engine) -> None:
        self.engine = engine


class _Chat(_OnTheEngine):
    chat_model_class = ChatLLoCO

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine}

    @property
    def supports_model_override(self) -> bool:
        return False

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestChatUnit(_Chat, ChatModelUnitTests):
    """Construction, standard parameters, and time of construction."""


class TestChatIntegration(_Chat, ChatModelIntegrationTests):
    """Invoke, batch, stream, their async twins, conversations, usage and stop sequences."""

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine, "max_tokens": 12}


class TestRetriever(_OnTheEngine, RetrieversIntegrationTests):
    """The number of results, and documents."""

    retriever_constructor = LLoCORetriever
    retriever_query_example = "the hall of the pump"

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"engine": self.engine}
