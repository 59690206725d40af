"""What a part knows of itself when it says nothing: the defaults, and where a tensor lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor.parts.part import Part, names_of, owners


class One(Part):
    """The smallest part: a parameter, and nothing else."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.ones(2))

    def trained(self):
        return [self.parameter]

    def saved(self):
        return [("one", self.parameter)]


def test_a_part_adds_what_it_saves_and_changes_nothing_in_place():
    part = One()
    assert [id(tensor) for tensor in part.added()] == [id(part.parameter)]
    assert part.named_in_place() == part.changed_in_place() == part.touched() == part.kept_aside() == []
    assert part.trace(nn.Linear(1, 1), None, None, "x") is None
    assert not part.covers(nn.Linear(1, 1))
    assert not part.additive
    part.after_step()
    part.loaded()


@pytest.mark.parametrize("act", [Part.check_foldable, Part.fold])
def test_a_part_can_not_be_folded_unless_it_says_so(act):
    with pytest.raises(ValueError, match="in a way that no weight can hold; leave it attached"):
        act(One())


def test_what_every_part_has_to_say_is_asked_for():
    for ask in (
        lambda: Part().trained(),
        lambda: Part().saved(),
        lambda: Part().switch(True),
        lambda: Part().remove(),
    ):
        with pytest.raises(NotImplementedError):
            ask()


def test_a_tied_weight_has_several_owners_and_one_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["c"].weight = model["a"].weight
    assert owners(model, model["a"].weight) == [(model["a"], "weight"), (model["c"], "weight")]
    assert owners(model, model["b"].bias) == [(model["b"], "bias")]
    assert owners(model, torch.ones(3)) == []
    assert names_of(model, [model["b"].bias, model["c"].weight]) == ["b.bias", "a.weight"]
