"""Activations made again: the same gradients, bit for bit, and fewer bytes kept."""

import pytest
import torch
from torch.nn import functional as F

from pefttutor.kernels import recompute
from pefttutor.kernels.recompute import recompute_activations


def leaves(*names):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(8, 4, generator=generator).requires_grad_() for name in names}


def gated(g, u):
    return (F.silu(g * 1.5) * (u + 1)).exp()


def gelu(g, u):
    return F.gelu(g + 1, approximate="tanh") * (u + 1) + F.gelu(u) * g


def normalised(g, u):
    """w · (h · ρ) with frozen w, kept by the product with a trained tensor, as LoRA keeps its input."""
    weight = torch.linspace(0.5, 2, 4)
    h = g + 1
    return (weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True)))) * u


def scaled(g, u):
    """A number as a factor, on either side, and an operand that can't be made again (tanh)."""
    return (2.0 * F.silu(g + 1)) * u + (torch.tanh(g) * 3.0) * u


@pytest.mark.parametrize("formula", [gated, gelu, normalised, scaled])
def test_gradients_are_the_same_bit_for_bit(formula):
    results = []
    for lean in (False, True):
        tensors = leaves("g", "u")
        if lean:
            with recompute_activations():
                y = formula(**tensors)
        else:
            y = formula(**tensors)
        first = torch.autograd.grad(y.sum(), list(tensors.values()), retain_graph=True)
        second = torch.autograd.grad(y.sum(), list(tensors.values()))  # the recipe works more than once
        results.append((y.detach(), *first, *second))
    for plain, lean in zip(*results, strict=True):
        torch.testing.assert_close(lean, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("formula", "dropped"), [(gated, 1), (gelu, 2), (normalised, 1), (scaled, 1)])
def test_keeps_less(formula, dropped):
    """In tensors of 8 × 4 float32."""
    tensors = leaves("g", "u")

    def kept(pack):
        """Bytes of the tensors that `pack` keeps as they are."""
        storages = {}

        def note(tensor):
            packed = pack(tensor)
            if isinstance(packed, torch.Tensor):
                storages[packed.untyped_storage().data_ptr()] = packed.untyped_storage().nbytes()
            return packed

        with torch.autograd.graph.saved_tensors_hooks(note, recompute._unpack):
            y = formula(**tensors)
        del y
        return sum(storages.values())

    assert kept(lambda tensor: tensor) - kept(recompute._pack) == dropped * 8 * 4 * 4
