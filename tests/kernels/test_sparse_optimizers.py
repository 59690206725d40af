"""What training code does with an optimizer beside stepping: save, load, copy, hook, convert, add parameters."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from pefttutor.kernels.sparse_adamw import SparseAdamW, SparseSGD

BOTH = pytest.mark.parametrize("kind", [SparseAdamW, SparseSGD])


def step(weight, optimizer, times=1):
    for i in range(times):
        weight.grad = torch.full_like(weight, i + 1.0)
        optimizer.step()


def make(kind, places, dtype=torch.int64):
    weight = torch.ones(6, requires_grad=True)
    settings = {"momentum": 0.9} if kind is SparseSGD else {}
    return weight, kind([(weight, torch.tensor(places, dtype=dtype))], lr=0.1, **settings)


@BOTH
@pytest.mark.parametrize(
    ("other", "says"), [([2, 3], r"\[2\].*\[2\]"), ([0, 1, 4], r"\[2\].*\[3\]"), ([], "")]
)
def test_a_state_of_other_entries_is_refused_and_nothing_changes(kind, other, says):
    weight, saved = make(kind, [0, 1])
    step(weight, saved, 2)
    weight, optimizer = make(kind, other)
    step(weight, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="belongs to other entries.*" + says):
        optimizer.load_state_dict(saved.state_dict())
    after = optimizer.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@BOTH
def test_a_state_of_more_tensors_or_of_a_dense_optimizer_is_refused(kind):
    weight, optimizer = make(kind, [0, 1])
    more = kind([(torch.ones(6), torch.tensor([0, 1])), (torch.ones(6), torch.tensor([0, 1]))])
    for state in (more.state_dict(), torch.optim.AdamW([weight]).state_dict()):
        with pytest.raises(ValueError, match="belongs to other entries"):
            optimizer.load_state_dict(state)


@BOTH
def test_a_saved_state_goes_on_whatever_integers_its_places_are(kind):
    weight, optimizer = make(kind, [4, 1])
    step(weight, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, again = make(kind, [1, 4], dtype=torch.int32)
    other.data.copy_(weight.data)
    again.load_state_dict(torch.load(file))
    step(weight, optimizer, 2)
    step(other, again, 2)
    assert torch.equal(weight, other)


@BOTH
def test_a_deep_copy_trains_the_copied_tensor_alone(kind):
    weight, optimizer = make(kind, [0, 3])
    step(weight, optimizer, 2)
    weight.grad = None
    twin, copied = copy.deepcopy((weight, optimizer))
    step(twin, copied, 3)
    assert not torch.equal(weight, twin)
    step(weight, optimizer, 3)
    assert torch.equal(weight, twin)
    copied.zero_grad()
    assert twin.grad is None


@BOTH
def test_step_hooks_run_once_around_the_whole_step(kind):
    torch.optim.AdamW([torch.ones(1)]), torch.optim.SGD([torch.ones(1)])  # from now on torch wraps their step
    weight, optimizer = make(kind, [0])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", weight[0].item())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", weight[0].item())))
    step(weight, optimizer)
    assert [name for name, _ in seen] == ["before", "after"]
    assert seen[0][1] == 1 > seen[1][1] == weight[0].item()


def test_a_scheduler_sets_the_learning_rate_of_the_next_step():
    weight, optimizer = make(SparseSGD, [0])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i)
    step(weight, optimizer)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@BOTH
def test_more_parameters_are_refused(kind):
    weight, optimizer = make(kind, [0])
    with pytest.raises(NotImplementedError, match="make another optimizer"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    step(weight, optimizer)


@BOTH
@pytest.mark.parametrize(
    ("given", "type_name"),
    [
        ([{"params": [torch.ones(2)], "lr": 0.1}], "dict"),
        ([torch.ones(2, 3)], "Tensor"),
        ([(torch.ones(2), [0, 1])], "tuple"),
    ],
)
def test_anything_but_pairs_is_refused(kind, given, type_name):
    with pytest.raises(ValueError, match=rf"a {type_name} is given, expected pairs \(tensor, index"):
        kind(given)


@BOTH
def test_a_model_converted_after_the_optimizer_was_made_is_refused(kind):
    layer = torch.nn.Linear(3, 3)
    optimizer = kind([(layer.weight, torch.tensor([0, 4]))])
    layer.bfloat16()
    layer.weight.grad = torch.ones(3, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"is torch.bfloat16 on cpu and was torch.float32.*after converting"):
        optimizer.step()


def test_clipping_is_of_the_tensors_themselves():
    weight, optimizer = make(SparseSGD, [0, 1])
    weight.grad = torch.full((6,), 100.0)
    torch.nn.utils.clip_grad_norm_([weight], 6**0.5)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, 0.9, 1, 1, 1, 1]))


def test_nan_becomes_nan_where_it_is():
    weight, optimizer = make(SparseAdamW, [0, 1])
    weight.grad = torch.tensor([float("nan"), 1, float("nan"), 1, 1, 1])
    optimizer.step()
    assert weight.isnan().tolist() == [True] + 5 * [False]
