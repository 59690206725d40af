"""MPO against its formula written out for three tensors, by torch.func; the decomposition against the weight."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from pefttutor import MPO, attached, load, merge, save, trainable
from pefttutor.lowrank.mpo import bonds, contracted, decomposed, split_evenly
from pefttutor.parts.linear import sizes, stored_as
from tests.formulas import mpo
from tests.lowrank.peers import drawn
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


# ---- the decomposition


@pytest.mark.parametrize("n", [3, 5])
def test_with_full_bonds_the_chain_is_the_weight(n):
    for rows, columns in ((24, 40), (768 // 8, 7), (13, 18)):
        W = torch.randn(rows, columns, dtype=F64)
        chain = decomposed(W, split_evenly(rows, n), split_evenly(columns, n))
        torch.testing.assert_close(contracted(chain), W, rtol=1e-12, atol=1e-12)


def test_an_entry_is_a_product_of_matrices():
    """One for each pair of indices, by their numbers in the mixed base."""
    rows, columns = (2, 4, 3), (2, 5, 4)
    chain = decomposed(torch.randn(24, 40, dtype=F64), rows, columns)
    W = contracted(chain)
    for row, column in ((0, 0), (17, 33), (23, 39)):
        product, o, i = torch.eye(1, dtype=F64), row, column
        for k in range(3):
            o_k, o = divmod(o, math.prod(rows[k + 1 :]))
            i_k, i = divmod(i, math.prod(columns[k + 1 :]))
            product = product @ chain[k][:, o_k, i_k]
        torch.testing.assert_close(product[0, 0], W[row, column])


@pytest.mark.parametrize("bond", [1, 3, 6])
def test_narrow_bonds_lose_no_more_than_the_singular_values_that_are_dropped(bond):
    """Of the weight's unfoldings between the first and the second, and the second and the third pair of indices."""
    rows, columns, W = (2, 4, 3), (2, 5, 4), torch.randn(24, 40, dtype=F64)
    lost = (W - contracted(decomposed(W, rows, columns, bond))).norm()
    grid = W.reshape(*rows, *columns).permute(0, 3, 1, 4, 2, 5).reshape(4, 20, 12)
    dropped = [
        torch.linalg.svdvals(m)[bond:].square().sum() for m in (grid.reshape(4, 240), grid.reshape(80, 12))
    ]
    assert max(dropped) <= lost.square() * (1 + 1e-9)
    assert lost.square() <= sum(dropped) * (1 + 1e-9)


def test_sizes_are_split_as_evenly_as_can_be():
    for size in (1, 7, 24, 97, 768, 3072, 4096):
        for n in (3, 5):
            split = split_evenly(size, n)
            assert math.prod(split) == size
            assert max(split) == split[n // 2]
    tries = [(a, b, 768 // (a * b)) for a in range(1, 769) for b in range(1, 769) if 768 % (a * b) == 0]
    assert sum(split_evenly(768, 3)) == min(map(sum, tries))
    assert bonds((8, 12, 8), (8, 12, 8), None) == [1, 64, 64, 1]


# ---- the method


@pytest.mark.parametrize("bond", [None, 2])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_the_formula(tiny, batch, kind, names, bond):
    """The base with weights that are put together entry by entry, differentiated by torch.func."""
    base, inputs = tiny(kind, dtype=F64), batch(kind, dtype=F64)
    method = MPO(bond_dim=bond, target_modules=names)
    model = method.attach(copy.deepcopy(base))
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    drawn(model)
    parts = [part for part in attached(model)["default"].parts if hasattr(part, "chains")]
    held = {f"{p.path}.{key}": getattr(p.layer, key).detach() for p in parts for key in p.added_keys}

    def loss(values):
        weights = {}
        for part in parts:
            layer = base.get_submodule(part.path)
            own = {
                k.rpartition(".")[2]: t
                for k, t in (held | values).items()
                if k.startswith(f"{part.path}.mpo")
            }
            delta = mpo(own, *sizes(layer), method, model)
            weights[f"{part.path}.weight"] = layer.weight.detach() + stored_as(layer, delta)
        return functional_call(base, weights, kwargs=inputs).loss

    values = {name: model.get_parameter(name).detach() for name in trainable(model)}
    expected = grad(loss)(values)
    said = model(**inputs)
    torch.testing.assert_close(said.loss.detach(), loss(values), rtol=1e-9, atol=1e-11)
    said.loss.backward()
    for name, own in expected.items():
        assert own.abs().max() > 1e-8
        torch.testing.assert_close(model.get_parameter(name).grad, own, rtol=1e-8, atol=1e-10)
    assert sum(trainable(model).values()) == method.count(base)
    logits = said.logits.detach()
    torch.testing.assert_close(merge(model)(**inputs).logits, logits, rtol=1e-8, atol=1e-10)


def test_the_change_may_have_any_rank_and_the_base_keeps_every_bit(tmp_path):
    base, x = nn.Sequential(nn.Linear(24, 24)), torch.randn(3, 24)
    model = drawn(MPO(bond_dim=2, target_modules=("0",)).attach(copy.deepcopy(base)))
    (part,) = attached(model)["default"].parts
    assert torch.linalg.matrix_rank(part.delta()) == 24
    assert torch.equal(model[0].weight, base[0].weight)
    save(model, tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_estimate_is_what_autograd_keeps(dtype):
    assert_estimate_is_measured("llama", MPO(bond_dim=3, target_modules=("q_proj", "down_proj")), dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(24, 24), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(
        ValueError, match=r"bond_dim is 10, but the chain of '0', .* with bonds of at most 9: give"
    ):
        MPO(bond_dim=10, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: MPO takes no embedding"):
        MPO(target_modules=("1",)).attach(model)
    for n in (1, 4):
        with pytest.raises(ValueError, match=f"n is {n}; it must be an odd number ≥ 3"):
            MPO(n=n)
    with pytest.raises(ValueError, match="bond_dim is 0; it must be a whole number ≥ 1"):
        MPO(bond_dim=0)
    assert differences(before, picture(model)) == []
