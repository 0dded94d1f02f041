"""The training loop: gradients into the adapter alone, the loss on answer tokens, the memory frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lloco_engine.decoder.local import LocalDecoder, Prompt
from lloco_engine.errors import ConfigError
from lloco_engine.finetune import checkpoint
from lloco_engine.finetune.batches import Example
from lloco_engine.finetune.checkpoint import State
from lloco_engine.finetune.config import FinetuneConfig
from lloco_engine.finetune.distill import Teacher, distillation_loss
from lloco_engine.finetune.packing import answer_logits
from lloco_engine.finetune.segments import Segments
from lloco_engine.models import quicker_in_bf16
from lloco_engine.tokenizing import encode, encoder_of

__all__ = ["Progress", "Training", "rate"]

_SAVE_EVERY_S = 120.0
_CLIP = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class Progress:
    """Where a run stands, after each update. ``held_out`` is the latest loss on the held-out documents."""

    step: int
    steps: int
    loss: float
    held_out: float | None
    tokens_per_s: float
    seconds_left: float


class Training:
    """One run, from its checkpoint on if there is one.

    Args:
        decoder: is given a new adapter ``name``, which it keeps.
        name: of the adapter while it is trained.
        config: settings.
        batches: examples by update, of all epochs.
        held_out: examples to measure on; without any, the last weights are the best.
        segments: what the examples read.
        work: the run's folder.
        key: hash of everything that the run depends on.
        progress: called after each update.
        start: weights to begin with, by parameter name; None for fresh ones. Targets that it has none for begin fresh.
        teachers: by question id, where the loss is not the gold answer's but the distance from these.

    Raises:
        ConfigError: ``start`` is of another rank, or has targets that the run has not.
    """

    def __init__(
        self,
        decoder: LocalDecoder,
        name: str,
        config: FinetuneConfig,
        batches: Sequence[Sequence[Example]],
        held_out: Sequence[Example],
        segments: Segments,
        work: Path,
        key: str,
        progress: Callable[[Progress], None] | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
        teachers: Mapping[str, Teacher] | None = None,
    ) -> None:
        from accelerate import Accelerator

        self._decoder, self._name, self._config = decoder, name, config
        self._batches, self._held_out, self._segments = batches, held_out, segments
        self._work, self._key, self._progress, self._teachers = work, key, progress, teachers or {}
        runner = decoder.runner
        self._in_bf16 = runner.bf16 and quicker_in_bf16(runner.device, runner.dtype)
        self._accelerator: Any = Accelerator(cpu=decoder.runner.device.type == "cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.parameters = decoder.add_adapter(lora_config(config), name)
        if start is not None:
            self._begin_with(start)
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, weight_decay=0.0)
        self.best = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.state = State()
        if (found := checkpoint.load(work, key)) is not None:
            self._restore(*found)
        self._began = time.monotonic() - self.state.seconds
        self._saved = time.monotonic()
        self._latest: float | None = self.state.best_loss

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self._accelerator.is_main_process)

    def wait(self) -> None:
        """Wait until every process of the run is here."""
        self._accelerator.wait_for_everyone()

    def run(self) -> State:
        """Train to the end; the best weights are then in `best`."""
        state, config = self.state, self._config
        if state.step == 0 and not state.log:
            self._measure()
        while state.step < len(self._batches) and not state.finished:
            share = self._share()
            if share >= 1:
                break
            self._update(self._batches[state.step], rate(share, config))
            if state.step % config.evaluate_every == 0 and state.step < len(self._batches):
                self._measure()
                state.finished = state.since_best >= config.patience
                self._save()
            elif time.monotonic() - self._saved > _SAVE_EVERY_S:
                self._save()
        if (
            state.step
            and not state.finished
            and state.log[-1]["step"] == state.step
            and "held_out" not in state.log[-1]
        ):
            self._measure()
        state.finished = True
        self._save()
        return state

    # -- one update ---------------------------------------------------------------------------------------------

    def _update(self, batch: Sequence[Example], learning_rate: float) -> None:
        accelerator, state = self._accelerator, self.state
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        count = sum(len(answer) for example in batch for answer in self._answers(example))
        total = torch.zeros((), device=self._decoder.runner.device)
        tokens = torch.zeros((), device=total.device)
        for example in mine:
            loss, _, run = self._loss(example)
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tokens += run
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if accelerator.num_processes > 1:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")
        if accelerator.num_processes > 1:
            total, tokens = accelerator.reduce(total, reduction="sum"), accelerator.reduce(tokens, reduction="sum")
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += int(tokens)
        state.seconds = time.monotonic() - self._began
        mean = float(total) / count
        state.log.append(
            {
                "step": state.step,
                "loss": round(mean, 4),
                "learning_rate": float(f"{learning_rate:.3g}"),
                "seconds": round(state.seconds, 1),
            }
        )
        self._tell(mean)

    def _loss(self, example: Example) -> tuple[torch.Tensor, int, int]:
        """Summed loss of the answers, their tokens, and the tokens run."""
        prefix = self._segments.prefix(example) if example.kind == "memory" else None
        context = None
        if example.kind == "text":
            joint = encoder_of(self._decoder.tokenizer).ids("\n\n", "text")
            context = [token for n, ids in enumerate(example.chunks) for token in ([*joint, *ids] if n else ids)]
        prompts = [Prompt(question.question, prefix, context) for question in example.questions]
        answers = self._answers(example)
        sizes = [len(answer) for answer in answers]
        made = answer_logits(
            self._decoder,
            prompts,
            answers,
            self._name,
            recompute=self._config.gradient_checkpointing,
            in_bf16=self._in_bf16,
        )
        taught = [self._teachers.get(question.id) for question in example.questions]
        loss = made.logits.new_zeros(())
        parts = torch.split(made.logits, sizes), torch.split(made.targets, sizes), taught
        for logits, targets, teacher in zip(*parts, strict=True):
            if teacher is None:
                loss = loss + F.cross_entropy(logits, targets, reduction="sum")
            else:
                loss = loss + distillation_loss(logits, [teacher])
        return loss, len(made.targets), made.tokens

    def _answers(self, example: Example) -> list[list[int]]:
        decoder = self._decoder
        end = decoder.end
        return [[*encode(decoder.tokenizer, question.answers[0]), end] for question in example.questions]

    # -- measuring ----------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """The loss on the held-out documents; the best weights so far are kept."""
        state = self.state
        if not self._held_out:
            self.best = {key: value.detach().clone() for key, value in self.parameters.items()}
            state.best_step = state.step
            return
        accelerator = self._accelerator
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            for example in self._held_out[accelerator.process_index :: accelerator.num_processes]:
                loss, tokens, _ = self._loss(example)
                sums += torch.tensor([float(loss), float(tokens)], dtype=torch.float64)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum")
        measured = float(sums[0] / sums[1])
        state.seconds = time.monotonic() - self._began
        state.log.append({"step": state.step, "held_out": round(measured, 4), "seconds": round(state.seconds, 1)})
        self._latest = measured
        if state.best_loss is None or measured < state.best_loss:
            state.best_loss, state.best_step, state.since_best = measured, state.step, 0
            self.best = {key: value.detach().clone() for key, value in self.parameters.items()}
        else:
            state.since_best += 1

    # -- progress and checkpoints -------------------------------------------------------------------------------

    def _share(self) -> float:
        """How much of the run is done, by updates or by the clock, whichever is further."""
        share = self.state.step / len(self._batches)
        if self._config.max_minutes:
            seconds = time.monotonic() - self._began
            if self._accelerator.num_processes > 1:  # all must come to the same
                clock = torch.tensor(seconds, device=self._accelerator.device)
                seconds = float(self._accelerator.reduce(clock, reduction="mean"))
            share = max(share, seconds / (60 * self._config.max_minutes))
        return share

    def _tell(self, loss: float) -> None:
        if self._progress is None or not self._accelerator.is_main_process:
            return
        state, steps = self.state, len(self._batches)
        left = state.seconds / state.step * (steps - state.step)
        if self._config.max_minutes:
            left = min(left, 60 * self._config.max_minutes - state.seconds)
        speed = state.tokens / max(state.seconds, 1e-9)
        self._progress(Progress(state.step, steps, loss, self._latest, speed, max(left, 0.0)))

    def _save(self) -> None:
        self._saved = time.monotonic()
        self.state.seconds = self._saved - self._began
        if self._accelerator.is_main_process:
            checkpoint.save(self._work, self._key, self.state, dict(self._tensors()))
        self._accelerator.wait_for_everyone()

    def _tensors(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        yield "weight", {key: value.detach() for key, value in self.parameters.items()}
        yield "best", self.best
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = {key: self._optimizer.state[value].get(kind) for key, value in self.parameters.items()}
            yield kind, {key: value for key, value in moments.items() if value is not None}

    def _begin_with(self, start: Mapping[str, torch.Tensor]) -> None:
        theirs = {key: tuple(value.shape) for key, value in start.items()}
        mine = {key: tuple(value.shape) for key, value in self.parameters.items() if key in theirs}
        if theirs != mine:
            differ = next(key for key in sorted(theirs) if mine.get(key) != theirs[key])
            raise ConfigError(
                f"an adapter to begin with must be of the run's rank, and its targets the run's: {differ} is "
                f"{theirs[differ]} there and {mine.get(differ)} here"
            )
        for key, value in start.items():
            self.parameters[key].data.copy_(value)

    def _restore(self, state: State, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        self.state = state
        for key, parameter in self.parameters.items():
            parameter.data.copy_(tensors["weight"][key])
            self.best[key].copy_(tensors["best"][key])
            if key in tensors.get("exp_avg", {}):
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": tensors["exp_avg"][key].to(parameter.device),
                    "exp_avg_sq": tensors["exp_avg_sq"][key].to(parameter.device),
                }


def lora_config(config: FinetuneConfig) -> Any:
    """PEFT's settings of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )


def rate(share: float, config: FinetuneConfig) -> float:
    """The learning rate where a share of the run is done: a line up, then a cosine down to 0."""
    if share < config.warmup:
        return config.learning_rate * max(share, 1e-3) / config.warmup
    rest = (share - config.warmup) / (1 - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))
