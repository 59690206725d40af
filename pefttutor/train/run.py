"""A run of `fit`: its generators, checkpoint, bar and record, so that the loop can be read in one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pefttutor.data.batches import Collate, Loss
from pefttutor.data.evaluation import evaluate
from pefttutor.train.checkpoint import (
    Buffers,
    read_state,
    restore,
    rng_state,
    save_state,
    set_rng_state,
    versions,
)
from pefttutor.train.checks import check_resumable, described
from pefttutor.train.history import History
from pefttutor.train.progress import bar
from pefttutor.train.schedule import lr_factor

__all__ = ["Run"]


@dataclass(kw_only=True)
class Run:
    """What stands around the steps of one training.

    total: steps in all. every: steps between evaluations. settings: those of `fit`, which a resumed run must share.
    `done` counts the steps, from 0.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    total: int
    every: int
    checkpoint: str | Path | None
    validation: Sequence[Any] | None
    metric: Callable[[Any], Any] | None
    loss: Loss | None
    collate: Collate
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.before = versions(self.model)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def done(self) -> int:
        return len(self.history.steps)

    @contextmanager
    def started(self, *, resume: bool, seed: int, show: bool | None) -> Iterator[None]:
        """The run's own random numbers inside; Ctrl-C ends it with a checkpoint; outside all is as it was before.

        A step that breaks off, by Ctrl-C or an error, leaves the buffers of the step before.
        """
        outside = rng_state(self.device)
        if resume:
            assert self.checkpoint is not None
            tensors, header = read_state(self.checkpoint)
            check_resumable(header["rest"], self.settings, self.model)
            self.rng = restore(self.model, self.optimizer, tensors, header)
            self.history = History(**header["rest"]["history"])
        else:
            torch.manual_seed(seed)
            self.rng = rng_state(self.device)
        self.buffers = Buffers(self.model)
        self.bar = bar(self.total, done=self.done, show=show)
        try:
            yield
        except BaseException as error:
            self.buffers.put_back()
            if not isinstance(error, KeyboardInterrupt):
                raise
            self.history.interrupted = True
            self.keep()
        finally:
            self.bar.close()
            self.model.zero_grad()
            self.model.eval()
            set_rng_state(outside, self.device)

    def rates(self) -> dict[int, float]:
        """The peak learning rate of each parameter, by its id."""
        groups = zip(self.optimizer.param_groups, self.peaks, strict=True)
        return {id(p): peak for group, peak in groups for p in group["params"]}

    def begin(self) -> None:
        """Before a step: training mode, the step's learning rate, and the run's own random numbers."""
        self.started_at = time.perf_counter()
        self.model.train()
        set_rng_state(self.rng, self.device)  # evaluation may have drawn numbers; training must not notice
        warmup, schedule = self.settings["warmup"], self.settings["schedule"]
        factor = lr_factor(self.done, self.total, warmup=warmup, schedule=schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def record(self, loss: float) -> None:
        """After a step: one row of numbers, and where the random numbers and the buffers stand."""
        lr = float(self.optimizer.param_groups[0]["lr"])  # some keep it as a tensor
        self.history.record(loss=loss, lr=lr, step_s=time.perf_counter() - self.started_at)
        self.rng = rng_state(self.device)
        self.buffers.keep()
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update()

    def evaluate(self) -> None:
        """Where an evaluation is due: measure, and write the checkpoint."""
        if not self.done or (self.done % self.every and self.done != self.total):
            return
        last = self.history.validation[-1]["step"] if self.history.validation else 0
        if (self.validation is not None or self.metric is not None) and last != self.done:
            self.model.eval()
            entry: dict[str, float] = {"step": self.done}
            if self.validation is not None:
                entry |= evaluate(self.model, self.validation, loss=self.loss, collate=self.collate)
            if self.metric is not None:
                measured = self.metric(self.model)
                entry |= measured if isinstance(measured, dict) else {"metric": float(measured)}
            self.buffers.keep()
            self.history.validation.append(entry)
        self.keep()

    def keep(self) -> None:
        """Write all that the next step depends on."""
        if self.checkpoint is None:
            return
        written = [n for n, p in self.model.named_parameters() if p._version != self.before.get(n)]
        rest = described(self.model, written) | {
            "settings": self.settings,
            "history": self.history.as_dict() | {"interrupted": False},
        }
        save_state(self.checkpoint, self.model, self.optimizer, self.rng, self.before, rest)
