"""The import rule: every module imports, none imports a later stage, and importing the engine is light."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

import lloco_engine

PACKAGE = Path(lloco_engine.__file__).parent
# One tuple per stage, in the order of the spine. A module imports its own stage or earlier ones.
STAGES = (
    ("errors",),
    ("atomic", "config", "graphemes", "journal", "process", "types", "unicode", "metadata", "filters", "documents"),
    ("flags", "plugins", "reasoning", "tokenizing", "tokens", "weights"),
    ("fingerprints", "processor", "shape", "pretrained", "hub", "models"),
    ("embedder", "chunking", "readers", "keyword_score"),
    ("kinds",),
    ("store",),
    ("retrieve", "relevance"),
    ("prefix",),
    ("decoder",),
    ("compress",),
    ("adapters", "segment_cache"),
    ("jobs",),
    ("refining",),
    ("usage", "streaming", "baselines"),
    ("store_setup", "remote", "ingest", "vanished", "request", "context", "comparing", "cluster", "engine"),
    ("finetune", "testing"),
    ("demo", "eval"),
    ("serve",),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, stage in enumerate(STAGES) for part in stage}
APART = (("decoder", "store"), ("compress", "store"), ("decoder", "kinds"))  # the first must not know the second
HEAVY = ("torch", "transformers", "faiss", "numpy", "sentence_transformers", "peft", "tiktoken", "matplotlib")
COMPILES = ("llvmlite", "numba")
READ_SEGMENTS = f"""
import sys, torch
from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.decoder import cpu_kernel
from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.config import GenerateConfig
from lloco_engine.prefix import place
from lloco_engine.testing import tiny_decoder, tiny_tokenizer
cpu_kernel.runs = lambda: True
def say(when):
    print(when, [name for name in {COMPILES!r} if name in sys.modules])
decoder = LocalDecoder(tiny_decoder(), tiny_tokenizer(), "tiny")
say("made")
few = GenerateConfig(max_new_tokens=2)
decoder.generate([Prompt("Who?", context="Ada.")], few)
prefix = place(Uncompressed().compress(decoder, [40, 41, 42], [1]), template_tokens=decoder.template_tokens)
say("asked")
decoder.generate([Prompt("Who?", prefix=prefix)], few)
say("read")
"""
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_parts(path: Path) -> set[str]:
    """The top-level parts of the engine that a file imports anywhere in it, also inside functions or for types."""
    package = ("lloco_engine", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (home, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("lloco_engine.")}
    return found


def test_every_part_has_a_stage():
    parts = {name_of(path).split(".")[0] for path in FILES}
    assert parts <= set(RANK), f"give a stage to {sorted(parts - set(RANK))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_a_later_stage(path):
    part = name_of(path).split(".")[0]
    imported = imported_parts(path)
    later = {other for other in imported if RANK.get(other, -1) > RANK[part]}
    assert not later, f"{name_of(path)} ({part}) imports {sorted(later)}, which come after it"
    for one, other in APART:
        assert not (part == one and other in imported), f"{name_of(path)} imports {other}, which {one} must not know"


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "__main__"], ids=name_of)
def test_every_module_imports(path):
    if path.parent.name == "gpu_kernel":
        pytest.importorskip("triton", reason="needs Triton: make triton")
    import_module(f"lloco_engine.{name_of(path)}")


def test_integrations_see_only_the_public_engine():
    for path in PACKAGE.parent.joinpath("lloco_integrations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lloco_engine"):
                assert node.module in ("lloco_engine", "lloco_engine.testing"), f"{path} imports from {node.module}"


def test_public_names_resolve_and_are_documented():
    assert list(lloco_engine.__all__) == sorted(lloco_engine.__all__)
    for name in lloco_engine.__all__:
        value = getattr(lloco_engine, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lloco_engine.Nothing


def test_the_compiled_kernel_is_imported_when_a_decoder_first_reads_segments_on_the_cpu():
    out = subprocess.run([sys.executable, "-c", READ_SEGMENTS], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split("\n")[:3] == ["made []", "asked []", "read ['llvmlite', 'numba']"]


@pytest.mark.parametrize("module", ["lloco_engine", "lloco_engine.cli"])
def test_importing_is_light(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]", f"import {module} loads {out.stdout.strip()}"
    assert module != "lloco_engine" or seconds < 1.0, f"import lloco_engine took {seconds:.2f} s, interpreter included"
