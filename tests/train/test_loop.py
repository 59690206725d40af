"""`fit`: the mathematics of a step, what trains, what is left behind, and what isn't finite."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from pefttutor.data.batches import collate
from pefttutor.train import evaluate, fit, step_indices
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


@pytest.mark.parametrize("problem", ["regression", None])
def test_a_regression_is_given_its_whole_numbers_as_floats(problem: str | None) -> None:
    """Torch 2.11 takes the loss of whole numbers, and then raises in its backward."""
    model, seen = llama_classifier(num_labels=1, problem_type=problem), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["labels"]), with_kwargs=True
    )
    fit(model, class_examples(4), steps=1, batch_size=4)
    assert [labels.dtype for labels in seen] == [torch.float32]
    seen.clear()
    fit(
        llama_classifier(), class_examples(4), steps=1, batch_size=4
    )  # classes stay whole numbers, or it would raise


def test_any_module_trains_with_its_own_loss() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    data = [{"x": row, "y": row @ torch.tensor([1.0, -2.0, 0.5])} for row in x]
    model = nn.Linear(3, 1)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(batch["x"]).squeeze(1) - batch["y"]).square().mean()

    history = fit(model, data, validation=data, loss=loss, steps=200, lr=0.05, weight_decay=0)
    assert history.validation[-1].keys() == {"step", "loss"}
    assert history.validation[-1]["loss"] < 1e-3


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
