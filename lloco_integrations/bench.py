"""What the frameworks' path costs over the engine's own: ``python -m lloco_integrations.bench``.

The same questions are asked through a framework and of the engine, turn by turn, over the same retrieved segments, and
the differences of the pairs are taken. What is measured is the way there and back, which does not depend on the
decoder, so a tiny seeded one answers. The last line on stdout is JSON. A framework that is not installed is left out.

OpenMP is held to one thread unless ``OMP_NUM_THREADS`` says otherwise: with a decoder this small, thread teams waiting
for each other would be all that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lloco_engine import ChunkConfig, CompressConfig, Document, Engine, GenerateConfig
from lloco_engine.testing import HashingEmbedder, save_tiny_decoder

TOP_K = 4
GENERATE = GenerateConfig(max_new_tokens=4)
Ask = Callable[[str], str]


def main() -> None:
    """Measure and print; ``--help`` says how."""
    parser = argparse.ArgumentParser(
        prog="python -m lloco_integrations.bench",
        description="Milliseconds a question that LlamaIndex and LangChain add to the engine's own path.",
        epilog="example: python -m lloco_integrations.bench --questions 40 --json overhead.json",
    )
    parser.add_argument("--questions", type=int, default=60, help="questions asked each way (default 60)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and faiss are loaded
    with tempfile.TemporaryDirectory() as folder, open_engine(Path(folder)) as engine:
        ways = {name: overhead(engine, ask, arguments.questions) for name, ask in asks(engine).items()}
    for name, times in ways.items():
        print(
            f"{name:26} median {times['median']:6.2f} ms   nine in ten below {times['p90']:6.2f} ms   "
            f"(engine {times['engine_median']:.1f} ms)"
        )
    result = {
        "questions": arguments.questions,
        "segments_a_question": TOP_K,
        "threads": threads,
        "overhead_ms": ways,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def open_engine(folder: Path) -> Engine:
    """An engine with documents of about one full segment each."""
    decoder = save_tiny_decoder(folder / "decoder", max_position_embeddings=8192)
    engine = Engine.open(
        folder / "store",
        decoder=str(decoder),
        embedder=HashingEmbedder(),
        compress=CompressConfig(ratio=16),
        chunk=ChunkConfig(segment_tokens=1536),
    )
    engine.ingest(
        Document(f"{n}", " ".join(f"The lamp {n} {m} stands in hall {m * n}." for m in range(50)), title=f"Lamp {n}")
        for n in range(12)
    )
    return engine


def asks(engine: Engine) -> dict[str, Ask]:
    """Ways to ask, by name."""
    ways: dict[str, Ask] = {}
    if find_spec("llama_index") is not None:
        ways |= _llama_index(engine)
    if find_spec("langchain_core") is not None:
        ways |= _langchain(engine)
    return ways


def _llama_index(engine: Engine) -> dict[str, Ask]:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.schema import TextNode

    from lloco_integrations.llama_index import LLoCOEmbedding, LLoCOLLM, LLoCONodePostprocessor, LLoCORetriever

    llm = LLoCOLLM(engine, max_tokens=GENERATE.max_new_tokens)
    own = RetrieverQueryEngine.from_args(LLoCORetriever(engine, top_k=TOP_K), llm=llm)
    nodes = [TextNode(text=engine.store.document_text(info.doc_id)) for info in engine.documents()]
    theirs = VectorStoreIndex(nodes, embed_model=LLoCOEmbedding(engine)).as_query_engine(
        llm=llm, similarity_top_k=TOP_K, node_postprocessors=[LLoCONodePostprocessor(engine, on_missing="error")]
    )
    return {
        "llama-index, our retriever": lambda question: str(own.query(question)),
        "llama-index, its own index": lambda question: str(theirs.query(question)),
    }


def _langchain(engine: Engine) -> dict[str, Ask]:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import PromptTemplate
    from langchain_core.runnables import RunnablePassthrough

    from lloco_integrations.langchain import ChatLLoCO, LLoCORetriever

    prompt = PromptTemplate.from_template("{context}\n\nQuestion: {question}\nAnswer:")
    context = LLoCORetriever(engine=engine, k=TOP_K) | (lambda docs: "\n\n".join(doc.page_content for doc in docs))
    llm = ChatLLoCO(engine=engine, max_tokens=GENERATE.max_new_tokens, prompt=prompt)
    chain = {"context": context, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()
    return {"langchain, our retriever": chain.invoke}


def overhead(engine: Engine, ask: Ask, questions: int) -> dict[str, float]:
    """Milliseconds that a way takes beyond the engine's own: the median of pairs, and what nine in ten stay below."""
    for warm in range(3):
        ask(f"Where is the lamp {warm}?")
        engine.ask(f"Where is the lamp {warm}?", top_k=TOP_K, generate=GENERATE)
    differences, plain = [], []
    for number in range(questions):
        question = f"Where does the lamp {number % 12} {number} stand?"
        began = time.perf_counter()
        ask(question)
        between = time.perf_counter()
        engine.ask(question, top_k=TOP_K, generate=GENERATE)
        ended = time.perf_counter()
        ours, own = between - began, ended - between
        differences.append(1000 * (ours - own))
        plain.append(1000 * own)
    return {
        "median": statistics.median(differences),
        "p90": statistics.quantiles(differences, n=10)[-1],
        "engine_median": statistics.median(plain),
    }


if __name__ == "__main__":
    main()
