"""Reentrant checkpointing behind frozen embeddings: gradients come through, and only while it is on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pefttutor.parts.checkpointing import close_to_checkpointing, open_to_checkpointing
from pefttutor.parts.freezing import freeze
from tests.pictures import differences, picture


class Reader(nn.Module):
    """Frozen embeddings, which may put out a tuple as Swin's do, and a checkpointed block that trains."""

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self.embed, self.block, self.several = nn.Embedding(5, 3), nn.Linear(3, 3), several
        self.gradient_checkpointing = False
        freeze(self)
        self.block.requires_grad_(True)
        if several:
            self.embed.register_forward_hook(lambda module, args, output: (output, None, 7))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x[0] if self.several else x
        return checkpoint(self.block, x, use_reentrant=True) if self.gradient_checkpointing else self.block(x)


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize("several", [False, True], ids=["one tensor", "a tuple"])
def test_a_checkpointed_block_behind_frozen_embeddings_gets_its_gradient(several):
    model = Reader(several)
    model(IDS).square().sum().backward()
    expected = model.block.weight.grad
    model.zero_grad()
    model.gradient_checkpointing = True
    open_to_checkpointing(model)
    model(IDS).square().sum().backward()
    torch.testing.assert_close(model.block.weight.grad, expected)
    assert model.embed.weight.grad is None


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning:torch")
def test_without_it_there_would_be_none():
    model = Reader()
    model.gradient_checkpointing = True
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(IDS).sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning:torch")
def test_at_other_times_nothing_below_the_block_needs_a_gradient():
    model, seen = Reader(), []
    open_to_checkpointing(model)
    model.block.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    model(IDS)
    model.gradient_checkpointing = True
    with torch.no_grad():
        model(IDS)
    assert seen == [False, False]


def test_it_is_opened_once_and_closed_without_a_trace():
    model = Reader()
    before = picture(model)
    for _ in range(3):
        open_to_checkpointing(model)
    assert len(model.embed._forward_hooks) == 1
    close_to_checkpointing(model)
    assert differences(before, picture(model)) == []
    close_to_checkpointing(model)


def test_the_hook_of_a_copy_looks_at_the_copy():
    model = Reader()
    open_to_checkpointing(model)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing = True
    twin(IDS).sum().backward()
    assert twin.block.weight.grad is not None
    assert not model.embed(IDS).requires_grad
    close_to_checkpointing(twin)
    assert (len(model.embed._forward_hooks), len(twin.embed._forward_hooks)) == (1, 0)


def test_embeddings_of_parts_are_found_and_a_model_without_any_is_left_alone():
    outer = nn.Sequential(Reader())
    open_to_checkpointing(outer)
    assert len(outer[0].embed._forward_hooks) == 1
    net = nn.Sequential(nn.Linear(2, 2))
    before = picture(net)
    open_to_checkpointing(net)
    assert differences(before, picture(net)) == []
