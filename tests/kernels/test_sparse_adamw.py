"""Chosen entries only: torch's own optimizers on them, bit for bit, and not a bit of the others."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pefttutor.kernels import flat_entries
from pefttutor.kernels.sparse_adamw import (
    SparseAdamW,
    SparseSGD,
    read,
    selected,
    sparse_adamw_reference,
    write,
)

SHAPES = ((5, 7), (3,), (2, 3, 4), (15, 17))
PAIRS = [
    (SparseAdamW, torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (SparseSGD, torch.optim.SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
]


@pytest.fixture(autouse=True, params=["threads", "short way"])
def everywhere(request):
    """Every test as on a CPU and as on a GPU."""
    if request.param == "short way":
        request.getfixturevalue("short_way")


def draw(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def choose(tensors, p, seed=1, dtype=torch.int32):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(t.shape, generator=generator) < p for t in tensors]
    return masks, [mask.flatten().nonzero().squeeze(1).to(dtype) for mask in masks]


def gradients(tensors, step):
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def side_by_side(*sides, steps):
    """Steps of every side's optimizer on the same gradients."""
    for step in range(steps):
        for tensors, optimizer in sides:
            gradients(tensors, step)
            optimizer.step()


@pytest.mark.parametrize(("ours", "torchs", "settings"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_with_everything_chosen_it_is_torchs_own_bit_for_bit(ours, torchs, settings, dtype):
    one, two = draw(dtype), draw(dtype)
    _, index = choose(one, 2.0)
    a = ours(zip(one, index, strict=True), lr=0.05, **settings)
    b = torchs(two, lr=0.05, fused=a.param_groups[0]["fused"], **settings)
    side_by_side((one, a), (two, b), steps=6)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize(("ours", "torchs", "settings"), PAIRS)
def test_chosen_entries_move_as_in_torch_and_no_other_moves_at_all(ours, torchs, settings):
    one, two = draw(), draw()
    start = copy.deepcopy(one)
    masks, index = choose(one, 0.4)
    a = ours(zip(one, index, strict=True), lr=0.05, **settings)
    b = torchs(two, lr=0.05, fused=a.param_groups[0]["fused"], **settings)
    side_by_side((one, a), (two, b), steps=8)
    rounding = 1e-6 if a.param_groups[0]["fused"] else 0  # it depends on an entry's place there
    for x, y, before, mask in zip(one, two, start, masks, strict=True):
        torch.testing.assert_close(x[mask], y[mask], rtol=rounding, atol=rounding)
        assert torch.equal(x[~mask], before[~mask])
        assert (x[mask] != before[mask]).all()
    assert any(mask.any() and not mask.all() for mask in masks)


def test_a_mask_before_a_dense_optimizer_is_not_the_same():
    """What every published implementation does: momentum and weight decay move what is 'frozen'."""
    weight = torch.ones(1000, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.1)
    weight.grad = torch.zeros(1000)
    optimizer.step()
    assert (weight != 1).all()


def test_the_reference_formula_gives_the_same():
    tensors, masks_index = draw(torch.float64), None
    masks, masks_index = choose(tensors, 0.5)
    by_formula = [t.detach().clone() for t in tensors]
    moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in by_formula]
    optimizer = SparseAdamW(zip(tensors, masks_index, strict=True), lr=0.02, weight_decay=0.3)
    for step in range(1, 6):
        gradients(tensors, step)
        by_formula = [
            sparse_adamw_reference(w, t.grad, mask, *m, step, lr=0.02, weight_decay=0.3)
            for w, t, mask, m in zip(by_formula, tensors, masks, moments, strict=True)
        ]
        optimizer.step()
    for ours, formula in zip(tensors, by_formula, strict=True):
        torch.testing.assert_close(ours.detach(), formula, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("ours", "torchs", "settings"), PAIRS)
def test_state_saved_and_restored_goes_on_bit_for_bit(ours, torchs, settings):
    def run(tensors, optimizer, steps):
        for step in steps:
            gradients(tensors, step)
            optimizer.step()

    whole = draw()
    _, index = choose(whole, 0.4)
    run(whole, ours(zip(whole, index, strict=True), lr=0.05, **settings), range(7))

    first = draw()
    optimizer = ours(zip(first, index, strict=True), lr=0.05, **settings)
    run(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    optimizer = ours(zip(second, index, strict=True), lr=0.9, **settings)
    optimizer.load_state_dict(torch.load(file))
    run(second, optimizer, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_the_state_is_as_small_as_the_choice():
    weight = torch.randn(100, 200, requires_grad=True)
    index = torch.arange(0, 20_000, 10, dtype=torch.int32)
    states = []
    for optimizer in (SparseAdamW([(weight, index)]), torch.optim.AdamW([weight])):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        tensors = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        states.append(sum(t.numel() * t.element_size() for t in tensors))
    assert states == [0.1 * 8 * 20_000, 8 * 20_000]


def test_the_gradient_is_that_of_autograd_at_the_chosen_places():
    weight, x = draw(torch.float64)[0], torch.randn(4, 7, dtype=torch.float64)
    (x @ weight.t()).pow(3).sum().backward()
    index = torch.tensor([3, 4, 20, 34], dtype=torch.int32)
    values = read(weight, index).requires_grad_()
    frozen = weight.detach()
    through = selected(values, frozen, index)
    assert through.data_ptr() == frozen.data_ptr()
    (x @ through.t()).pow(3).sum().backward()
    torch.testing.assert_close(values.grad, weight.grad.flatten()[index.long()], rtol=0, atol=0)
    assert frozen.grad is None


def test_the_gradient_is_the_numerical_one():
    frozen, x = draw(torch.float64)[0].detach(), torch.randn(4, 7, dtype=torch.float64)
    index = torch.tensor([0, 9, 33])

    def f(values):
        changed = frozen.clone()
        write(changed, index, values)
        return (x @ selected(values, changed, index).t()).tanh()

    assert torch.autograd.gradcheck(f, read(frozen, index).requires_grad_())


def test_a_tensor_without_a_gradient_stays():
    weight = torch.ones(4, requires_grad=True)
    optimizer = SparseAdamW([(weight, torch.arange(4))], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert weight.eq(1).all()
    weight.grad = torch.ones(4)
    optimizer.zero_grad()
    assert weight.grad is None


def change(weight):
    with torch.no_grad():
        weight.fill_(5)


def swap(weight):
    weight.data = torch.full((3,), 5.0)


def load(weight):
    layer = nn.ParameterDict({"weight": weight})
    layer.load_state_dict({"weight": torch.full((3,), 5.0)})


def step_elsewhere(weight):
    """Another optimizer, of the whole tensor."""
    weight.grad = weight.detach() - 5
    torch.optim.SGD([weight], lr=1.0).step()


@pytest.mark.parametrize("others", [change, swap, load, step_elsewhere])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_others_have_changed_is_followed(others, steps):
    weight = nn.Parameter(torch.ones(3))
    optimizer = SparseSGD([(weight, torch.tensor([1]))], lr=0.1)
    for _ in range(steps):
        weight.grad = torch.ones(3)
        optimizer.step()
    others(weight)
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([5.0, 4.9, 5.0]))


def test_what_nobody_has_changed_is_not_gathered_again():
    """So what is written past autograd, which tells of changes, is overwritten at the chosen entries."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = SparseSGD([(weight, torch.tensor([1]))], lr=0.1)
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
        weight.data.fill_(5)
    torch.testing.assert_close(weight.detach()[1], torch.tensor(5.0))
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([5.0, 0.7, 5.0]))


def test_a_tensor_of_inference_mode_counts_no_changes():
    with torch.inference_mode():
        weight = torch.ones(3)
        optimizer = SparseSGD([(weight, torch.tensor([1]))], lr=0.1)
        for start in (1, 5):
            weight.fill_(start)
            weight.grad = torch.ones(3)
            optimizer.step()
            torch.testing.assert_close(weight, torch.tensor([start, start - 0.1, start]))


def test_a_closure_is_called_once_with_gradients_on():
    weight = torch.ones(3, requires_grad=True)
    optimizer = SparseSGD([(weight, torch.tensor([1]))], lr=0.1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 0.8, 1.0]))


@pytest.mark.parametrize("short", [True, False])
def test_writing_works_where_torch_scatters_by_int64_only(monkeypatch, short):
    able = flat_entries._scatters_by_int32("cpu")
    monkeypatch.setattr(flat_entries, "_scatters_by_int32", lambda kind: able and short)
    tensor, index = torch.zeros(2, 3), torch.tensor([5, 1], dtype=torch.int32)
    write(tensor, index, torch.tensor([7.0, 8.0]))
    assert tensor.tolist() == [[0, 8, 0], [0, 0, 7]]


def test_writing_leaves_gradients_of_an_earlier_forward_alone():
    weight = torch.randn(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    y = x @ weight.t()
    write(weight, torch.tensor([0]), weight.flatten()[:1].clone())
    y.sum().backward()  # raises if autograd saw a change


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (torch.tensor([0, 6]), r"from 0 to 6, expected places 0 … 5 of a tensor \(2, 3\)"),
        (torch.tensor([-1, 2]), "from -1 to 2"),
        (torch.tensor([1, 1]), "each once"),
        (torch.tensor([True, False]), "mask.flatten"),
        (torch.zeros(1, 1, dtype=torch.int64), r"\(1, 1\)"),
    ],
)
def test_errors_say_what_was_given(index, says):
    with pytest.raises(ValueError, match=says):
        SparseAdamW([(torch.zeros(2, 3, requires_grad=True), index)])


def test_a_tensor_given_twice_or_not_contiguous_is_refused():
    weight = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="twice"):
        SparseSGD([(weight, torch.tensor([0])), (weight, torch.tensor([1]))])
    with pytest.raises(ValueError, match="contiguous"):
        SparseAdamW([(weight.t(), torch.tensor([0]))])
    with pytest.raises(ValueError, match="contiguous"):
        write(weight.t(), torch.tensor([0]), torch.ones(1))
