"""Kernels within torch.autocast: what a plain linear layer does there, whoever was first to round."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pefttutor
from pefttutor.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from pefttutor.kernels.lora_linear import lora_linear, lora_linear_reference
from pefttutor.kernels.precision import compute_dtype, shared_dtype
from pefttutor.kernels.sparse_adamw import SparseAdamW

F64, F32, B16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LORA = {"x": (4, 9, 16), "weight": (24, 16), "bias": (24,), "lora_A": (3, 16), "lora_B": (24, 3)}
HEAD = {"hidden": (40, 16), "weight": (30, 16), "bias": (30,)}
LABELS = (torch.arange(40) % 30).masked_fill(torch.arange(40) % 4 == 0, -100)


def ours_lora(x, weight, bias, lora_A, lora_B):
    return lora_linear(x, weight, bias, lora_A, lora_B, 0.5)


def plain_lora(x, weight, bias, lora_A, lora_B):
    return lora_linear_reference(x, weight, bias, lora_A, lora_B, 0.5)


def ours_head(hidden, weight, bias):
    return linear_cross_entropy(hidden, weight, LABELS, bias)


def plain_head(hidden, weight, bias):
    return linear_cross_entropy_reference(hidden, weight, LABELS, bias)


KERNELS = pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [(ours_lora, plain_lora, LORA), (ours_head, plain_head, HEAD)],
    ids=["lora", "head"],
)


def draw(shapes, first=F32, rest=F32, **others):
    """Tensors of the given shapes; the first is the layer's input."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for i, (name, shape) in enumerate(shapes.items()):
        value = torch.randn(shape, generator=generator, dtype=F64) / shape[-1] ** 0.5
        tensors[name] = value.to(others.get(name, rest if i else first)).requires_grad_()
    return tensors


def run(function, tensors):
    """Result and gradients, or the error; the backward pass is after autocast's block, as torch advises."""
    y = function(**tensors)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    with torch.autocast("cpu", enabled=False):
        grads = torch.autograd.grad(y, list(tensors.values()), incoming)
    return [y.detach(), *grads]


def assert_like(ours, plain, tolerance):
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.usefixtures("way")
@KERNELS
@pytest.mark.parametrize("first", [F32, B16, F16])
@pytest.mark.parametrize("rest", [F32, B16])
@pytest.mark.parametrize("cast", [B16, F16])
def test_like_a_plain_layer_whatever_was_rounded_before(ours, plain, shapes, first, rest, cast):
    tensors = draw(shapes, first, rest)
    with torch.autocast("cpu", dtype=cast):
        assert_like(run(ours, tensors), run(plain, tensors), 0.04)


@pytest.mark.usefixtures("way")
@KERNELS
def test_float64_is_left_alone(ours, plain, shapes):
    tensors = draw(shapes, F64, F64)
    outside = run(plain, tensors)
    with torch.autocast("cpu", dtype=B16):
        assert_like(run(ours, tensors), outside, 1e-12)


@KERNELS
@pytest.mark.parametrize(
    ("given", "autocast"),
    [
        ({"first": B16}, False),
        ({"weight": B16}, False),
        ({"bias": B16}, False),
        ({"first": F64}, True),
        ({"weight": F64}, True),
        ({"bias": F64}, True),
    ],
)
@pytest.mark.parametrize("around", [False, True])
def test_what_a_plain_layer_refuses_is_refused(ours, plain, shapes, given, autocast, around):
    """Autocast that is off within an autocast that is on is off."""
    tensors = draw(shapes, **given)
    with (
        torch.autocast("cpu", dtype=B16, enabled=around or autocast),
        torch.autocast("cpu", B16, enabled=autocast),
    ):
        with pytest.raises(RuntimeError):
            plain(**tensors)
        with pytest.raises(
            TypeError, match=r"the input is torch.\w+, weight torch.\w+ and bias torch.\w+, expected"
        ):
            ours(**tensors)


@KERNELS
def test_the_backward_pass_may_be_within_autocast_too(ours, plain, shapes, way):
    if way == "short way" and ours is ours_lora:
        return _check_rounded_as_a_plain_layer_s(draw(shapes, F32, F32))
    for outer in (F32, B16):
        tensors = draw(shapes, outer, outer)
        y = ours(**tensors)
        grads = [torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y), retain_graph=True)]
        with torch.autocast("cpu", dtype=F16):
            grads.append(torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y)))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def _check_rounded_as_a_plain_layer_s(tensors):
    """Left to autograd, as on a GPU, LoRA's backward pass within autocast is what a plain layer's is there."""
    found = []
    for function in (ours_lora, plain_lora):
        y = function(**tensors)
        with torch.autocast("cpu", dtype=F16):
            found.append(torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y)))
    assert_like(*found, 0.002)


def test_autocast_of_another_device_is_none_here():
    tensors = draw(LORA, B16)
    with switched_on("cuda", F16):
        assert run(ours_lora, draw(LORA))[0].dtype == F32
        with pytest.raises(TypeError, match="expected what fits"):
            ours_lora(**tensors)


@contextmanager
def switched_on(kind, dtype):
    """torch.autocast(kind), also where there is no such device."""
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, True)
    torch.set_autocast_dtype(kind, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])


def test_on_cuda_it_is_cudas():
    """A tensor in name only: there is no GPU here."""

    def on_cuda(dtype):
        return SimpleNamespace(dtype=dtype, device=torch.device("cuda"))

    with torch.autocast("cpu", dtype=B16):
        assert compute_dtype(on_cuda(F32)) == F32
        with switched_on("cuda", F16):
            found = [compute_dtype(on_cuda(dtype)) for dtype in (F32, B16, F16, F64, torch.int64)]
            assert found == [F16, F16, F16, F64, torch.int64]
            assert shared_dtype("k", on_cuda(B16), on_cuda(F32), None) == F16
    assert compute_dtype(torch.empty(1, device="meta")) == F32


def test_two_layers_in_a_row(way):
    one, two = (
        draw(LORA),
        draw({**LORA, "weight": (16, 24), "bias": (16,), "lora_A": (3, 24), "lora_B": (16, 3)}),
    )

    def both(layer):
        with torch.autocast("cpu", dtype=B16):
            y = layer(layer(**one), *list(two.values())[1:])
            y.float().square().mean().backward()
        leaves = [t for t in (*one.values(), *list(two.values())[1:])]
        grads = [t.grad for t in leaves]
        for t in leaves:
            t.grad = None
        return [y.detach(), *grads]

    assert_like(both(ours_lora), both(plain_lora), 0.04)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_with_every_linear_layer_adapted(tiny, batch, redraw, dropout):
    """Training and evaluation within autocast, against the float32 model's loss."""
    model, inputs = tiny("llama"), batch("llama")
    names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    pefttutor.LoRA(r=4, lora_dropout=dropout, target_modules=names - {"lm_head"}).attach(model)
    redraw(model, std=0.05)
    exact = model.eval()(**inputs).loss
    with torch.autocast("cpu", dtype=B16):
        rounded = model(**inputs).loss
        model.train()(**inputs).loss.backward()
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", dtype=B16), torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(model.eval()(**inputs).loss, exact)


def test_a_sparse_step_computes_as_outside(way):
    found = []
    for autocast in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 50).view(5, 10))
        optimizer = SparseAdamW([(weight, torch.arange(0, 50, 3))], lr=0.1, weight_decay=0.1)
        for step in range(3):
            weight.grad = torch.linspace(step, 2, 50).view(5, 10).cos()
            with torch.autocast("cpu", dtype=B16, enabled=autocast):
                optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)
