"""Rows among rows: against a loop over the texts."""

from __future__ import annotations

import torch

from pefttutor.parts.weaving import cut_to, woven


def test_rows_come_after_so_many_of_each_text_and_out_again():
    generator = torch.Generator().manual_seed(0)
    own, virtual = (torch.randn(3, n, 2, generator=generator, requires_grad=True) for n in (5, 4))
    after = [0, 2, 5]
    found = woven(own, virtual, torch.tensor(after))
    expected = torch.stack(
        [torch.cat([x[:k], v, x[k:]]) for x, v, k in zip(own, virtual, after, strict=True)]
    )
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape, generator=generator)
    grads = [torch.autograd.grad((y * weights).sum(), (own, virtual)) for y in (found, expected)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    places = torch.tensor([[*range(k), *range(k + 4, 9)] for k in after])
    assert torch.equal(cut_to(found, places, 4), own)


def test_only_what_has_a_row_for_each_token_is_cut():
    places, states = torch.tensor([[0, 3], [0, 3]]), torch.arange(16.0).view(2, 4, 2)
    output = {
        "states": states,
        "all": (states, states),
        "router": states.flatten(0, 1),
        "pooled": states[:, 0],
        "n": 3,
    }
    found = cut_to(dict(output), places, 2)
    assert torch.equal(found["states"], states[:, [0, 3]])
    assert all(torch.equal(each, states[:, [0, 3]]) for each in found["all"])
    assert torch.equal(found["router"], states[:, [0, 3]].flatten(0, 1))
    assert torch.equal(found["pooled"], output["pooled"])
    assert found["n"] == 3
