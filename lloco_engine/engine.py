"""The facade: documents in, answers out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from lloco_engine.adapters.choosing import Adapters
from lloco_engine.answers import AnswerStream, AsyncAnswerStream
from lloco_engine.config import ChunkConfig, CompressConfig, GenerateConfig, PrefixConfig, RetrieveConfig, StoreConfig
from lloco_engine.errors import ConfigError, LLoCOError, SegmentUnavailable
from lloco_engine.ingest import Ingest, Progress, Source, read_sources
from lloco_engine.opening import Encodes, Setup, open_store, stored_manifest
from lloco_engine.prefix import assemble
from lloco_engine.store import DocumentInfo, Filters, Manifest, Problem, Store
from lloco_engine.types import Answer, AnySegment, Document, Hit, IngestReport, MetadataValue, Prefix, Turn

if TYPE_CHECKING:
    from lloco_engine.chunking import Chunker
    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.local import Generation, LocalDecoder

__all__ = ["AnswerStream", "AskOptions", "AsyncAnswerStream", "Engine", "Progress"]

_DRAFT_WINDOWS = 4  # search windows whose text the decoder may find its next words in


class AskOptions(TypedDict, total=False):
    """What every way of asking takes besides the question.

    hits: segments to read, best first, from `Engine.retrieve`; None (the default) searches for them.
    top_k: segments to search for, 4 by default.
    filters: as in `Store.search`: metadata key, doc_id, source or title, to a value or a collection of them.
    neighbours: segments to add before and after each, 0 by default.
    whole_document: id of a document to read all of, instead of a search.
    tenant: whose documents, "" by default.
    adapter: "auto" (the default, and None) takes that of the hits' group, as `lloco_engine.adapters.choosing` says;
        "none" answers with the base weights; else a group, or the name of a loaded adapter.
    generate: how tokens are chosen.
    prefix: placement and budget of the segments; None takes the engine's own.
    context: raw text to read after the segments, "" by default.
    history: earlier turns of the conversation, oldest first; the segments stand before them.
    verbatim: the question brings its own instructions, so the engine writes none before it; False by default.
    """

    hits: Sequence[Hit] | None
    top_k: int
    filters: Filters | None
    neighbours: int
    whole_document: str | None
    tenant: str
    adapter: str | None
    generate: GenerateConfig | None
    prefix: PrefixConfig | None
    context: str
    history: Sequence[Turn]
    verbatim: bool


@dataclass(frozen=True)
class _Ask:
    """`AskOptions` with their defaults."""

    hits: Sequence[Hit] | None = None
    top_k: int = 4
    filters: Filters | None = None
    neighbours: int = 0
    whole_document: str | None = None
    tenant: str = ""
    adapter: str | None = "auto"
    generate: GenerateConfig | None = None
    prefix: PrefixConfig | None = None
    context: str = ""
    history: Sequence[Turn] = ()
    verbatim: bool = False


@dataclass(frozen=True)
class _Memory:
    """What a question found: hits, their segments placed, how long that took, and what went wrong on the way."""

    hits: tuple[Hit, ...]
    prefix: Prefix | None
    retrieve_s: float
    load_s: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Read:
    """A hit with its segment and, in document order, those that this one is read after; ``wanted`` for itself."""

    hit: Hit
    segment: AnySegment
    after: tuple[_Read, ...] = ()
    wanted: bool = True


class Engine:
    """A store with the decoder and embedder it was made with. Made by `open`; a context manager.

    Weights are loaded when they are first needed. Safe for use from several threads; the decoder serves one answer at
    a time.
    """

    def __init__(self, store: Store, setup: Setup, *, prefix: PrefixConfig, device: str | None, dtype: str | None):
        self.store = store
        self.embedder: Encodes = setup.embedder
        self.prefix = prefix
        self.adapters = Adapters(store.path, store.manifest.memory, lambda: self.decoder)
        self._setup = setup
        self._device, self._dtype = device, dtype
        self._decoder: LocalDecoder | None = None if isinstance(setup.decoder, str) else setup.decoder
        self._lock = threading.RLock()
        self._checked: set[str] = set()  # ids of segments whose checksum was right when they were first read

    @classmethod
    def open(
        cls,
        store: str | Path,
        *,
        decoder: str | LocalDecoder | None = None,
        embedder: str | Encodes | None = None,
        create: bool = True,
        compress: CompressConfig | None = None,
        chunk: ChunkConfig | None = None,
        store_config: StoreConfig | None = None,
        prefix: PrefixConfig | None = None,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
    ) -> Self:
        """Open a store, or make one. What is left out is as the store was made, or the default for a new one.

        Args:
            store: its folder.
            decoder: ``"embedded"``, a local folder or a hub id; or a decoder that is loaded already.
            embedder: the same for the search embedder.
            create: make the store where there is none.
            compress, chunk, store_config: which compressor and how hard; sizes; type on disk.
            prefix: how segments are placed, and their budget, unless a question says otherwise.
            device, dtype: of the models; by default what suits the machine.
            template: the prompt's fixed text, of `lloco_engine.decoder.template.NAMES`, for a decoder by name; by
                default what suits the decoder.

        Raises:
            StoreNotFound: there is no store, and ``create`` is False.
            StoreMismatch: the store was made with something else; names the first field that differs.
            ModelNotFound: decoder or embedder cannot be found; says which command to run.
            ConfigError: settings do not fit each other or the decoder.
            StoreError: the store cannot be opened or made.
        """
        path = Path(store).expanduser()
        if not create and not path.exists():
            Store.open(path)  # raises before a model is looked for
        stored = stored_manifest(path)
        setup = Setup(
            stored,
            decoder=decoder,
            embedder=embedder,
            compress=compress,
            chunk=chunk,
            store=store_config,
            device=device,
            template=template,
        )
        opened = open_store(path, setup, stored=stored, create=create)
        return cls(opened, setup, prefix=prefix or PrefixConfig(), device=device, dtype=dtype)

    def close(self) -> None:
        """Let go of the store and of the decoder's weights."""
        self.store.close()
        with self._lock:
            self._decoder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def manifest(self) -> Manifest:
        """What the store was made with."""
        return self.store.manifest

    @property
    def text_room(self) -> int:
        """Positions for text, slots aside: what the decoder's window leaves beside the template prefix and the longest
        segment, when segments are placed in parallel. Question and answer must fit it. No weights are loaded."""
        facts = self._setup.facts
        return max(0, facts.shape.window - facts.template_tokens - self._setup.chunk.segment_tokens)

    @property
    def decoder(self) -> LocalDecoder:
        """The decoder, loaded on first use."""
        with self._lock:
            if self._decoder is None:
                from lloco_engine.decoder.local import LocalDecoder

                name = str(self._setup.decoder)
                self._decoder = LocalDecoder.load(
                    name, device=self._device, dtype=self._dtype, template=self._setup.template
                )
                self._decoder.template_cache()  # once per process: not a cost of the first question
            return self._decoder

    @property
    def compressor(self) -> Compressor:
        """What makes the store's segments."""
        return self._setup.compressor

    @property
    def chunker(self) -> Chunker:
        """What cuts documents into the store's chunks."""
        from lloco_engine.chunking import Chunker

        return Chunker(self._setup.facts.tokenizer, self._setup.chunk)

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Load a PEFT LoRA adapter, to be named in ``adapter=``; `AdapterError` where it is not for this decoder."""
        self.decoder.load_adapter(folder, name)

    # -- documents ----------------------------------------------------------------------------------------------

    def ingest(
        self,
        sources: Iterable[Source] | Source,
        *,
        tenant: str = "",
        metadata: Mapping[str, MetadataValue] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> IngestReport:
        """Compress documents into the store, one after another.

        A document whose text, title and metadata are there already costs only a look at its segments. Another text
        under the same id replaces the earlier version. A run that was cut off goes on where it stopped, segment by
        segment. A damaged segment is made again.

        Args:
            sources: documents, files (.txt, .md, .html, .pdf, .jsonl) and folders; read lazily.
            tenant: whose they are.
            metadata: added to every document's own.
            progress: called when a document begins and after each of its segments.

        Returns:
            what was done; documents that could not be used are in ``failed``, with the rule they break.

        Raises:
            StoreFull: the disk is full; finished documents and segments stay.
            StoreLocked: another writer holds the store.
            ConfigError: a metadata key is one of the names that every document has.
        """
        if isinstance(sources, Document | str | Path):
            sources = [sources]
        items = read_sources(sources, tenant=tenant, metadata=metadata)
        run = Ingest(
            self.store,
            self.chunker,
            self._setup.compressor,
            self._setup.compress.ratio,
            facts=self._setup.facts,
            decoder=lambda: self.decoder,
            embedder=self.embedder,
            progress=progress,
        )
        return run.run(items)

    def delete(self, doc_id: str, tenant: str = "") -> None:
        """Remove a document and the segments that no other has; `NotInStore` when the tenant has no such document."""
        with self.store.writer() as writer:
            writer.delete_document(doc_id, tenant)

    def documents(self, tenant: str | None = None) -> list[DocumentInfo]:
        """Documents of a tenant, or of all tenants, by tenant and id."""
        return self.store.documents(tenant)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Everything that is wrong with the store, every byte of it read."""
        return self.store.verify(progress)

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk by part, and what a source token costs; see `Store.stats`."""
        return self.store.stats()

    def find_text(self, text: str, tenant: str = "") -> list[Hit]:
        """The segments that stand for exactly this text, if a tenant has any: of a chunk, or of a whole document.

        So a chunk that comes from elsewhere, a vector store of another make for instance, is read from its segment.
        """
        return self.store.hits_of_text(text, tenant)

    def find_segment(self, segment_id: str, tenant: str = "") -> list[Hit]:
        """Every chunk of a tenant that a segment stands for; none where its documents were replaced or deleted."""
        return self.store.hits_of_segment(segment_id, tenant)

    def read_before(self, hit: Hit) -> list[Hit]:
        """The segments that a hit's segment is read after, first to last: they come along, and cost their slots too.

        None where segments stand by themselves, as compact KV does.
        """
        return self.store.earlier(hit) if self._reads_chain else []

    def unusable(self, hits: Sequence[Hit]) -> list[Hit]:
        """Those hits whose segments are missing or damaged, so that an answer would be made without them."""
        return [hit for hit in hits if isinstance(self._read(hit), SegmentUnavailable)]

    def token_ids(self, text: str) -> list[int]:
        """The decoder's token ids of a text, by the store's tokenizer; no weights are loaded."""
        from lloco_engine.decoder.template import encode

        return encode(self._setup.facts.tokenizer, text)

    # -- questions ----------------------------------------------------------------------------------------------

    def retrieve(
        self, question: str, *, top_k: int = 4, filters: Filters | None = None, neighbours: int = 0, tenant: str = ""
    ) -> list[Hit]:
        """The segments that a question needs, best first; `AskOptions` says what the arguments are."""
        from lloco_engine.retrieve import Retriever

        config = RetrieveConfig(top_k=top_k, neighbours=neighbours)
        return Retriever(self.store, self.embedder).retrieve(question, config, filters, tenant)

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """Answer a question from the store.

        Args:
            question: text, not empty.
            options: see `AskOptions`.

        Raises:
            PromptTooLong: question, segments and answer do not fit the decoder's window; gives the numbers.
            SegmentUnavailable: every segment that was found is damaged.
            NotInStore: there is no such document to read whole.
            AdapterError: there is no such adapter, or it was made for something else.
            ConfigError: the question is empty, or the hits are another tenant's.
        """
        with self.stream(question, **options) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(self, question: str, **options: Unpack[AskOptions]) -> AnswerStream:
        """Like `ask`, text by text: iterate over what comes back, then take its ``answer``.

        Segments are found and placed, and everything that can be refused is refused, before this returns.
        """
        from lloco_engine.decoder.local import Prompt
        from lloco_engine.ledger import usage_of

        asked = _Ask(**options)
        if not question.strip():
            raise ConfigError(f"a question must not be empty, not {question!r}")
        generate = asked.generate or GenerateConfig()
        decoder = self.decoder
        self.adapters.check(asked.adapter)
        if asked.hits is None and asked.whole_document is None:
            _ = self.embedder.dim  # loads it: no cost of one question
        began = time.perf_counter()
        text = Prompt(question, context=asked.context or None, history=tuple(asked.history), verbatim=asked.verbatim)
        memory = self._memory(question, asked, len(decoder.prompt_ids(text)) + generate.max_new_tokens)
        prompt = replace(text, prefix=memory.prefix, draft=_draft(memory.hits))
        adapter = self.adapters.choose(asked.adapter, memory.hits)
        generation, pieces = decoder.stream(prompt, generate, adapter)
        before = time.perf_counter() - began

        def finish() -> Answer:
            usage = usage_of(
                decoder,
                generation,
                prefix=memory.prefix,
                texts=(hit.text for hit in memory.hits),
                retrieve_s=memory.retrieve_s,
                load_s=memory.load_s,
                before_s=before,
            )
            return _answer(generation, memory, usage=usage, adapter=adapter or "none")

        return AnswerStream(pieces, memory.hits, finish)

    def compare(self, question: str, **options: Unpack[AskOptions]) -> dict[str, Answer]:
        """The answer of `ask` beside those of the same decoder reading raw text; see `lloco_engine.baselines`.

        Returns:
            ``"lloco"``; ``"in_context"``, from the whole documents that the hits come from, cut to the window; and
            ``"text_retrieval"``, from the text of the same hits.
        """
        from lloco_engine import baselines

        ours = self.ask(question, **options)
        generate = _Ask(**options).generate
        documents = dict.fromkeys((hit.doc_id, hit.tenant) for hit in ours.hits)
        texts = [self.store.document_text(doc_id, tenant) for doc_id, tenant in documents]
        by_text = baselines.text_retrieval(self.decoder, ours.hits, question, generate)
        found_s = ours.usage.retrieve_s
        usage = replace(by_text.usage, retrieve_s=found_s, ttft_s=by_text.usage.ttft_s + found_s)
        return {
            "lloco": ours,
            "in_context": baselines.in_context(self.decoder, texts, question, generate),
            "text_retrieval": replace(by_text, usage=usage),
        }

    def _memory(self, question: str, asked: _Ask, room: int) -> _Memory:
        """Find, read and place the segments for a question, leaving ``room`` positions of the window."""
        began = time.perf_counter()
        found = self._find(question, asked)
        retrieved = time.perf_counter()
        read, warnings = self._load(found)
        if not read:
            if asked.hits is None:  # otherwise none were given
                warnings.append("no segment matched the question: the answer is the decoder's own")
            return _Memory((), None, retrieved - began, time.perf_counter() - retrieved, tuple(warnings))
        decoder, config = self.decoder, asked.prefix or self.prefix
        # Those that were found come first, best first; what they are read after follows.
        places = {own.hit.segment_id: number for number, own in enumerate(read)}
        for earlier in [earlier for own in read for earlier in own.after]:
            if earlier.hit.segment_id not in places:
                places[earlier.hit.segment_id] = len(read)
                read.append(earlier)
        wanted = [own for own in read if own.wanted]
        assembly = assemble(
            [own.segment for own in read],
            config,
            template_tokens=decoder.template_tokens,
            room=room,
            window=decoder.shape.window,
            hits=[own.hit for own in read],
            needs=[[places[earlier.hit.segment_id] for earlier in own.after] for own in wanted],
            rotary=decoder.shape.rotary,
        )
        if assembly.dropped:
            budget = f"max_slots is {config.max_slots}" if config.max_slots else "the decoder's window is full"
            warnings.append(f"{budget}: the {len(assembly.dropped)} worst of {len(wanted)} segments were left out")
        used = tuple(read[number].hit for number in sorted(assembly.kept))
        return _Memory(used, assembly.prefix, retrieved - began, time.perf_counter() - retrieved, tuple(warnings))

    def _find(self, question: str, asked: _Ask) -> list[Hit]:
        """Hits for a question, each segment once."""
        if asked.hits is not None:
            hits = list(asked.hits)
            if strangers := [hit for hit in hits if hit.tenant != asked.tenant]:
                raise ConfigError(
                    f"hits must be of the tenant that asks, {asked.tenant!r}, and one is of {strangers[0].tenant!r}"
                )
        elif asked.whole_document is not None:
            hits = self.store.chunks(asked.whole_document, asked.tenant)
        else:
            hits = self.retrieve(
                question,
                top_k=asked.top_k,
                filters=asked.filters,
                neighbours=asked.neighbours,
                tenant=asked.tenant,
            )
        once: dict[str, Hit] = {}
        for hit in hits:
            once.setdefault(hit.segment_id, hit)
        return list(once.values())

    def _load(self, hits: Sequence[Hit]) -> tuple[list[_Read], list[str]]:
        """The hits whose segments can be used, with these, and a warning for each of the others."""
        good: list[_Read] = []
        warnings: list[str] = []
        for hit in hits:
            read = self._read(hit)
            if isinstance(read, SegmentUnavailable):
                warnings.append(f"segment {hit.ordinal} of {hit.doc_id!r} was left out: {read}")
            else:
                good.append(read)
        if hits and not good:
            raise SegmentUnavailable(f"none of the {len(hits)} segments found can be used; {warnings[0]}")
        return good, warnings

    def _read(self, hit: Hit) -> _Read | SegmentUnavailable:
        """A hit's segment with all that it is read after; or what is wrong with one of them."""
        after: list[_Read] = []
        for earlier in self.read_before(hit):
            segment = self._try_segment(earlier)
            if isinstance(segment, SegmentUnavailable):
                return SegmentUnavailable(f"it is read after segment {earlier.ordinal}, which is not there: {segment}")
            after.append(_Read(earlier, segment, wanted=False))
        segment = self._try_segment(hit)
        return segment if isinstance(segment, SegmentUnavailable) else _Read(hit, segment, tuple(after))

    @cached_property
    def _reads_chain(self) -> bool:
        facts: Any = self._setup.facts  # has what is read of a decoder
        return self._setup.compressor.reads_chain(facts)

    def _try_segment(self, hit: Hit) -> AnySegment | SegmentUnavailable:
        """A hit's segment, its checksum compared the first time that this engine reads it; or what is wrong with it."""
        try:
            segment = self.store.load_segment(hit.segment_id, verify=hit.segment_id not in self._checked)
        except SegmentUnavailable as error:
            return error
        self._checked.add(hit.segment_id)
        return segment

    # -- async twins --------------------------------------------------------------------------------------------

    async def aingest(
        self,
        sources: Iterable[Source] | Source,
        *,
        tenant: str = "",
        metadata: Mapping[str, MetadataValue] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> IngestReport:
        """`ingest` in a thread; ``progress`` is called there. Cancelled, it stops after the segment at hand."""
        cancelled = threading.Event()

        def watch(state: Progress) -> None:
            if cancelled.is_set():
                raise LLoCOError("the ingest was cancelled; the same call goes on from here")
            if progress is not None:
                progress(state)

        try:
            return await asyncio.to_thread(self.ingest, sources, tenant=tenant, metadata=metadata, progress=watch)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def aretrieve(
        self, question: str, *, top_k: int = 4, filters: Filters | None = None, neighbours: int = 0, tenant: str = ""
    ) -> list[Hit]:
        """`retrieve` in a thread."""
        return await asyncio.to_thread(
            self.retrieve, question, top_k=top_k, filters=filters, neighbours=neighbours, tenant=tenant
        )

    async def aask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """`ask` in a thread, which stops at its next piece of text when the task is cancelled."""
        async with self.astream(question, **options) as stream:
            async for _ in stream:
                pass
            return stream.answer

    def astream(self, question: str, **options: Unpack[AskOptions]) -> AsyncAnswerStream:
        """`stream` for asyncio: ``async for piece in engine.astream(...)``."""
        return AsyncAnswerStream(lambda: self.stream(question, **options))

    async def acompare(self, question: str, **options: Unpack[AskOptions]) -> dict[str, Answer]:
        """`compare` in a thread."""
        return await asyncio.to_thread(lambda: self.compare(question, **options))

    async def adelete(self, doc_id: str, tenant: str = "") -> None:
        """`delete` in a thread."""
        await asyncio.to_thread(self.delete, doc_id, tenant)


def _draft(hits: Sequence[Hit]) -> str:
    """Text that an answer may repeat: the best search window of the best hits."""
    return "\n".join(hit.quote(hit.windows[0]) for hit in hits[:_DRAFT_WINDOWS] if hit.windows)


def _answer(generation: Generation, memory: _Memory, **more: Any) -> Answer:
    return Answer(
        text=generation.text,
        hits=memory.hits,
        finish=generation.finish or "stop",
        warnings=memory.warnings,
        token_ids=tuple(generation.token_ids),
        **more,
    )
