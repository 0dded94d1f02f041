"""A training run on disk: one safetensors file, replaced as a whole, from which a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lloco_engine.errors import ConfigError
from lloco_engine.journal import refuse_another_run
from lloco_engine.store.files import write_atomic

__all__ = ["State", "load", "save"]

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """Where a run stands. Order and draws follow from the seed, so no random state is part of it.

    Args:
        step: updates made.
        seconds: wall time of the run so far, over all its processes' lives.
        tokens: tokens run, padding included.
        best_loss, best_step: the best measurement on the held-out documents, and after which update it was made.
        since_best: measurements since then.
        log: one entry an update or measurement.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0
    finished: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)


def save(folder: Path, key: str, state: State, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write a checkpoint.

    Args:
        folder: of the run.
        key: hash of everything that the run depends on.
        state: where it stands.
        tensors: tensors by parameter name, by kind (``"weight"``, ``"exp_avg"``, ``"exp_avg_sq"``, ``"best"``).

    Raises:
        StoreFull: no room; the checkpoint before is still there.
    """
    from safetensors.torch import save as dump

    flat = {
        f"{kind}/{name}": tensor.detach().to("cpu").contiguous().clone()
        for kind, named in tensors.items()
        for name, tensor in named.items()
    }
    data = dump(flat, metadata={"key": key, "state": json.dumps(vars(state))})
    write_atomic(folder / FILE, data, folder / "tmp")


def load(folder: Path, key: str) -> tuple[State, dict[str, dict[str, torch.Tensor]]] | None:
    """The checkpoint in ``folder``; None where there is none.

    Raises:
        ConfigError: another run left it, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            for flat in file.keys():  # noqa: SIM118 - not a mapping
                kind, _, name = flat.partition("/")
                tensors.setdefault(kind, {})[name] = file.get_tensor(flat)
        state = State(**json.loads(header["state"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"the checkpoint {path} cannot be read ({error}); remove {folder} to begin anew") from error
    if header.get("key") != key:
        refuse_another_run(folder, "remove the folder, or name another with --work")
    return state, tensors
