"""The re-associated attention over adapters: the formula as it stands, and every gradient; no keys, no values."""

import pytest
import torch

from pefttutor.kernels.fusion_attention import fusion_attention, fusion_attention_reference


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 6), (2, 5, 3, 6), (6, 6), (6,), (6, 6), (6, 6))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_it_is_the_formula_and_so_is_every_gradient():
    given = inputs()
    ours, formula = fusion_attention(*given), fusion_attention_reference(*given)
    torch.testing.assert_close(ours, formula)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    found, expected = (torch.autograd.grad((y * weights).sum(), given) for y in (ours, formula))
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().max() > 1e-3 for gradient in found)


def test_it_is_torchs_attention_of_one_query_over_the_adapters():
    h, z, query, bias, key, value = inputs()
    asked = torch.nn.functional.linear(h, query, bias).unsqueeze(-2)
    expected = torch.nn.functional.scaled_dot_product_attention(asked, z @ key.T, z @ value.T, scale=1.0)
    torch.testing.assert_close(fusion_attention(h, z, query, bias, key, value), expected.squeeze(-2))


def test_gradients_by_differences():
    assert torch.autograd.gradcheck(fusion_attention, inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_is_summed_to_one_in_float32(dtype):
    given = [t.detach() for t in inputs(dtype)]
    said, expected = fusion_attention(*given), fusion_attention_reference(*(t.float() for t in given))
    assert said.dtype == dtype
    torch.testing.assert_close(said.float(), expected, rtol=0.05, atol=0.05)


def test_it_keeps_less_than_the_formula_for_the_backward_pass():
    def kept(function):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            function(*inputs())
        return sum(sizes)

    assert kept(fusion_attention) < kept(fusion_attention_reference)
