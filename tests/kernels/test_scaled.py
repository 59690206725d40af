"""Features scaled by learned numbers: the formula in outputs, first and second derivatives, dtypes and bytes."""

from __future__ import annotations

import pytest
import torch

from pefttutor.kernels.scaled import scaled, scaled_reference
from pefttutor.memory.allocator import transient_bytes


def draw(*lead, dtype=torch.float64, wide=None, trained=(True, True)):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(*lead, 5, generator=generator).to(dtype)
    c = torch.randn(5, generator=generator).to(wide or dtype)
    return [t.requires_grad_(needed) for t, needed in zip((u, c), trained, strict=True)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "dtypes", [(torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.float32)]
)
def test_it_is_the_formula_in_outputs_and_gradients(lead, trained, dtypes):
    found = []
    for function in (scaled, scaled_reference):
        tensors = draw(*lead, dtype=dtypes[0], wide=dtypes[1], trained=trained)
        y = function(*tensors)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        before = upstream.clone()
        y.backward(upstream)
        assert torch.equal(upstream, before)
        found.append([y.detach(), *(t.grad for t in tensors if t.grad is not None)])
    torch.testing.assert_close(found[0], found[1])
    assert len(found[0]) == 1 + sum(trained)


@pytest.mark.usefixtures("way")
def test_first_and_second_derivatives_are_the_numerical_ones():
    assert torch.autograd.gradcheck(scaled, draw(2, 3))
    assert torch.autograd.gradgradcheck(scaled, draw(2, 3))


def test_the_backward_pass_takes_no_more_room_than_the_gradient():
    u, c = torch.randn(4096, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    grad = torch.ones_like(u)

    def bytes_of(function):
        def step():
            y = function(u, c)
            end = torch.autograd.graph.get_gradient_edge(y)
            del y
            return torch.autograd.grad([end], [u, c], [grad])

        return transient_bytes(step)

    assert u.nbytes < bytes_of(scaled) < 1.1 * u.nbytes
    assert bytes_of(scaled_reference) > 1.9 * u.nbytes
