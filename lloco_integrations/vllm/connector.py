"""vLLM's KV connector as a control channel: which request reads which segments goes from the scheduler to the workers.

No block of vLLM's own cache is filled by it. The scheduler's half decides (`admission`) and keeps the books (`pool`);
the workers' half loads (`shelf`), and the attention backend (`cpu`, `cuda`) reads there.

A request is refused the one way in which vLLM fails it alone, at once and before any token: it is let in as if its keys
were to come from elsewhere, and the workers report that they did not (``kv_load_failure_policy`` "fail", the default).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from lloco_integrations.vllm import params, shelf
from lloco_integrations.vllm.admission import Admission, Binding, Verdict
from lloco_integrations.vllm.pool import Placed, Pool
from lloco_integrations.vllm.reading import inverse_frequencies
from lloco_integrations.vllm.sources import CACHE_MIB, open_reader

if TYPE_CHECKING:
    from lloco_engine import SegmentReader

__all__ = ["LlocoConnector"]

POOL_MIB = 1024  # of a rank's pool where the configuration says nothing
_LOG = logging.getLogger(__name__)


@dataclass
class ToWorkers(KVConnectorMetadata):
    """What the scheduler tells the workers before a pass.

    dropped, placed : of the books. bound : by first block, who is let in; None for who reads no segment.
    refused : requests that are to fail
    """

    dropped: list[int] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)
    bound: dict[int, Binding | None] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


@dataclass
class FromWorkers(KVConnectorWorkerMetadata):
    """What workers tell of a pass: of each placing that is loaded the ranks, and why others cannot be."""

    loaded: dict[int, list[int]] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FromWorkers:
        """What both tell."""
        assert isinstance(other, FromWorkers)
        loaded = {number: list(ranks) for number, ranks in self.loaded.items()}
        for number, ranks in other.loaded.items():
            loaded.setdefault(number, []).extend(ranks)
        return FromWorkers(loaded, self.lost | other.lost)


class LlocoConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. ``kv_connector_extra_config`` takes ``store`` (a folder or a URL), ``cache`` (a folder for what a
    URL gives), ``cache_mib``, ``key_file`` and ``pool_mib``.

    Raises:
        ValueError: the configuration, the decoder or the store is none that segments can be read with; says which.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        given = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        _known(given)
        self._reader = open_reader(given.get("store"), given.get("cache"), given.get("cache_mib", CACHE_MIB))
        _fits(vllm_config, kv_cache_config, self._reader)
        manifest = self._reader.manifest
        ranks = vllm_config.parallel_config.tensor_parallel_size
        pages = shelf.pages_in(given.get("pool_mib", POOL_MIB), manifest["head_dim"])
        self._admission: Admission | None = None
        self._shelf: shelf.Shelf | None = None
        self._bound: dict[int, Binding | None] = {}
        self._refused: list[str] = []
        self._to_fail: set[str] = set()
        if role is KVConnectorRole.SCHEDULER:
            self._pool = Pool(pages, ranks)
            self._admission = Admission(
                self._reader,
                self._pool,
                ranks=ranks,
                keys=params.read_keys(given.get("key_file")),
                store=params.store_fingerprint(manifest),
                window=_window(vllm_config),
            )
            return
        self._made = {
            "layers": manifest["layers"],
            "heads": manifest["kv_heads"],
            "dim": manifest["head_dim"],
            "inverse": inverse_frequencies(vllm_config.model_config.hf_text_config, manifest["head_dim"]),
            "rank": get_tensor_model_parallel_rank(),
            "ranks": ranks,
        }
        self._pages = pages

    # -- scheduler ------------------------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed to anybody."""
        return False

    def on_new_request(self, request: Any) -> None:
        """Check what a request says, and keep its prefix cache apart by its memory and tenant.

        A prompt whose cache is not to be read (one whose prompt's logprobs are wanted) would be let in unasked, so that
        it is kept apart from all others instead, which comes to the same.
        """
        tokens = request.num_prompt_tokens + (request.max_tokens or 0)
        salt = self._asked.arrive(
            request.request_id, request.kv_transfer_params, tokens=tokens, salt=request.cache_salt
        )
        if not salt:
            return
        if request.skip_reading_prefix_cache:
            request.skip_reading_prefix_cache = False
            salt = f"{salt} {request.request_id}"
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Whether a request is let in, waits or is refused, in vLLM's words."""
        verdict = self._asked.verdict(request.request_id)
        if verdict is Verdict.WAIT:
            return None, False
        return (1, True) if verdict is Verdict.REFUSED else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request is let in, or is on its way to fail."""
        if num_external_tokens:
            self._refused.append(request.request_id)
            return
        self._bound[blocks.get_block_ids()[0][0]] = self._asked.binding(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> ToWorkers:
        """What workers are told before the next pass."""
        dropped, placed = self._pool.changes()
        made = ToWorkers(dropped, placed, self._bound, self._refused)
        self._bound, self._refused = {}, []
        return made

    def update_connector_output(self, connector_output: Any) -> None:
        """What workers have loaded since."""
        told = connector_output.kv_connector_worker_meta
        if not isinstance(told, FromWorkers):
            return
        for number, ranks in told.loaded.items():
            for rank in ranks:
                self._asked.loaded(number, rank)
        for number, why in told.lost.items():
            self._asked.lost(number, why)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is over; its answer says how many segments it has read, so that a client can tell that it did."""
        read = self._asked.read_by(request.request_id)
        self._asked.leave(request.request_id)
        return False, {params.FIELD: {"segments": read}} if read else None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `request_finished`."""
        return self.request_finished(request, [])

    # -- worker ---------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Make the pool where the cache is, once it is sure that every layer reads it."""
        layers = self._vllm_config.compilation_config.static_forward_context
        for name in kv_caches:
            if not getattr(layers[name].impl, "reads_segments", False):
                raise ValueError(
                    f"layer {name} must read segments, and its attention is {type(layers[name].impl).__name__}: "
                    "the plug-in `lloco` must be loaded (VLLM_PLUGINS), and no other take the backend's place"
                )
        name, cache = next(iter(kv_caches.items()))
        in_pages = layers[name].impl.in_pages
        self._shelf = shelf.Shelf(self._reader, self._pages, device=cache.device, in_pages=in_pages, **self._made)
        shelf.set_active(self._shelf)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Do as the scheduler says, before a pass."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, ToWorkers)
        self._to_fail.update(connector_metadata.refused)
        if self._shelf is not None:
            told = connector_metadata
            self._shelf.follow(told.dropped, told.placed, told.bound)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Requests that fail."""
        failed, self._to_fail = self._to_fail, set()
        return KVConnectorTransferResults(finished_recving=failed, failed_recving=set(failed))

    def build_connector_worker_meta(self) -> FromWorkers | None:
        """What has been loaded since the last pass."""
        if self._shelf is None:
            return None
        loaded, lost = self._shelf.settle()
        if not loaded and not lost:
            return None
        return FromWorkers({number: [self._shelf.rank] for number in loaded}, lost)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: no block is filled."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no block is filled."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: no block is kept."""

    def wait_for_save(self) -> None:
        """Nothing: no block is kept."""

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Attention reads other pages at every pass, so that it is not captured."""
        return True

    def shutdown(self) -> None:
        """Stop the threads."""
        if self._admission is not None:
            self._admission.close()
        if self._shelf is not None:
            self._shelf.close()
            if shelf.active() is self._shelf:
                shelf.set_active(None)

    @property
    def _asked(self) -> Admission:
        assert self._admission is not None, "asked of a worker"
        return self._admission


def _known(given: Mapping[str, Any]) -> None:
    names = ("store", "cache", "cache_mib", "key_file", "pool_mib")
    if odd := sorted(set(given) - set(names)):
        raise ValueError(f"kv_connector_extra_config takes {', '.join(names)}, not {odd[0]!r}")
    for name in ("cache_mib", "pool_mib"):
        size = given.get(name, 1)
        if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0:
            raise ValueError(f"{name} must be a number of mebibytes, not {size!r}")


def _window(vllm_config: Any) -> int:
    """Positions that the decoder can attend over, template prefix and segments included."""
    config = vllm_config.model_config.hf_text_config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") == "yarn":
        return int(float(rope["factor"]) * int(rope["original_max_position_embeddings"]))
    return int(config.max_position_embeddings)


def _fits(vllm_config: Any, kv_cache_config: Any, reader: SegmentReader) -> None:
    """Raise `ValueError` unless segments of the store can be read in this server."""
    model, parallel, manifest = vllm_config.model_config, vllm_config.parallel_config, reader.manifest
    config = model.hf_text_config
    layers = int(config.num_hidden_layers)
    heads, dim = int(model.get_total_num_kv_heads()), int(model.get_head_size())
    sizes = {"layers": layers, "kv_heads": heads, "head_dim": dim}
    made_for = {name: manifest[name] for name in sizes}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    rules = (
        (manifest["memory"] == "compact_kv", "segments must be compact KV", manifest["memory"]),
        (sizes == made_for, f"the decoder must have the sizes that segments were made for, {made_for}", sizes),
        (not model.use_mla, "a decoder must keep keys and values, not latents", model.architectures),
        (window is None, "a decoder must have no window in its layers", window),
        (vllm_config.speculative_config is None, "speculative decoding must be off", "on"),
        (parallel.pipeline_parallel_size == 1, "pipeline parallel must be 1", parallel.pipeline_parallel_size),
        (
            parallel.decode_context_parallel_size == 1 and parallel.prefill_context_parallel_size == 1,
            "context parallel must be 1",
            (parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size),
        ),
        (policy == "fail", "kv_load_failure_policy must be 'fail', else refused requests would be answered", policy),
        (
            kv_cache_config is None or len(kv_cache_config.kv_cache_groups) == 1,
            "all layers must share one group of vLLM's KV cache",
            "several",
        ),
    )
    for holds, rule, received in rules:
        if not holds:
            raise ValueError(f"{rule}, not {received!r}")
    folder = Path(model.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    reader.check_decoder(folder)
