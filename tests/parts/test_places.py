"""From a mask to flat places: in order, of the smallest type, and refused if they don't fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import SparseFineTuning
from pefttutor.parts.places import places
from tests.pictures import differences, picture

WEIGHTS = {"w": torch.zeros(3, 4), "b": torch.zeros(5), "scalar": torch.zeros(())}


@pytest.mark.parametrize(
    ("name", "mask", "expected"),
    [
        ("w", torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]).bool(), [1, 8, 11]),
        ("w", torch.tensor([11, 1, 8]), [1, 8, 11]),
        ("w", torch.tensor([8, 1], dtype=torch.int32), [1, 8]),
        ("b", torch.ones(5).bool(), [0, 1, 2, 3, 4]),
        ("b", torch.zeros(5).bool(), []),
        ("b", torch.tensor([], dtype=torch.int64), []),
        ("scalar", torch.tensor(True), [0]),
    ],
)
def test_places_are_flat_sorted_and_of_the_smaller_type(name, mask, expected):
    found = places(WEIGHTS, name, mask)
    assert found.tolist() == expected
    assert found.dtype == torch.int32


@pytest.mark.parametrize(
    ("name", "mask", "says"),
    [
        (
            "nowhere",
            torch.ones(2).bool(),
            r"a mask is for 'nowhere', which this model doesn't have; it has w, b, scalar",
        ),
        (
            "w",
            torch.ones(4, 3).bool(),
            r"the mask of 'w' is \(4, 3\), expected the weight's \(3, 4\): was it made for an",
        ),
        ("w", torch.ones(3, 4), r"the mask of 'w' is \(3, 4\) of torch.float32; expected booleans"),
        (
            "w",
            torch.ones(3, 4).int(),
            r"of torch.int32; expected booleans, true where an entry trains: mask.bool\(\)",
        ),
        ("b", torch.tensor([1, 5]), "the places given for 'b' aren't some of its 5 entries"),
        ("b", torch.tensor([-1, 2]), "aren't some of its 5 entries"),
        ("b", torch.tensor([2, 2]), "aren't some of its 5 entries"),
        ("b", torch.tensor([1, 2], dtype=torch.int16), "of torch.int16; expected booleans"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(name, mask, says):
    with pytest.raises(ValueError, match=says):
        places(WEIGHTS, name, mask)


def test_without_values_places_are_taken_as_they_are():
    empty = {"w": torch.zeros(3, 4, device="meta")}
    assert places(empty, "w", torch.empty(5, dtype=torch.int64, device="meta")).shape == (5,)


def test_a_weight_that_is_not_contiguous_is_refused_at_once():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data = model[0].weight.data.t()
    before = picture(model)
    with pytest.raises(ValueError, match=r"'0.weight' \(3, 3\) isn't contiguous.*\.contiguous\(\)"):
        SparseFineTuning().attach(model, {"0.weight": torch.ones(3, 3).bool()})
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize(
    ("name", "mask"), [("weight", torch.tensor([[0, 1], [1, 0], [0, 0]])), ("bias", torch.tensor([0, 1, 1]))]
)
def test_a_mask_of_whole_numbers_is_told_to_be_booleans(name, mask):
    model = nn.Sequential(nn.Linear(2, 3))
    before = picture(model)
    with pytest.raises(ValueError, match=r"mask\.bool\(\)"):
        SparseFineTuning().attach(model, {f"0.{name}": mask})
    assert differences(before, picture(model)) == []
