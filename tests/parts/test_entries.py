"""Chosen entries of real models: their gradients, and not a bit of the others, through training, saving, resuming."""

from __future__ import annotations

import copy

import pytest
import torch

from pefttutor import SparseFineTuning, adapted, fit, load, save, trainable
from pefttutor.parts.entries import entries, masks
from tests.tiny import checkpointed, language_examples, llama

F64 = torch.float64


def draw(model, p=0.3, seed=3, only=lambda name: True):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(w.shape, generator=generator) < p
        for name, w in model.named_parameters()
        if only(name)
    }


def full(model):
    return model.requires_grad_(True)


def base_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith("_values")}


@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_and_gradients_are_the_models_own(tiny, batch, kind, side):
    model, inputs = full(tiny(kind, dtype=F64)), batch(kind, side=side, dtype=F64)
    plain = model(**inputs)
    plain.loss.backward()
    dense = {name: p.grad for name, p in model.named_parameters()}
    chosen = draw(model)
    sparse = SparseFineTuning().attach(tiny(kind, dtype=F64), chosen)
    result = sparse(**inputs)
    assert torch.equal(result.logits, plain.logits)
    result.loss.backward()
    seen = 0
    for name, p in sparse.named_parameters():
        if name.endswith("_values"):
            origin = name.removesuffix("_values")
            expected = dense[origin]
            expected = torch.zeros(()) if expected is None else expected[chosen[origin]]
            got = torch.zeros_like(expected) if p.grad is None else p.grad
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
            seen += int(got.abs().max() > 0)
        else:
            assert p.grad is None
    assert seen > 10
    assert sum(trainable(sparse).values()) == sum(int(m.sum()) for m in chosen.values())
    assert all(torch.equal(m, chosen[name]) for name, m in masks(sparse).items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_same_under_activation_checkpointing(tiny, batch, reentrant):
    grads = []
    for on in (False, True):
        model = tiny("llama", dtype=F64)
        SparseFineTuning().attach(model, draw(model, only=lambda name: "layers" in name))
        if on:
            checkpointed(model.train(), reentrant=reentrant)
        model(**batch("llama")).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-12, atol=1e-15)


def test_entries_outside_are_bit_identical_after_training_with_decay_and_momentum():
    model = llama()
    chosen, before = draw(model, 0.1), base_weights(model)
    SparseFineTuning().attach(model, chosen)
    fit(model, language_examples(), steps=8, lr=0.05, weight_decay=0.5)
    for name, weight in base_weights(model).items():
        assert torch.equal(weight[~chosen[name]], before[name][~chosen[name]]), name
        moved = weight[chosen[name]] != before[name][chosen[name]]
        assert moved.sum() >= 0.9 * len(moved), name


def test_saved_small_and_loaded_onto_the_same_base_only(tmp_path, tiny, batch, kind):
    model = tiny(kind)
    SparseFineTuning().attach(model, draw(model, 0.02))
    for name, p in model.named_parameters():
        if name.endswith("_values"):
            p.data.add_(0.3)
    inputs = batch(kind)
    expected = model(**inputs).logits
    save(model, tmp_path)
    k = sum(trainable(model).values())
    assert (tmp_path / "adapter.safetensors").stat().st_size < 8 * k + 40_000  # the header lists the base
    again = load(tiny(kind), tmp_path)
    assert torch.equal(again(**inputs).logits, expected)
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, dict(again.named_parameters())[name])
    assert all(torch.equal(a, b) for a, b in zip(masks(model).values(), masks(again).values(), strict=True))
    other = tiny(kind, seed=5)
    before = base_weights(other)
    with pytest.raises(ValueError, match="another base"):
        load(other, tmp_path)
    assert adapted(other) is None
    assert all(torch.equal(before[n], p) for n, p in other.named_parameters())


def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path):
    class Stop:  # asked beside what is attached
        def after_backward(self, model, step):
            if step == stop_at:
                raise KeyboardInterrupt

    def run(**more):
        model = llama(attention_dropout=0.1)
        SparseFineTuning().attach(model, draw(model, 0.2))
        fit(model, language_examples(), method=Stop(), steps=7, lr=0.02, **more)
        return base_weights(model)

    stop_at = -1
    expected = run()
    stop_at = 4
    run(checkpoint=tmp_path)
    stop_at = -1
    resumed = run(checkpoint=tmp_path, resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    from safetensors import safe_open

    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as file:
        kept = {n for n in file.keys() if n.startswith("parameter.")}  # noqa: SIM118
    assert kept
    assert all(name.endswith("_values") for name in kept)


def test_a_loop_of_ones_own_that_writes_data_is_followed():
    model = llama()
    SparseFineTuning().attach(model, {"model.layers.0.mlp.up_proj.weight": torch.ones(24, 16).bool()})
    ids = torch.tensor([[1, 7, 8, 9]])
    before = model(input_ids=ids).logits
    model.model.layers[0].mlp.up_proj.weight_values.data.mul_(3)
    assert not torch.equal(model(input_ids=ids).logits, before)


def test_a_copy_stands_alone(tiny, batch):
    model = tiny("bert")
    SparseFineTuning().attach(model, draw(model))
    twin, inputs = copy.deepcopy(model), batch("bert")
    expected = model(**inputs).logits
    for p in twin.parameters():
        if p.requires_grad:
            p.data.add_(1)
    assert not torch.equal(twin(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_head_trains_fully_and_is_saved(tmp_path, tiny, batch):
    model = tiny("bert")
    method = SparseFineTuning(modules_to_save=("classifier",))
    method.attach(model, draw(model, 0.05))
    assert {"classifier.weight", "classifier.bias"} <= set(trainable(model))
    assert not any("classifier" in name for name in entries(model))
    model.classifier.weight.data.add_(1)
    save(model, tmp_path)
    base = tiny("bert")
    base.classifier.weight.data.mul_(0)  # a head of its own
    assert torch.equal(load(base, tmp_path)(**batch("bert")).logits, model(**batch("bert")).logits)


def test_an_exception_inside_the_model_leaves_no_trace(tiny):
    model = tiny("bert")
    SparseFineTuning().attach(model, draw(model))
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[5000]]))
    assert not any("weight" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (None, "needs masks"),
        (
            {"nowhere.weight": torch.ones(2).bool()},
            r"'nowhere.weight', which this model doesn't have; it has",
        ),
        ({"model.norm.weight": torch.ones(2).bool()}, r"is \(2,\), expected the weight's \(16,\)"),
        ({"model.norm.weight": torch.ones(16)}, "torch.float32; expected booleans"),
        ({"model.norm.weight": torch.zeros(16).bool()}, "no entry is chosen"),
        ({"model.norm.weight": torch.tensor([3, 16])}, "aren't some of its 16 entries"),
    ],
)
def test_errors_say_what_was_given_and_change_nothing(chosen, says):
    model = llama()
    with pytest.raises(ValueError, match=says):
        SparseFineTuning().attach(model, chosen)
    assert adapted(model) is None
    assert all(p.requires_grad for p in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
