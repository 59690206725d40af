"""`fit`: one plain training loop.

Read it from `while True`: gather the gradient, let the method have its say, clip, step. What stands around it
is for people: clear errors before the first step, a bar, a record, stopping and going on.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pefttutor.data.batches import Batch, Collate, Loss, collator, count_targets, predicts_next
from pefttutor.data.checks import check_examples
from pefttutor.data.evaluation import evaluate
from pefttutor.method import adapted
from pefttutor.train.checkpoint import (
    read_state,
    restore,
    rng_state,
    save_state,
    set_rng_state,
    uninterrupted,
    versions,
)
from pefttutor.train.checks import check_resumable, check_settings
from pefttutor.train.history import History
from pefttutor.train.progress import bar
from pefttutor.train.schedule import lr_factor, step_indices

__all__ = ["fit"]


def fit(
    model: nn.Module,
    train: Sequence[Any],
    *,
    method: Any = None,
    validation: Sequence[Any] | None = None,
    metric: Callable[[Any], Any] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.06,
    schedule: str = "linear",
    max_grad_norm: float | None = 1.0,
    accumulate: int = 1,
    evaluate_every: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    loss: Loss | None = None,
    collate: Collate | None = None,
) -> History:
    """Train whatever in `model` has requires_grad, and return the record; the model is left in eval mode.

    Each step takes `batch_size · accumulate` examples. Its gradient is that of the mean over all their labels
    (label tokens, or examples when a label is a class), however they are cut into `accumulate` parts:
        g = Σ_k (n_k / Σ n) ∇ loss_k + ∇ penalty,   clipped to the norm `max_grad_norm`, then AdamW.

    method: asked for its hooks penalty, after_backward, after_step and optimizer, where it has them; None takes
        the method that is attached to the model, if there is one. Steps are counted from 0 for the hooks.
    weight_decay: on all that trains (AdamW, one group), unless the method brings its own optimizer.
    steps or epochs: how long; neither means 3 epochs. The last batch of an epoch may be smaller.
    validation: evaluated after every `evaluate_every` steps (None: after each epoch) and at the end;
        metric(model) → number or dict, added to each evaluation.
    warmup: fraction of the steps over which the learning rate rises; then `schedule` (see `lr_factor`).
    seed: of the data's order and of dropout. The global generators are afterwards as they were before.
    checkpoint: folder for the state, saved at each evaluation, at the end and on Ctrl-C. resume=True goes on
        from it and gives, bit for bit, the numbers of a run that wasn't interrupted (a method's own state must
        be in parameters or buffers of the model).
    loss: loss(model, batch) → mean over the batch; without it model(**batch).loss.
    progress: None shows a bar to a person, in a terminal or a notebook, and nothing under test or in CI.

    Cost: per step one forward and one backward an example, and AdamW's two moments a trained parameter.
    Raises: ValueError for bad settings or data and FileNotFoundError when there is nothing to resume, before the
        first step; FloatingPointError when a loss or gradient is not finite, before that step changes a weight.
    """
    settings = {
        "steps": steps, "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
        "warmup": warmup, "schedule": schedule, "max_grad_norm": max_grad_norm, "accumulate": accumulate,
        "evaluate_every": evaluate_every, "seed": seed,
    }  # fmt: skip
    check_settings(model, settings, checkpoint, resume)
    for name, examples in {"train": train, "validation": validation}.items():
        if examples is not None:
            check_examples(model, examples, name, needs_labels=loss is None)
    settings["examples"] = len(train)
    per_epoch = math.ceil(len(train) / (batch_size * accumulate))
    total = steps or max(1, round((epochs or 3) * per_epoch))
    every = evaluate_every or per_epoch
    method = method or adapted(model)
    stack, device, before = collate or collator(model), next(model.parameters()).device, versions(model)

    optimizer = _optimizer(model, method, lr, weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    history, outside = History(), rng_state(device)
    if resume and checkpoint is not None:
        tensors, header = read_state(checkpoint)
        check_resumable(header["rest"]["settings"], settings)
        rng = restore(model, optimizer, tensors, header)
        history = History(**header["rest"]["history"])
    else:
        torch.manual_seed(seed)
        rng = rng_state(device)

    def keep() -> None:
        if checkpoint is not None:
            rest = {"settings": settings, "history": history.as_dict() | {"interrupted": False}}
            save_state(checkpoint, model, optimizer, rng, before, rest)

    shown = bar(total, done=len(history.steps), show=progress)
    try:
        while True:
            done = len(history.steps)
            if done and (done % every == 0 or done == total):
                _validate(model, history, validation, metric, loss=loss, collate=stack)
                keep()
            if done == total:
                break
            started = time.perf_counter()
            model.train()
            set_rng_state(rng, device)  # evaluation may have drawn numbers; training must not notice
            factor = lr_factor(done, total, warmup=warmup, schedule=schedule)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            chosen = [train[i] for i in step_indices(done, len(train), batch_size * accumulate, seed)]
            batches = [stack(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]
            value = _gradient(model, method, batches, loss, done)
            with uninterrupted():
                _update(model, method, optimizer, done, max_grad_norm)
                lr_now = optimizer.param_groups[0]["lr"]
                history.record(loss=value, lr=lr_now, step_s=time.perf_counter() - started)
                rng = rng_state(device)
            shown.set_postfix_str(f"loss {value:.3f}", refresh=False)
            shown.update()
    except KeyboardInterrupt:
        history.interrupted = True
        keep()
    finally:
        shown.close()
        model.zero_grad()
        model.eval()
        set_rng_state(outside, device)
    return history


def _optimizer(model: nn.Module, method: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if hasattr(method, "optimizer"):
        return method.optimizer(model, lr=lr, weight_decay=weight_decay)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)


def _gradient(model: Any, method: Any, batches: list[Batch], loss: Loss | None, step: int) -> float:
    """Add up the gradient of the mean over all batches' labels, and the penalty's; returns that mean."""
    device = next(model.parameters()).device
    counts = [count_targets(batch, shifted=predicts_next(model)) for batch in batches]
    parts = []
    for batch, count in zip(batches, counts, strict=True):
        batch = {key: value.to(device) for key, value in batch.items()}
        part = (loss(model, batch) if loss else model(**batch).loss) * (count / sum(counts))
        part.backward()
        parts.append(part.detach())
    if not math.isfinite(value := torch.stack(parts).sum().item()):
        raise FloatingPointError(
            f"the loss is {value} at step {step + 1}; the weights are those after step {step}. "
            "Try a smaller lr, a longer warmup or a smaller max_grad_norm, or float32 instead of float16."
        )
    if hasattr(method, "penalty"):
        method.penalty(model).backward()
    return value


def _update(
    model: nn.Module, method: Any, optimizer: torch.optim.Optimizer, step: int, max_grad_norm: float | None
) -> None:
    """Change the weights; the method may change the gradient before, and the model after."""
    if hasattr(method, "after_backward"):
        method.after_backward(model, step)
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm} at step {step + 1} although the loss is finite; "
            f"the weights are those after step {step}. Try a smaller lr, or float32 instead of float16."
        )
    optimizer.step()
    if hasattr(method, "after_step"):
        method.after_step(model, step)
    model.zero_grad()


def _validate(
    model: nn.Module,
    history: History,
    validation: Sequence[Any] | None,
    metric: Callable[[Any], Any] | None,
    *,
    loss: Loss | None,
    collate: Collate,
) -> None:
    done = len(history.steps)
    if (validation is None and metric is None) or (
        history.validation and history.validation[-1]["step"] == done
    ):
        return
    model.eval()
    entry: dict[str, float] = {"step": done}
    if validation is not None:
        entry |= evaluate(model, validation, loss=loss, collate=collate)
    if metric is not None:
        measured = metric(model)
        entry |= measured if isinstance(measured, dict) else {"metric": float(measured)}
    history.validation.append(entry)
