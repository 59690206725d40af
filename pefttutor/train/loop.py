"""`fit`: one plain training loop.

Read it from `while True`: gather the gradient, let the methods have their say, clip, step. What stands around it is
for people, and in `Run`: a bar, a record, stopping and going on.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pefttutor.data.batches import Batch, Collate, Loss, collator
from pefttutor.data.checks import check_examples
from pefttutor.data.targets import predicts_next, weighted
from pefttutor.train.checkpoint import uninterrupted
from pefttutor.train.checks import check_settings
from pefttutor.train.history import History
from pefttutor.train.hooks import Hooks
from pefttutor.train.run import Run
from pefttutor.train.schedule import step_indices
from pefttutor.train.watch import Watch

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

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)                      # a first step of AdamW is as long as lr
    >>> square = lambda model, batch: model(batch["x"]).square().mean()
    >>> fit(model, [{"x": torch.ones(1)}], loss=square, steps=1, lr=0.25, warmup=0, weight_decay=0).loss
    [1.0]
    >>> round(model.weight.item(), 3)
    0.75

    method: asked for its hooks (`pefttutor.method.Trains`), where it has them; None takes the methods that are
        attached to the model and train. Steps are counted from 0 for the hooks.
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
    settings["examples"], per_step = len(train), batch_size * accumulate
    per_epoch = math.ceil(len(train) / per_step)
    stack, hooks = collate or collator(model), Hooks(model, method)
    run = Run(
        model=model, optimizer=hooks.optimizer(lr=lr, weight_decay=weight_decay), settings=settings,
        total=steps or max(1, round((epochs or 3) * per_epoch)), every=evaluate_every or per_epoch,
        checkpoint=checkpoint, validation=validation, metric=metric, loss=loss, collate=stack,
    )  # fmt: skip
    with run.started(resume=resume, seed=seed, show=progress):
        watch = Watch(model)
        while True:
            run.evaluate()
            if run.done == run.total:
                break
            run.begin()
            chosen = [train[i] for i in step_indices(run.done, len(train), per_step, seed)]
            batches = [stack(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]
            value = _gradient(model, batches, loss, run.done)
            hooks.penalty().backward()
            watch.after_backward(run.rates())
            with uninterrupted():
                hooks.after_backward(run.done)
                _step(model, run.optimizer, max_grad_norm, run.done)
                hooks.after_step(run.done)
                watch.after_step()
                model.zero_grad()
                run.record(value)
    hooks.warn_of_unfinished()
    return run.history


def _gradient(model: Any, batches: list[Batch], loss: Loss | None, step: int) -> float:
    """Add up the gradient of the mean over all batches' labels; returns that mean."""
    device = next(model.parameters()).device
    parts = []
    for batch, share in weighted(batches, shifted=predicts_next(model, batches[0])):
        batch = {key: value.to(device) for key, value in batch.items()}
        part = (loss(model, batch) if loss else model(**_with_numbers(model, batch)).loss) * share
        part.backward()
        parts.append(part.detach())
    if not math.isfinite(value := torch.stack(parts).sum().item()):
        raise FloatingPointError(
            f"the loss is {value} at step {step + 1}; the weights are those after step {step}. "
            "Try a smaller lr, a longer warmup or a smaller max_grad_norm, or float32 instead of float16."
        )
    return value


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, step: int) -> None:
    """Clip the gradient and change the weights."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm} at step {step + 1} although the loss is finite; "
            f"the weights are those after step {step}. Try a smaller lr, or float32 instead of float16."
        )
    optimizer.step()
    torch.clear_autocast_cache()  # inside torch.autocast the next step would see the weights of before, rounded


def _with_numbers(model: Any, batch: Batch) -> Batch:
    """The batch with a regression's labels as floats: torch 2.11 takes no gradient of an error in whole numbers."""
    config, labels = getattr(model, "config", None), batch.get("labels")
    one = (
        type(model).__name__.endswith("ForSequenceClassification")
        and getattr(config, "num_labels", None) == 1
    )
    if labels is None or not (one or getattr(config, "problem_type", None) == "regression"):
        return batch
    return batch | {"labels": labels.float()}
