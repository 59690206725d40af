"""One base told from another by a few values of every tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import LoRA, trainable
from pefttutor.parts.fingerprint import SAMPLES, check_base, describe_base
from tests.tiny import redraw_factors, tiny_model


@pytest.mark.parametrize("shape", [(), (1,), (3,), (8, 2), (0, 4), (5, 7, 3)])
def test_samples_run_from_the_first_to_the_last_value_of_any_layout(shape):
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    model = nn.ParameterDict({"a": values, "b": values.mT.contiguous().mT if values.dim() > 1 else values})
    found = describe_base(model, without=())
    assert found["a"] == found["b"]
    if values.numel():
        assert found["a"]["values"][0] == 0
        assert found["a"]["values"][-1] == values.numel() - 1


def test_a_base_without_weights_is_refused():
    with pytest.raises(ValueError, match="no weights yet"):
        describe_base(tiny_model("llama").to("meta"), without=())


def test_the_description_does_not_see_what_an_adapter_learns():
    description = describe_base(tiny_model("llama"), without=())
    model = redraw_factors(LoRA().attach(tiny_model("llama")))
    check_base(describe_base(model, without=trainable(model)), description)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)
        self.register_buffer("made_anew", torch.ones(2), persistent=False)


def test_every_parameter_and_saved_buffer_is_described_by_a_few_values():
    found = describe_base(Net(), without=("linear.bias", "norm.running_var"))
    assert list(found) == [
        "linear.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.num_batches_tracked",
    ]  # fmt: skip
    assert found["linear.weight"]["shape"] == [5, 3]
    assert found["linear.weight"]["dtype"] == "float32"
    assert all(len(one["values"]) == SAMPLES for name, one in found.items() if "tracked" not in name)
    assert [name for name, one in found.items() if "buffer" in one] == [
        "norm.running_mean",
        "norm.num_batches_tracked",
    ]


def changed(change) -> dict:
    model = Net()
    change(model)
    return describe_base(model, without=())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.linear.weight.data.mul_(1.001), "linear.weight has other values"),
        (lambda m: m.norm.running_mean.add_(1e-6), "norm.running_mean has other values"),
        (lambda m: m.norm.num_batches_tracked.add_(1), "norm.num_batches_tracked has other values"),
        (
            lambda m: setattr(m, "linear", nn.Linear(3, 4)),
            r"linear.weight has the shape \[4, 3\], not \[5, 3\]",
        ),
        (lambda m: setattr(m, "linear", nn.Linear(3, 5, bias=False)), "linear.bias is missing"),
        (lambda m: setattr(m, "more", nn.Linear(1, 1)), "more.weight is too much; more.bias is too much"),
        (lambda m: setattr(m, "more", nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))), "and 1 more"),
    ],
)
def test_another_base_is_refused_with_what_differs(change, says):
    with pytest.raises(ValueError, match=f"trained on another base model. In this one .*{says}"):
        check_base(changed(change), describe_base(Net(), without=()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_the_same_and_another_one_isnt(dtype):
    base = describe_base(Net(), without=())
    check_base(changed(lambda model: model.to(dtype)), base)
    check_base(base, changed(lambda model: model.to(dtype)))
    with pytest.raises(ValueError, match="has other values"):
        check_base(changed(lambda model: model.to(dtype).linear.weight.data.mul_(1.05)), base)


def test_a_description_of_before_knew_no_buffers():
    old = {name: one for name, one in describe_base(Net(), without=()).items() if "buffer" not in one}
    check_base(describe_base(Net(), without=()), old)
