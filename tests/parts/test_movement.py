"""How far what trains has come from its start, by a copy or by a checksum."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pefttutor as pt
from pefttutor.parts.fingerprint import checksum
from pefttutor.parts.movement import movements
from tests.cases import CANNOT, CASES, attached_to, moved


def found(model: nn.Module) -> list[bool | None]:
    """Of the method that is tested, whatever it stands on."""
    return [movement.moved for movement in movements(pt.attached(model)["default"])]


@pytest.mark.parametrize("name", [name for name in CASES if (name, "bert") not in CANNOT])
def test_every_method_knows_its_start_and_that_it_left_it(name: str) -> None:
    model = attached_to(name, "bert")
    assert set(found(model)) == {False}
    assert set(found(moved(pickle.loads(pickle.dumps(model))))) == {True}
    assert set(found(model)) == {False}


def test_values_are_counted_where_a_copy_is_kept() -> None:
    model = pt.BitFit().attach(nn.Linear(2, 5))
    model.bias.data[1:3] += 1
    assert [movement.values for movement in movements(pt.attached(model)["default"])] == [2]


def test_entries_that_are_chosen_again_start_where_they_are() -> None:
    model = attached_to("LTSFT", "net")
    moved(model)
    pt.attached(model)["default"].method.rewind(model)
    assert set(found(model)) == {False}
    assert set(found(moved(model))) == {True}


def test_another_dtype_hides_the_start_but_for_zeros() -> None:
    model = pt.LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(4, 4)))
    assert found(copy.deepcopy(model).bfloat16()) == [None, False]
    assert found(moved(model).bfloat16()) == [None, True]


def test_an_adapter_that_was_saved_untrained_is_seen_when_it_is_loaded(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    method = pt.LoRA(r=2, target_modules=("0",))
    fresh, trained = method.attach(copy.deepcopy(base)), moved(method.attach(copy.deepcopy(base)))
    assert found(pt.load(copy.deepcopy(base), pt.save(fresh, tmp_path / "fresh"))) == [False, False]
    assert found(pt.load(base, pt.save(trained, tmp_path / "trained"))) == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_a_checksum_sees_the_smallest_change(dtype: torch.dtype) -> None:
    values = torch.arange(6).reshape(2, 3).to(dtype)
    changed = values.clone()
    changed[1, 2] = torch.nextafter(values, values + 1)[1, 2] if dtype.is_floating_point else values[0, 0]
    assert checksum(values) == checksum(values.T.contiguous().T)
    assert checksum(values) != checksum(changed)
    assert checksum(torch.zeros((), dtype=dtype))[1] == 0
    assert checksum(values.to("meta")) is None
