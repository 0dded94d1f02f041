"""What the processor can do, as LLVM names it."""

from __future__ import annotations

from functools import cache

__all__ = ["has"]


@cache
def _features() -> dict[str, bool]:
    from llvmlite import binding

    try:
        return dict(binding.get_host_cpu_features())
    except RuntimeError:  # LLVM cannot tell on this platform
        return {}


def has(feature: str) -> bool:
    """Whether the processor has a feature, and the system lets it be used.

    Asked of LLVM, which compiles the attention kernel: torch tells only from release 2.11 on.

    Args:
        feature: in LLVM's words, e.g. ``"avx512f"``, ``"f16c"``, ``"avx512bf16"``, ``"amx-bf16"``.
    """
    return _features().get(feature, False)
