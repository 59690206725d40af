"""fit: the mathematics of a step, the hooks, the errors, stopping and going on."""

import copy
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pefttutor.data.batches import collate
from pefttutor.train import evaluate, fit, lr_factor, step_indices
from tests.tiny import class_examples, language_examples, llama, llama_classifier, weights


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> bool:
    return all(torch.allclose(left[n], right[n], rtol=0, atol=tolerance) for n in left)


class Plain:
    """A learner's own method without any hook."""


# ---- one step


@pytest.mark.parametrize("kind", ["language", "class"])
def test_accumulated_parts_give_the_gradient_of_the_big_batch(kind: str) -> None:
    make, data = (llama, language_examples()) if kind == "language" else (llama_classifier, class_examples())
    grads = {}
    for accumulate, batch_size in ((1, 8), (2, 4), (3, 3)):
        model = make().double()
        seen: list[dict[str, torch.Tensor]] = []

        class Look:
            def after_backward(self, model: nn.Module, step: int, seen: Any = seen) -> None:
                seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        size = batch_size * accumulate
        fit(model, data[:size], method=Look(), steps=1, batch_size=batch_size, accumulate=accumulate)
        grads[accumulate] = seen[0]
    assert close(grads[1], grads[2], 1e-12)
    assert not close(grads[1], grads[3], 1e-6)  # other examples: the comparison can tell


def test_uneven_parts_are_weighted_by_their_label_tokens() -> None:
    data = language_examples(4, lengths=(4, 4, 14, 15))
    model = llama().double()
    expected = model(**collate(data)).loss
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    taken = {}

    class Look:
        def after_backward(self, model: nn.Module, step: int) -> None:
            taken.update({n: p.grad.clone() for n, p in model.named_parameters()})

    history = fit(model, data, method=Look(), steps=1, batch_size=2, accumulate=2)
    assert history.loss[0] == pytest.approx(expected.item(), abs=1e-5)  # transformers' loss is float32
    assert close(grads, taken, 1e-6)


def test_a_run_equals_a_loop_written_out_with_torch() -> None:
    data, steps, seed = language_examples(10), 6, 3
    model = llama()
    other = copy.deepcopy(model)
    history = fit(
        model,
        data,
        steps=steps,
        batch_size=4,
        lr=1e-2,
        weight_decay=0.1,
        warmup=0.4,
        seed=seed,
        max_grad_norm=0.5,
    )
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(steps):
        batch = collate([data[i] for i in step_indices(step, len(data), 4, seed)])
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25)[step]
        loss = other(**batch).loss
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in other.parameters()))
        assert norm > 0.5  # clipping has something to do
        for p in other.parameters():
            p.grad.mul_(0.5 / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert history.loss == pytest.approx(losses, abs=1e-5)
    assert close(weights(model), weights(other), 1e-5)


def test_clipping_bounds_the_norm_and_none_switches_it_off() -> None:
    norms = {}
    for limit in (0.1, None):
        model = llama()

        class Look(Plain):
            def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
                return Spy(model.parameters(), lr=lr)

        class Spy(torch.optim.SGD):
            def step(self, closure: Any = None, limit: Any = limit) -> None:
                grads = [p.grad for group in self.param_groups for p in group["params"]]
                norms[limit] = torch.cat([g.flatten() for g in grads]).norm().item()
                super().step()

        fit(model, language_examples(4), method=Look(), steps=1, max_grad_norm=limit)
    assert norms[0.1] == pytest.approx(0.1, rel=1e-3)
    assert norms[None] > 0.2


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_learning_rate_follows_its_closed_formula(schedule: str) -> None:
    steps, rising = 20, 5
    history = fit(llama(), language_examples(4), steps=steps, warmup=0.25, schedule=schedule, lr=0.01)
    for step, lr in enumerate(history.lr):
        p = (step - rising) / (steps - rising)
        after = {"linear": 1 - p, "constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * p))}[schedule]
        assert lr == pytest.approx(0.01 * ((step + 1) / 6 if step < rising else after))
    assert min(history.lr) > 0


def test_learning_rate_is_at_its_peak_without_warmup_and_for_a_single_step() -> None:
    assert lr_factor(0, 1, warmup=0.06, schedule="linear") == 1
    assert lr_factor(0, 100, warmup=0.0, schedule="cosine") == 1


def test_every_epoch_takes_each_example_once_in_another_order() -> None:
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in step_indices(step, 10, 4, 0)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert step_indices(0, 10, 4, 0) != step_indices(0, 10, 4, 1)


def test_length_of_a_run() -> None:
    data = language_examples(10)
    assert len(fit(llama(), data, epochs=2, batch_size=4).steps) == 6
    assert len(fit(llama(), data, epochs=0.5, batch_size=2, accumulate=2).steps) == 2
    assert len(fit(llama(), data, batch_size=4).steps) == 9  # 3 epochs
    assert fit(llama(), data, steps=2).steps == [1, 2]


# ---- what trains, and what fit leaves behind


def test_frozen_weights_stay_bit_identical_and_the_others_move() -> None:
    model = llama().requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    before = weights(model)
    fit(model, language_examples(), steps=10, weight_decay=0.5, lr=1e-2)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_model_ends_in_eval_mode_without_gradients_and_the_global_generator_is_untouched() -> None:
    model = llama(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    fit(model, language_examples(), steps=2)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_seed_fixes_the_run_whatever_was_drawn_before() -> None:
    runs = []
    for drawn in range(2):
        model = llama(attention_dropout=0.3)
        torch.manual_seed(drawn)
        runs.append((fit(model, language_examples(), steps=4, seed=5).loss, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert equal(runs[0][1], runs[1][1])
    assert fit(llama(attention_dropout=0.3), language_examples(), steps=4, seed=6).loss != runs[0][0]


def test_training_learns() -> None:
    history = fit(llama(), language_examples(8), steps=60, lr=1e-2, batch_size=8)
    assert history.loss[-1] < 0.5 * history.loss[0]


def test_any_module_trains_with_its_own_loss() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    data = [{"x": row, "y": row @ torch.tensor([1.0, -2.0, 0.5])} for row in x]
    model = nn.Linear(3, 1)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(batch["x"]).squeeze(1) - batch["y"]).square().mean()

    history = fit(model, data, validation=data, loss=loss, steps=200, lr=0.05, weight_decay=0)
    assert history.validation[-1].keys() == {"step", "loss"}
    assert history.validation[-1]["loss"] < 1e-3


# ---- hooks


class Recorder:
    """All hooks; notes when each is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def penalty(self, model: nn.Module) -> torch.Tensor:
        self.calls.append(("penalty", None))
        return sum((p**2).sum() for p in model.parameters() if p.requires_grad)

    def after_backward(self, model: nn.Module, step: int) -> None:
        self.calls.append(("after_backward", step))

    def after_step(self, model: nn.Module, step: int) -> None:
        assert any(p.grad is not None for p in model.parameters())  # AdaLoRA's budget reads them
        self.calls.append(("after_step", step))

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        self.calls.append(("optimizer", (lr, weight_decay)))
        low, high = list(model.parameters())[:3], list(model.parameters())[3:]
        return torch.optim.SGD([{"params": low, "lr": lr}, {"params": high, "lr": 4 * lr}])


def test_hooks_are_called_in_order_once_a_step() -> None:
    method = Recorder()
    fit(
        llama(),
        language_examples(8),
        method=method,
        steps=2,
        batch_size=2,
        accumulate=2,
        lr=0.1,
        weight_decay=0.3,
    )
    a_step = ["penalty", "after_backward", "after_step"]
    assert [name for name, _ in method.calls] == ["optimizer", *a_step, *a_step]
    assert method.calls[0][1] == (0.1, 0.3)
    assert [value for name, value in method.calls if name == "after_step"] == [0, 1]


def test_the_penalty_adds_its_gradient_and_is_not_in_the_recorded_loss() -> None:
    class Pull:
        def penalty(self, model: nn.Module) -> torch.Tensor:
            return 100 * model.model.norm.weight.square().sum()

    class Look(Pull):
        def after_backward(self, model: nn.Module, step: int) -> None:
            seen.append(model.model.norm.weight.grad.clone())

    class LookOnly:
        after_backward = Look.after_backward

    seen: list[torch.Tensor] = []
    model = llama()
    weight = model.model.norm.weight.detach().clone()
    data = language_examples(4)
    losses = [fit(copy.deepcopy(model), data, method=m, steps=1).loss[0] for m in (Look(), LookOnly())]
    assert losses[0] == losses[1]
    assert torch.allclose(seen[0] - seen[1], 200 * weight, atol=1e-3)


def test_a_mask_after_backward_and_before_clipping_keeps_masked_weights() -> None:
    class Mask:
        def after_backward(self, model: nn.Module, step: int) -> None:
            for name, p in model.named_parameters():
                if "layers.0" in name:
                    p.grad.zero_()

    model = llama()
    before = weights(model)
    fit(model, language_examples(), method=Mask(), steps=3, weight_decay=0)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == ("layers.0" in name)


def test_learning_rates_of_a_methods_groups_keep_their_ratio() -> None:
    rates = []

    class Method(Recorder):
        def after_step(self, model: nn.Module, step: int) -> None:
            rates.append([group["lr"] for group in optimizers[0].param_groups])

        def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
            optimizers.append(super().optimizer(model, lr=lr, weight_decay=weight_decay))
            return optimizers[0]

    optimizers: list[torch.optim.Optimizer] = []
    fit(llama(), language_examples(4), method=Method(), steps=4, warmup=0)
    assert all(high == pytest.approx(4 * low) for low, high in rates)
    assert rates[0][0] > rates[-1][0]


# ---- evaluation


def test_validation_every_so_many_steps_after_each_epoch_and_at_the_end() -> None:
    data = language_examples(8)

    def steps_of(**settings: Any) -> list[float]:
        history = fit(llama(), data, validation=data[:3], batch_size=4, **settings)
        return [entry["step"] for entry in history.validation]

    assert steps_of(steps=5) == [2, 4, 5]
    assert steps_of(steps=5, evaluate_every=3) == [3, 5]
    assert steps_of(epochs=2) == [2, 4]


def test_metric_is_called_in_eval_mode_and_cannot_disturb_training() -> None:
    def metric(model: nn.Module) -> float:
        assert not model.training
        return torch.rand(()).item()

    settings: dict[str, Any] = {"steps": 4, "evaluate_every": 1}
    data = language_examples()
    with_metric = fit(llama(attention_dropout=0.4), data, metric=metric, **settings)
    without = fit(llama(attention_dropout=0.4), data, **settings)
    assert with_metric.loss == without.loss
    assert [set(entry) for entry in with_metric.validation] == [{"step", "metric"}] * 4
    named = fit(llama(), data, metric=lambda model: {"perplexity": 3.0}, steps=1)
    assert named.validation == [{"step": 1, "perplexity": 3.0}]


@pytest.mark.parametrize("kind", ["language", "class"])
def test_evaluate_is_the_mean_over_all_labels_whatever_the_batches(kind: str) -> None:
    model, data = (
        (llama(), language_examples(9)) if kind == "language" else (llama_classifier(), class_examples(9))
    )
    model.train()
    results = [evaluate(model, data, batch_size=size) for size in (1, 4, 9)]
    assert model.training
    model.eval()
    whole = collate(data)
    with torch.no_grad():
        output = model(**whole)
    labels, logits = whole["labels"], output.logits
    if kind == "language":
        labels, logits = labels[:, 1:], logits[:, :-1]
    counted = labels != -100
    right = (logits.argmax(-1) == labels)[counted].double().mean().item()
    for result in results:
        assert result["loss"] == pytest.approx(output.loss.item(), abs=1e-5)
        assert result["accuracy"] == pytest.approx(right)


# ---- errors, all before the first step

NOT_CHANGED = language_examples(4)


def refuse(match: str, model: Any = None, train: Any = NOT_CHANGED, **settings: Any) -> None:
    model = model or llama()
    before = weights(model)
    with pytest.raises(ValueError, match=match):
        fit(model, train, **{"steps": 1, **settings})
    assert equal(before, weights(model))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, r"steps=0, expected a positive whole number"),
        ({"steps": 2.5}, r"steps=2.5, expected a positive whole number"),
        ({"steps": None, "epochs": -1}, r"epochs=-1, expected a positive number"),
        ({"steps": 1, "epochs": 1}, r"both given; choose one"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"accumulate": True}, r"accumulate=True"),
        ({"lr": -0.1}, r"lr=-0.1"),
        ({"lr": math.nan}, r"lr=nan"),
        ({"max_grad_norm": 0}, r"max_grad_norm=0"),
        ({"evaluate_every": 0}, r"evaluate_every=0"),
        ({"warmup": 1.0}, r"warmup=1.0.*0 ≤ warmup < 1"),
        ({"weight_decay": -1}, r"weight_decay=-1"),
        ({"schedule": "step"}, r"schedule='step', expected one of linear, constant, cosine"),
        ({"resume": True}, r"resume=True needs checkpoint="),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    refuse(match, **settings)


def test_nothing_to_train() -> None:
    refuse(r"nothing trains.*Attach a method first", llama().requires_grad_(False))


def test_empty_data() -> None:
    refuse(r"train is empty", train=[])
    refuse(r"validation is empty", validation=[])
    with pytest.raises(ValueError, match="data is empty"):
        evaluate(llama(), [])


def spoiled(**changes: Any) -> list[dict[str, Any]]:
    data = language_examples(4)
    data[2] = {key: value for key, value in {**data[2], **changes}.items() if value is not None}
    return data


def test_labels_that_cannot_be_trained_on() -> None:
    refuse(
        r"train\[2\]: labels have the length 3, input_ids 7", train=spoiled(labels=torch.tensor([7, 8, 9]))
    )
    refuse(r"train\[2\] has no labels, only input_ids, attention_mask", train=spoiled(labels=None))
    refuse(r"train\[2\] has no label to learn from", train=spoiled(labels=torch.full((7,), -100)))
    only_first = torch.full((7,), -100)
    only_first[0] = 9
    refuse(r"no label to learn from: all are -100 after the first position", train=spoiled(labels=only_first))
    refuse(r"train\[2\]: a label is 320, expected 0 to 319", train=spoiled(labels=torch.full((7,), 320)))
    refuse(r"train\[2\]: a label is -1, expected 0 to 319", train=spoiled(labels=torch.full((7,), -1)))
    refuse(r"train\[2\]: input_ids is 999, expected 0 to 319", train=spoiled(input_ids=torch.full((7,), 999)))


def test_class_outside_the_models_classes() -> None:
    data = class_examples(6, classes=4)
    refuse(r"train\[3\]: the label is 3, expected 0 to 2 \(there are 3 classes", llama_classifier(), data)
    refuse(r"validation\[3\]: the label is 3", llama_classifier(), class_examples(6), validation=data)


def test_rows_instead_of_tensors() -> None:
    refuse(
        r"train\[0\] is \['label', 'text'\].*expected a dict of tensors.*encode",
        train=[{"text": "a", "label": 0}],
    )


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_weights() -> None:
    model = llama()
    after: list[dict[str, torch.Tensor]] = []

    class Keep:
        def after_step(self, model: nn.Module, step: int) -> None:
            after.append(weights(model))

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value = model(**batch).loss
        return value * math.nan if len(after) == 2 else value

    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 3; the weights are those after step 2"
    ):
        fit(model, language_examples(), method=Keep(), loss=loss, steps=5)
    assert equal(weights(model), after[1])
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    class Break:
        def after_backward(self, model: nn.Module, step: int) -> None:
            next(model.parameters()).grad[0] = math.inf

    model = llama()
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"gradient's norm is inf at step 1"):
        fit(model, language_examples(), method=Break(), steps=1, max_grad_norm=None)
    assert equal(weights(model), before)


# ---- stopping and going on


class StopAt:
    """Raises KeyboardInterrupt from a place inside step `at`, counted from 0."""

    def __init__(self, at: int, place: str) -> None:
        self.at, self.place = at, place

    def after_backward(self, model: nn.Module, step: int) -> None:
        if self.place == "signal in the update" and step == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.place == "after_backward" and step == self.at:
            raise KeyboardInterrupt


def stopping_loss(at: int, place: str) -> Any:
    calls: list[None] = []
    last = 2 * at - at // 4 + 2  # two parts a step, but one in the fourth of each epoch of 20

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value = model(**batch).loss  # draws dropout first, so that the generator has moved on
        if model.training:
            calls.append(None)
            if len(calls) == last and place == "loss":
                raise KeyboardInterrupt
            if len(calls) == last and place == "signal in the loss":
                os.kill(os.getpid(), signal.SIGINT)
        return value

    return loss


RUN: dict[str, Any] = {
    "steps": 9, "batch_size": 3, "accumulate": 2, "lr": 1e-2, "schedule": "cosine", "evaluate_every": 4,
}  # fmt: skip
DROPOUT: dict[str, Any] = {"attention_dropout": 0.3}


@pytest.fixture(scope="module")
def whole_run() -> tuple[Any, dict[str, torch.Tensor]]:
    model = llama(**DROPOUT)
    return fit(model, language_examples(20), validation=language_examples(5, seed=9), **RUN), weights(model)


@pytest.mark.parametrize("place", ["loss", "signal in the loss", "after_backward", "signal in the update"])
@pytest.mark.parametrize("at", [0, 4, 8])
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, whole_run: tuple[Any, dict[str, torch.Tensor]], place: str, at: int
) -> None:
    data, validation = language_examples(20), language_examples(5, seed=9)
    settings: dict[str, Any] = {**RUN, "validation": validation, "checkpoint": tmp_path / "run"}
    model = llama(**DROPOUT)
    first = fit(model, data, method=StopAt(at, place), loss=stopping_loss(at, place), **settings)
    assert first.interrupted
    assert not model.training
    assert len(first.steps) == at + (place == "signal in the update")  # that step is finished first
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fit.safetensors"]

    fresh = llama(**DROPOUT)
    second = fit(fresh, data, resume=True, **settings)
    expected, expected_weights = whole_run
    assert not second.interrupted
    assert second.steps == expected.steps
    assert second.loss == expected.loss
    assert second.lr == expected.lr
    assert [e["step"] for e in second.validation] == [e["step"] for e in expected.validation]
    assert [e["loss"] for e in second.validation] == [e["loss"] for e in expected.validation]
    assert equal(weights(fresh), expected_weights)


def test_interruption_during_evaluation_repeats_the_evaluation(tmp_path: Path, whole_run: Any) -> None:
    data, validation, asked = language_examples(20), language_examples(5, seed=9), []

    def metric(model: nn.Module) -> dict[str, float]:
        asked.append(None)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return {}

    settings: dict[str, Any] = {**RUN, "validation": validation, "checkpoint": tmp_path, "metric": metric}
    first = fit(llama(**DROPOUT), data, **settings)
    assert (len(first.steps), first.validation) == (4, [])
    fresh = llama(**DROPOUT)
    second = fit(fresh, data, resume=True, **settings)
    assert second.validation == whole_run[0].validation
    assert equal(weights(fresh), whole_run[1])


def test_interruption_without_a_checkpoint_returns_the_record() -> None:
    history = fit(
        llama(), language_examples(), loss=stopping_loss(1, "loss"), steps=5, accumulate=2, batch_size=2
    )
    assert history.interrupted
    assert len(history.steps) == 1


def test_the_usual_handler_of_ctrl_c_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    fit(llama(), language_examples(), steps=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, data = llama(), language_examples()
    history = fit(model, data, steps=3, checkpoint=tmp_path)
    fresh = llama()
    again = fit(fresh, data, steps=3, checkpoint=tmp_path, resume=True)
    assert again.loss == history.loss
    assert equal(weights(fresh), weights(model))


def test_resume_without_a_state_or_with_other_settings(tmp_path: Path) -> None:
    data = language_examples()
    with pytest.raises(FileNotFoundError, match=r"there is no fit.safetensors in .*nowhere.*resume=False"):
        fit(llama(), data, steps=2, checkpoint=tmp_path / "nowhere", resume=True)
    fit(llama(), data, steps=2, checkpoint=tmp_path)
    refuse(
        r"lr was 0.001, now 0.01; examples was 24, now 4", steps=2, lr=0.01, checkpoint=tmp_path, resume=True
    )
