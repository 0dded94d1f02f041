"""What a measurement ran on: versions, hardware, peak memory; and how its result is written."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lloco_engine import __version__
from lloco_engine.atomic import write_file
from lloco_engine.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["PeakMemory", "check_writable", "circumstances", "write_json"]

_LIBRARIES = ("torch", "transformers", "peft", "faiss-cpu", "sentence-transformers", "safetensors", "numpy")


def circumstances(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, hardware and date, JSON-ready."""
    import torch

    hardware: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        hardware["accelerator"] = torch.cuda.get_device_name(device)
    return {
        "versions": {"lloco": __version__, "python": platform.python_version()} | dict(_versions()),
        "hardware": hardware,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for library in _LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            yield library, "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


class PeakMemory:
    """Peak memory in megabytes (10^6 bytes), of each phase where the machine can tell them apart, and of all.

    On a CUDA device what its allocator gave out, else the process's resident set, which counts mapped files too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.phases: dict[str, float] = {}
        self._highest = self._read()

    @property
    def highest(self) -> float:
        """The most there was at any moment since the process began (CUDA: since this object was made)."""
        self._highest = max(self._highest, self._read())
        return self._highest

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peak of the block under ``name``; the higher one where the name comes again."""
        self._highest = max(self._highest, self._read())
        apart = self._reset()
        yield
        peak = self._read()
        self._highest = max(self._highest, peak)
        if apart:
            self.phases[name] = max(self.phases.get(name, 0.0), peak)

    def _reset(self) -> bool:
        """Begin a new peak; False where the machine keeps only one."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from what is resident now
        except OSError:
            return False
        return True

    def _read(self) -> float:
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device) / 1e6
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        except OSError:
            pass
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def check_writable(path: Path) -> None:
    """Make the folder of an output file, before the work rather than after it.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(None, "not permitted")
    except OSError as error:
        raise ConfigError(
            f"the output file must be one that can be written; {path} cannot: {error.strerror}"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON, so that the file is there wholly or not at all."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
