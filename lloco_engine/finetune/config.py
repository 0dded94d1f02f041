"""Settings of one training run, and the two presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lloco_engine.config import Config
from lloco_engine.errors import ConfigError

__all__ = ["PRESETS", "FinetuneConfig", "Layout", "preset"]

Layout = tuple[int, int, float]  # segments in the prompt, passages joined into each, share of the documents


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """How an adapter is trained. The defaults are LLoCO's own (Tan et al. 2024, section 4 and its released scripts).

    Args:
        rank, alpha, targets: of the LoRA (Hu et al. 2021): alpha / rank scales what it adds to ``targets``.
        learning_rate: the highest; reached after the share ``warmup`` of the run, then it falls along a cosine to 0.
        epochs: times that every question is asked.
        batch_questions: least questions between two updates.
        ratios: source tokens per slot; each example draws one.
        layouts: how documents of one chunk share a prompt: see `Layout`. Longer ones come alone, with all their chunks.
        max_segments: most chunks of a long document in one prompt; of more, those with most of the questions' words.
        text_share, none_share: shares of the examples that read the raw text, and nothing, instead of segments.
        holdout: share of the documents that is kept for measuring, at most ``holdout_documents``.
        evaluate_every: updates between two measurements.
        patience: measurements without a better one after which the run ends.
        max_minutes: wall time by which the learning rate has reached 0; 0 is no limit.
        rows: most questions in one pass.
        gradient_checkpointing: run each layer again for its gradients: slower, for less memory.
        seed: of the order, the draws and the first weights.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 2e-5
    warmup: float = 0.03
    epochs: int = 3
    batch_questions: int = 8
    ratios: tuple[float, ...] = (30.0,)
    layouts: tuple[Layout, ...] = ((1, 1, 1.0),)
    max_segments: int = 16
    text_share: float = 0.0
    none_share: float = 0.0
    holdout: float = 0.05
    holdout_documents: int = 16
    evaluate_every: int = 50
    patience: int = 3
    max_minutes: float = 0.0
    rows: int = 16
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        object.__setattr__(self, "layouts", tuple((int(k), int(j), float(s)) for k, j, s in self.layouts))
        for name in ("rank", "epochs", "batch_questions", "max_segments", "evaluate_every", "patience", "rows"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("alpha", "learning_rate"):
            _require(getattr(self, name) > 0, f"{name} must be above 0", getattr(self, name))
        for name in ("text_share", "none_share", "holdout"):
            _require(0 <= getattr(self, name) <= 1, f"{name} must be from 0 to 1", getattr(self, name))
        _require(0 < self.warmup < 1, "warmup must be above 0 and below 1", self.warmup)
        shares = self.text_share + self.none_share
        _require(shares <= 1, "text_share and none_share must add up to at most 1", shares)
        _require(bool(self.targets), "targets must name at least one module", self.targets)
        _require(bool(self.ratios) and min(self.ratios) >= 1, "ratios must be numbers of at least 1", self.ratios)
        fine = all(k >= 1 and j >= 1 and share > 0 for k, j, share in self.layouts)
        _require(bool(self.layouts) and fine, "layouts must have segments, passages and share above 0", self.layouts)
        _require(self.max_minutes >= 0, "max_minutes must not be negative (0 is no limit)", self.max_minutes)
        _require(self.holdout_documents >= 0, "holdout_documents must not be negative", self.holdout_documents)


def _require(holds: bool, rule: str, received: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, not {received!r}")


_SMALL: dict[str, Any] = {
    "rank": 16,
    "alpha": 32.0,
    "learning_rate": 8e-4,
    "warmup": 0.05,
    "epochs": 1,
    "batch_questions": 8,
    "ratios": (8, 12, 16, 24, 30),
    "layouts": (
        (1, 1, 0.34),
        (2, 1, 0.10),
        (4, 1, 0.12),
        (8, 1, 0.16),
        (16, 1, 0.08),
        (1, 4, 0.10),
        (2, 4, 0.10),
    ),
    "text_share": 0.08,
    "none_share": 0.04,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": {}, "small": _SMALL}


def preset(name: str, **changes: Any) -> FinetuneConfig:
    """The settings of a preset, ``"paper"`` or ``"small"`` (for decoders under a billion weights), with changes.

    Raises:
        ConfigError: there is no such preset, or a setting breaks its rule.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, not {name!r}")
    return FinetuneConfig.from_json({**PRESETS[name], **changes})
