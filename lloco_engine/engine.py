"""The facade: documents in, answers out."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from lloco_engine.adapters.routing import Adapters
from lloco_engine.comparing import beside
from lloco_engine.config import (
    ChunkConfig,
    CompressConfig,
    PrefixConfig,
    ReadConfig,
    RefineConfig,
    RetrieveConfig,
    StoreConfig,
)
from lloco_engine.context import Context, ContextBuilder, Found, Prepared
from lloco_engine.errors import ConfigError, LLoCOError, SegmentUnavailable
from lloco_engine.ingest import Ingest, Progress, Source
from lloco_engine.jobs import Bench, Here, Maker
from lloco_engine.opening import Encodes, Setup, open_store, stored_manifest
from lloco_engine.process import ProcessLock
from lloco_engine.readers import Reader
from lloco_engine.refining import RefineProgress, RefineReport, Refining
from lloco_engine.relevance import NOTHING, doubt, floor_of
from lloco_engine.request import AskRequest
from lloco_engine.retrieve import best_windows
from lloco_engine.store import DocumentInfo, Manifest, Problem, Store
from lloco_engine.streaming import AnswerStream, AsyncAnswerStream
from lloco_engine.types import Answer, Document, Hit, IngestReport, MetadataValue, Usage

if TYPE_CHECKING:
    from lloco_engine.chunking import Chunker
    from lloco_engine.cluster import Cluster
    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.decoder.prompt import Generation

__all__ = ["AnswerStream", "AsyncAnswerStream", "Engine", "Progress"]


class Engine:
    """A store with the decoder and embedder it was made with. Made by `open`; a context manager.

    Weights are loaded when they are first needed. Safe for use from several threads, whose answers share the decoder's
    steps: each is the same as alone, and together they come sooner.
    """

    def __init__(
        self,
        store: Store,
        setup: Setup,
        *,
        prefix: PrefixConfig,
        retrieval: RetrieveConfig,
        device: str | None,
        dtype: str | None,
    ) -> None:
        self.store = store
        self.embedder: Encodes = setup.embedder
        self.prefix = prefix
        self.retrieval = retrieval
        self.adapters = Adapters(store, lambda: self.decoder)
        self._setup, self._elsewhere = setup, setup.elsewhere
        self._device, self._dtype = device, dtype
        self._decoder: AnsweringDecoder | None = None
        self._lock = ProcessLock(f"the engine of {store.path}")
        self._compressing = threading.Lock()
        self._context = ContextBuilder(store, setup)

    @classmethod
    def open(
        cls,
        store: str | Path,
        *,
        decoder: str | AnsweringDecoder | None = None,
        embedder: str | Encodes | None = None,
        create: bool = True,
        compress: CompressConfig | None = None,
        chunk: ChunkConfig | None = None,
        store_config: StoreConfig | None = None,
        prefix: PrefixConfig | None = None,
        retrieve: RetrieveConfig | None = None,
        device: str | None = None,
        dtype: str | None = None,
        template: str | None = None,
        compressor: Compressor | None = None,
    ) -> Self:
        """Open a store, or make one. What is left out is as the store was made, or the default for a new one.

        Args:
            store: its folder.
            decoder: ``"embedded"``, a local folder or a hub id; one that runs elsewhere, ``"vllm:http://host:port"``
                (docs/vllm.md); or a decoder that is opened already.
            embedder: the same for the search embedder.
            create: make the store where there is none.
            compress, chunk, store_config: which compressor and how hard; sizes; type on disk.
            prefix: how segments are placed, and their budget, unless a question says otherwise.
            retrieve: how questions find segments, unless one says otherwise.
            device, dtype: of the models; by default what suits the machine.
            template: the prompt's fixed text, of `lloco_engine.decoder.template.NAMES`, for a decoder by name; by
                default what suits the decoder.
            compressor: one that is made already, which then need not be registered, instead of that which ``compress``
                names. Whoever opens the store again gives it again.

        Raises:
            StoreNotFound: there is no store, and ``create`` is False.
            StoreMismatch: the store was made with something else; names the first field that differs.
            ModelNotFound: decoder or embedder cannot be found; says which command to run.
            DecoderUnavailable: the decoder runs elsewhere, and cannot be reached, or is another one.
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
            compressor=compressor,
        )
        if prefix is not None:
            setup.check(prefix)
        opened = open_store(path, setup, stored=stored, create=create)
        engine = cls(
            opened,
            setup,
            prefix=prefix or PrefixConfig(),
            retrieval=retrieve or RetrieveConfig(),
            device=device,
            dtype=dtype,
        )
        if engine._elsewhere:
            try:
                engine.adapters.load_all()  # whether the decoder answers, and has them, is found out now
            except BaseException:
                engine.close()
                raise
        return engine

    def close(self) -> None:
        """Let go of the store and of the decoder: its weights, or what leads to it."""
        self.store.close()
        if self._lock.here:
            with self._lock:
                if self._decoder is not None and isinstance(self._setup.decoder, str):
                    self._decoder.close()
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
    def window(self) -> int:
        """Positions that the decoder can attend over. No weights are loaded."""
        return self._setup.facts.shape.window

    @property
    def decoder(self) -> AnsweringDecoder:
        """The decoder, opened on first use."""
        with self._lock:
            if self._decoder is None:
                self._decoder = self._setup.open_decoder(self._device, self._dtype)
            return self._decoder

    @property
    def local_decoder(self) -> LocalDecoder:
        """The decoder with its weights in this process, which all that makes or scores anything needs.

        Raises:
            ConfigError: it runs elsewhere.
        """
        if self._elsewhere:
            self._setup.require_weights()
        return cast("LocalDecoder", self.decoder)

    @property
    def decoder_folder(self) -> Path:
        """The folder of the decoder on this machine: config.json, tokenizer and weights. None of them is loaded."""
        from lloco_engine import models

        return Path(models.decoder_folder(self._setup.facts.name))

    @property
    def compressor(self) -> Compressor:
        """What makes the store's segments."""
        return self._setup.compressor

    @property
    def chunker(self) -> Chunker:
        """What cuts documents into the store's chunks."""
        from lloco_engine.chunking import Chunker

        facts = self._setup.facts
        return Chunker(facts.tokenizer, self._setup.chunk, facts.template.text_ids)

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
        prune: bool = False,
        read: ReadConfig | None = None,
        cluster: Cluster | str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> IngestReport:
        """Compress documents into the store, one after another.

        A document whose text, title and metadata are there already costs only a look at its segments. Another text
        under the same id replaces the earlier version. A run that was cut off goes on where it stopped, segment by
        segment. A damaged segment is made again.

        A file stays the document that was read from it, by whatever path it is reached; one that was moved or renamed
        is told by its text, and its labels follow. Other writers get in between segments and documents.

        Args:
            sources: documents, files (docs/documents.md lists their kinds) and folders; read lazily.
            tenant: whose they are.
            metadata: added to every document's own; of the types that `lloco_engine.metadata` names.
            prune: remove the documents that have vanished: those that were read before from a folder, or from a file
                of records, that was read now, and that are no longer there. Without it they are named.
            read: what a file may ask of the readers; a document beyond it is in ``failed``.
            cluster: who compresses instead of this process: a `lloco_engine.RayCluster`, or the address of one. The
                store comes to hold the same.
            progress: called when a document begins and after each of its segments.

        Returns:
            what was done; documents that could not be used are in ``failed``, with the rule they break, and so is a
            source of a wrong type.

        Raises:
            StoreFull: the disk is full; finished documents and segments stay.
            StoreLocked: another writer held the store for ten seconds; finished documents and segments stay.
            ConfigError: the sources cannot be iterated over, or a metadata key is one of the names that every document
                has, or a value of no fitting type; or the decoder runs elsewhere, or there is no such cluster: nothing
                was read.
            StoreMismatch: a worker of the cluster has another decoder.
        """
        if isinstance(sources, Document | str | os.PathLike):
            sources = [sources]
        given: object = sources
        if not isinstance(given, Iterable) or isinstance(given, bytes | bytearray):
            raise ConfigError(f"sources must be a document, a path or several, not of type {type(given).__name__}")
        reader = Reader(tenant=tenant, metadata=metadata, config=read)
        with self._maker(cluster) as maker:
            run = Ingest(
                self.store,
                self.chunker,
                self._setup.compressor,
                facts=self._setup.facts,
                maker=maker,
                embedder=self.embedder,
                progress=progress,
            )
            return run.run(sources, reader, tenant, prune=prune)

    def refine(
        self,
        doc_ids: Sequence[str] | None = None,
        *,
        tenant: str = "",
        config: RefineConfig | None = None,
        budget: float | None = None,
        cluster: Cluster | str | None = None,
        progress: Callable[[RefineProgress], None] | None = None,
    ) -> RefineReport:
        """Bring segments nearer to what the decoder makes of their chunks, by a few label-free steps each.

        A segment that is no better on what was held out stays as it was. A run that was cut off, or whose time was up,
        is gone on with by the next. Others may ask and ingest meanwhile.

        Args:
            doc_ids: which documents; None: all of the tenant's.
            tenant: whose.
            config: how many steps, and of which kind.
            budget: seconds, None for no limit.
            cluster: who refines, as for `ingest`.
            progress: called after each segment.

        Raises:
            NotInStore: the tenant has no document of an id.
            ConfigError: the store holds summary embeddings, the decoder runs elsewhere, or there is no such cluster.
            StoreFull, StoreLocked: what was finished stays.
        """
        with self._maker(cluster) as maker:
            run = Refining(self.store, self.chunker, maker=maker, config=config or RefineConfig(), progress=progress)
            return run.run(doc_ids, tenant, budget)

    def _maker(self, cluster: Cluster | str | None) -> Maker:
        """Makes segments, in this process or on a cluster; `ConfigError` where the decoder runs elsewhere."""
        if self._elsewhere:
            self._setup.require_weights()
        setup, form = self._setup, self.manifest.form
        if cluster is not None:
            from lloco_engine.cluster import maker_on

            return maker_on(cluster, self.store, setup, self._device, self._dtype)
        return Here(
            self.store,
            lambda: Bench(self.local_decoder, setup.compressor, setup.compress.ratio, form),
            self._compressing,
        )

    def delete(self, doc_id: str, tenant: str = "") -> None:
        """Remove a document and the segments that no other has; `NotInStore` when the tenant has no such document."""
        with self.store.writer() as writer:
            writer.delete_document(doc_id, tenant)

    def delete_all(self, doc_ids: Iterable[str], tenant: str = "") -> list[str]:
        """Remove documents as `delete` does, all in one go or none; returns those that were there."""
        with self.store.writer() as writer:
            return writer.delete_documents(doc_ids, tenant)

    def backup(
        self, dest: str | Path, *, link: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Copy the store to a folder that is not there yet, whole and checked, beside whoever writes.

        Args:
            dest: the new folder; `Store.restore` makes a store of it.
            link: make hard links instead of copies, where the file system can.
            progress: called with files done and files in all.

        Raises:
            StoreError: ``dest`` is there already, or cannot be written.
            StoreCorrupt: the store is damaged.
            StoreFull: no room.
        """
        self.store.backup(dest, link=link, progress=progress)

    def documents(self, tenant: str | None = None) -> list[DocumentInfo]:
        """Documents of a tenant, or of all tenants, by tenant and id."""
        return self.store.documents(tenant)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Everything that is wrong with the store, every byte of it read."""
        return self.store.verify(progress)

    def stats(self) -> dict[str, Any]:
        """Counts, bytes on disk by part, and what a source token costs; see `Store.stats`."""
        return self.store.stats()

    def find_text(self, text: str, tenant: str = "", about: Mapping[str, Any] | None = None) -> list[Hit]:
        """The segments that stand for exactly this text, if a tenant has any: of a chunk, or of a whole document.

        So a chunk that comes from elsewhere, a vector store of another make for instance, is read from its segment.
        Where several documents have the text, ``about``, the chunk's metadata there, says which one is cited: that
        whose id, source, title or metadata it names. The others are in ``Hit.also_in``.
        """
        return self.store.hits_of_text(text, tenant, about)

    def find_segment(self, segment_id: str, tenant: str = "") -> list[Hit]:
        """Every chunk of a tenant that a segment stands for; none where its documents were replaced or deleted."""
        return self.store.hits_of_segment(segment_id, tenant)

    def read_before(self, hit: Hit) -> list[Hit]:
        """The segments that a hit's segment is read after, first to last: they come along, and cost their slots too.

        None where segments stand by themselves, as compact KV does.
        """
        return self._context.earlier(hit)

    def unusable(self, hits: Sequence[Hit]) -> list[Hit]:
        """Those hits whose segments are missing or damaged, so that an answer would be made without them."""
        return [hit for hit in hits if isinstance(self._context.read(hit), SegmentUnavailable)]

    def token_ids(self, text: str) -> list[int]:
        """The decoder's token ids of a text, by the store's tokenizer; no weights are loaded."""
        from lloco_engine.tokenizing import encode

        return encode(self._setup.facts.tokenizer, text)

    # -- questions ----------------------------------------------------------------------------------------------

    def retrieve(self, question: str | AskRequest, **options: Any) -> list[Hit]:
        """The segments that a question needs, best first.

        Args:
            question: text, or a request.
            options: what a search takes of `AskRequest`: ``filters``, ``tenant``, ``history``, ``retrieve``, and the
                settings of `RetrieveConfig` by name. None of any says nothing: it is as the engine was opened.

        Raises:
            ConfigError: the question is empty, or a setting breaks its rule.
            StoreMismatch: the embedder's vectors are not of the store's length.
        """
        return self._context.search(self._request(question, options, "retrieve"))

    def doubt(self, hits: Sequence[Hit], floor: float | None = None) -> str | None:
        """Why no document seems to answer the question that hits were retrieved for: the warning of an answer.

        Args:
            hits: from `retrieve`.
            floor: as in `RetrieveConfig`; None takes the engine's own.

        Returns:
            None where the best score is not below the floor, or there is no floor.
        """
        return doubt(hits, floor_of(self.retrieval.but({"floor": floor}), self.manifest.embedder_fingerprint))

    def ask(self, question: str | AskRequest, **options: Any) -> Answer:
        """Answer a question from the store.

        Args:
            question: text, or a request.
            options: the fields of `AskRequest` by name, and the settings of `RetrieveConfig`, `PrefixConfig` and
                `GenerateConfig` by theirs. None of any says nothing: it is as the engine was opened, or its default.

        Raises:
            PromptTooLong: question, segments and answer do not fit the decoder's window; gives the numbers.
            SegmentUnavailable: every segment that was found is damaged, or no hit that was given is there any more.
            NotInStore: there is no such document to read whole.
            AdapterError: there is no such adapter, or it was made for something else.
            ConfigError: the question is empty, a setting breaks its rule, the hits are another tenant's, or filters
                are given where nothing is searched.
        """
        return self.stream(question, **options).whole()

    def stream(self, question: str | AskRequest, **options: Any) -> AnswerStream:
        """Like `ask`, text by text: iterate over what comes back, then take its ``answer``.

        Segments are found and placed, and everything that can be refused is refused, before this returns. Where no
        document seems to answer and ``when_nothing`` is ``"refuse"``, the decoder is not even loaded.
        """
        from lloco_engine.usage import usage_of

        request = self._request(question, options)
        found = self._find(request)
        refuses = request.retrieve.when_nothing == "refuse" and not (request.context or request.verbatim)
        if refuses and (found.nothing or not found.hits):
            return _refusal(found)
        prepared = self._prepared(request, found)
        memory, adapter = prepared.memory, prepared.adapter
        began = time.perf_counter()
        generation, pieces = self.decoder.stream(prepared.prompt, prepared.generate, adapter)
        before = prepared.seconds + time.perf_counter() - began

        def finish() -> Answer:
            usage = usage_of(
                self.decoder,
                generation,
                prefix=memory.prefix,
                texts=(hit.text for hit in memory.hits),
                retrieve_s=prepared.retrieve_s,
                load_s=memory.load_s,
                before_s=before,
            )
            return _answer(generation, memory, usage=usage, adapter=adapter or "none")

        return AnswerStream(pieces, memory.hits, finish)

    def prepare(self, question: str | AskRequest, **options: Any) -> Prepared:
        """What `ask` would give to the decoder, which is not asked: hits, placed segments, prompt, adapter.

        For those who do with it what `ask` does not, such as several questions together; arguments and errors are
        those of `ask`. ``when_nothing`` has no say in it.
        """
        request = self._request(question, options)
        return self._prepared(request, self._find(request))

    def score(self, question: str | AskRequest, answers: Sequence[str], **options: Any) -> list[tuple[float, int]]:
        """How likely the decoder thinks answers to a question, over what `ask` would read for it.

        Args:
            question, options: as `ask` takes them, and its errors.
            answers: texts that an answer may be.

        Returns:
            of each, the sum over its tokens, and the end token, of their negative log-likelihood in nats; and the
            number of these tokens.
        """
        asked = self.prepare(question, **options)
        return self.local_decoder.answer_losses([asked.prompt] * len(answers), answers, asked.adapter)

    def _find(self, request: AskRequest) -> Found:
        if request.hits is None:
            _ = self.embedder.dim  # loads it: no cost of one question
        return self._context.find(request)

    def _prepared(self, request: AskRequest, found: Found) -> Prepared:
        from lloco_engine.decoder.prompt import Prompt

        decoder = self.decoder
        self.adapters.check(request.adapter, request.tenant)
        began = time.perf_counter()
        text = Prompt(
            request.question,
            context=request.context or None,
            history=tuple(request.history),
            verbatim=request.verbatim,
            tenant=request.tenant,
        )
        room = len(decoder.prompt_ids(text)) + request.generate.max_new_tokens
        memory = self._context.place(found, decoder, request.prefix, room)
        prompt = replace(text, prefix=memory.prefix, draft=best_windows(memory.hits))
        adapter = self.adapters.choose(request.adapter, memory.hits, request.tenant)
        spent = found.seconds + time.perf_counter() - began
        return Prepared(prompt, request.generate, adapter, memory, found.seconds, spent)

    def _request(self, question: str | AskRequest, options: Mapping[str, Any], call: str = "ask") -> AskRequest:
        """What is asked: as the engine was opened, but for what is given."""
        self._lock.check()
        if isinstance(question, AskRequest):
            return question.but(options, call)
        return AskRequest(question, self.retrieval, self.prefix).but(options, call)

    def compare(self, question: str | AskRequest, **options: Any) -> dict[str, Answer]:
        """The answer of `ask` beside those of the same decoder reading raw text; see `lloco_engine.baselines`.

        All three answer with the same adapter and settings, hints among them.

        Returns:
            ``"lloco"``; ``"in_context"``, from the whole documents that the hits come from, cut to the window; and
            ``"text_retrieval"``, from the text of the same hits.
        """
        request = self._request(question, options)
        ours = self.ask(request)
        return {"lloco": ours} | {name: start().whole() for name, start in beside(self, request, ours).items()}

    # -- async twins --------------------------------------------------------------------------------------------

    async def aingest(
        self,
        sources: Iterable[Source] | Source,
        *,
        tenant: str = "",
        metadata: Mapping[str, MetadataValue] | None = None,
        prune: bool = False,
        read: ReadConfig | None = None,
        cluster: Cluster | str | None = None,
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
            return await asyncio.to_thread(
                self.ingest,
                sources,
                tenant=tenant,
                metadata=metadata,
                prune=prune,
                read=read,
                cluster=cluster,
                progress=watch,
            )
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def aretrieve(self, question: str | AskRequest, **options: Any) -> list[Hit]:
        """`retrieve` in a thread."""
        return await asyncio.to_thread(lambda: self.retrieve(question, **options))

    async def aask(self, question: str | AskRequest, **options: Any) -> Answer:
        """`ask` in a thread, which stops at its next piece of text when the task is cancelled."""
        async with self.astream(question, **options) as stream:
            async for _ in stream:
                pass
            return stream.answer

    def astream(self, question: str | AskRequest, **options: Any) -> AsyncAnswerStream:
        """`stream` for asyncio: ``async for piece in engine.astream(...)``."""
        return AsyncAnswerStream(lambda: self.stream(question, **options))

    async def acompare(self, question: str | AskRequest, **options: Any) -> dict[str, Answer]:
        """`compare` in a thread."""
        return await asyncio.to_thread(lambda: self.compare(question, **options))

    async def adelete(self, doc_id: str, tenant: str = "") -> None:
        """`delete` in a thread."""
        await asyncio.to_thread(self.delete, doc_id, tenant)


def _refusal(found: Found) -> AnswerStream:
    """An answer that says that there is none, without a decoder."""
    usage = Usage(retrieve_s=found.seconds, ttft_s=found.seconds)
    warnings = (*found.warnings, found.nothing) if found.nothing else found.warnings
    return AnswerStream(iter([NOTHING]), (), lambda: Answer(NOTHING, usage=usage, warnings=warnings))


def _answer(generation: Generation, memory: Context, **more: Any) -> Answer:
    return Answer(
        text=generation.text,
        hits=memory.hits,
        finish=generation.finish or "stop",
        warnings=(*memory.warnings, *generation.warnings),
        reasoning=generation.reasoning,
        token_ids=tuple(generation.token_ids),
        hints=generation.hints,
        **more,
    )
