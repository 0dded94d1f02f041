"""The facade: documents in, answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lloco_engine.config import (
    ChunkConfig,
    CompressConfig,
    PrefixConfig,
    ReadConfig,
    RefineConfig,
    RetrieveConfig,
    StoreConfig,
)
from lloco_engine.context import Prepared
from lloco_engine.engine.answering import Answering
from lloco_engine.engine.resources import Resources
from lloco_engine.engine.twins import in_thread
from lloco_engine.errors import SegmentUnavailable
from lloco_engine.ingest import Ingest, Progress, Source, each_of
from lloco_engine.readers import Reader
from lloco_engine.refining import RefineProgress, RefineReport, Refining
from lloco_engine.relevance import doubt, floor_of
from lloco_engine.request import AskRequest
from lloco_engine.store import DocumentInfo, Manifest, Problem
from lloco_engine.store_setup import Setup, open_store, stored_manifest
from lloco_engine.streaming import AnswerStream, AsyncAnswerStream
from lloco_engine.types import Answer, Hit, IngestReport, MetadataValue

if TYPE_CHECKING:
    from lloco_engine.chunking import Chunker
    from lloco_engine.cluster import Cluster
    from lloco_engine.compress.base import Compressor
    from lloco_engine.decoder.answering import AnsweringDecoder
    from lloco_engine.decoder.local import LocalDecoder
    from lloco_engine.embedder import Encodes

__all__ = ["Engine"]


class Engine:
    """A store with the decoder and embedder it was made with. Made by `open`; a context manager.

    Weights are loaded when they are first needed. Safe for use from several threads, whose answers share the decoder's
    steps: each is the same as alone, and together they come sooner.
    """

    def __init__(self, resources: Resources, prefix: PrefixConfig, retrieval: RetrieveConfig) -> None:
        self._resources, self._setup = resources, resources.setup
        self.store, self.adapters = resources.store, resources.adapters
        self.embedder: Encodes = resources.setup.embedder
        self.prefix, self.retrieval = prefix, retrieval
        self._answering = Answering(resources)

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
        setup = Setup(
            stored_manifest(path, create=create),
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
        resources = Resources(open_store(path, setup, create=create), setup, device, dtype)
        return cls(resources, prefix or PrefixConfig(), retrieve or RetrieveConfig())

    def close(self) -> None:
        """Let go of the store and of the decoder: its weights, or what leads to it."""
        self._resources.close()

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
        return self._setup.text_room

    @property
    def window(self) -> int:
        """Positions that the decoder can attend over. No weights are loaded."""
        return self._setup.facts.shape.window

    @property
    def decoder(self) -> AnsweringDecoder:
        """The decoder, opened on first use."""
        return self._resources.decoder

    @property
    def local_decoder(self) -> LocalDecoder:
        """The decoder with its weights in this process, which all that makes or scores anything needs.

        Raises:
            ConfigError: it runs elsewhere.
        """
        return self._resources.local_decoder

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
        return self._setup.chunker

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
        several = each_of(sources)
        reader = Reader(tenant=tenant, metadata=metadata, config=read)
        with self._resources.maker(cluster) as maker:
            return Ingest(self.store, self._setup, maker, progress).run(several, reader, tenant, prune=prune)

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
        with self._resources.maker(cluster) as maker:
            run = Refining(self.store, self.chunker, maker, config or RefineConfig(), progress)
            return run.run(doc_ids, tenant, budget)

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
        return self._answering.context.earlier(hit)

    def unusable(self, hits: Sequence[Hit]) -> list[Hit]:
        """Those hits whose segments are missing or damaged, so that an answer would be made without them."""
        return [hit for hit in hits if isinstance(self._answering.context.read(hit), SegmentUnavailable)]

    def token_ids(self, text: str) -> list[int]:
        """The decoder's token ids of a text, by the store's tokenizer; no weights are loaded."""
        from lloco_engine.tokenizing import encode

        return encode(self._setup.facts.tokenizer, text)

    # -- questions ----------------------------------------------------------------------------------------------

    def retrieve(self, /, question: str | AskRequest, **options: Any) -> list[Hit]:
        """The segments that a question needs, best first.

        Args:
            question: text, or a request.
            options: what a search takes of `AskRequest`: ``filters``, ``tenant``, ``history``, ``retrieve``, and the
                settings of `RetrieveConfig` by name. None of any says nothing: it is as the engine was opened.

        Raises:
            ConfigError: the question is empty, or a setting breaks its rule.
            StoreMismatch: the embedder's vectors are not of the store's length.
        """
        return self._answering.context.search(self._request(question, options, "retrieve"))

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
        return self._answering.stream(self._request(question, options))

    def prepare(self, question: str | AskRequest, **options: Any) -> Prepared:
        """What `ask` would give to the decoder, which is not asked: hits, placed segments, prompt, adapter.

        For those who do with it what `ask` does not, such as several questions together; arguments and errors are
        those of `ask`. ``when_nothing`` has no say in it.
        """
        return self._answering.prepare(self._request(question, options))

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

    def compare(self, /, question: str | AskRequest, **options: Any) -> dict[str, Answer]:
        """The answer of `ask` beside those of the same decoder reading raw text; see `lloco_engine.baselines`.

        All three answer with the same adapter and settings, hints among them.

        Returns:
            ``"lloco"``; ``"in_context"``, from the whole documents that the hits come from, cut to the window; and
            ``"text_retrieval"``, from the text of the same hits.
        """
        return self._answering.compare(self._request(question, options))

    def _request(self, question: str | AskRequest, options: Mapping[str, Any], call: str = "ask") -> AskRequest:
        """What is asked: as the engine was opened, but for what is given."""
        self._resources.lock.check()
        if not isinstance(question, AskRequest):
            question = AskRequest(question, self.retrieval, self.prefix)
        return question.but(options, call)

    # -- async twins --------------------------------------------------------------------------------------------

    aingest = in_thread(ingest, "; ``progress`` is called there. Cancelled, it stops after the segment at hand")
    aretrieve = in_thread(retrieve)
    acompare = in_thread(compare)
    adelete = in_thread(delete)

    async def aask(self, question: str | AskRequest, **options: Any) -> Answer:
        """`ask` in a thread, which stops at its next piece of text when the task is cancelled."""
        async with self.astream(question, **options) as stream:
            async for _ in stream:
                pass
            return stream.answer

    def astream(self, question: str | AskRequest, **options: Any) -> AsyncAnswerStream:
        """`stream` for asyncio: ``async for piece in engine.astream(...)``."""
        return AsyncAnswerStream(lambda: self.stream(question, **options))
