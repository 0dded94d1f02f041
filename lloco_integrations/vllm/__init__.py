"""LLoCO's memories served by vLLM: what its servers read, and the engine's questions to them (docs/vllm.md).

`register` is the plug-in, which vLLM runs in each of its processes (entry point ``vllm.general_plugins``).
"""

from __future__ import annotations

import os
import re

__all__ = ["CUDA", "VERSIONS", "register"]

VERSIONS = (
    "vllm>=0.32,<0.33"  # whose attention layers and connectors this is written for; what it uses is no public API
)
CUDA = "LLOCO_VLLM_CUDA"  # of the environment: 1 has GPUs read segments too, which is experimental


def register() -> None:
    """Have vLLM's attention read segments, on whichever device it runs.

    Raises:
        RuntimeError: it is another version of vLLM.
    """
    import vllm

    found = re.match(r"(\d+)\.(\d+)", str(vllm.__version__))
    if found is None or (int(found[1]), int(found[2])) != (0, 32):
        raise RuntimeError(
            f"LLoCO's plug-in needs {VERSIONS}, and this is vLLM {vllm.__version__}: install that one, or leave the "
            "plug-in out with VLLM_PLUGINS=''"
        )
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.SegmentBackend")
    elif current_platform.is_cuda() and os.environ.get(CUDA) == "1":
        register_backend(AttentionBackendEnum.FLASH_ATTN, f"{__name__}.cuda.SegmentBackend")
