"""Layers whose weight is read without calling them: found in a trial, and refused by every method that needs a call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import LTSFT, DiffPruning, LoRA, Masking, SparseFineTuning, adapted, trainable
from pefttutor.parts.called import check_called, read_past
from tests.pictures import differences, picture
from tests.tiny import tiny_model


class Tables(nn.Module):
    """Reads a table past its layer, as DeBERTa does."""

    def __init__(self):
        super().__init__()
        self.rel_embeddings, self.linear = nn.Embedding(3, 3), nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "name", "own"),
    [
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "self_attn.out_proj", "out_proj"),
        (Tables, "rel_embeddings", "rel_embeddings"),
    ],
)
def test_a_weight_that_is_read_without_its_layer_is_refused(make, name, own):
    for attach in (
        lambda model: SparseFineTuning().attach(
            model, {f"{name}.weight": torch.ones_like(model.get_parameter(f"{name}.weight")).bool()}
        ),
        lambda model: DiffPruning().attach(model),
        lambda model: LTSFT().attach(model),
        lambda model: Masking(target_modules=(own,)).attach(model),
    ):
        model = make()
        before = picture(model)
        with pytest.raises(ValueError, match=rf"without calling its layer.*modules_to_save=\('{own}',\)"):
            attach(model)
        assert differences(before, picture(model)) == []
    chosen = {n: torch.ones_like(p).bool() for n, p in make().named_parameters()}
    method = SparseFineTuning(modules_to_save=(own,))
    assert adapted(method.attach(make(), chosen)) is method


class Reader(nn.Module):
    """A model of tokens that calls one layer, reads another's weight past it, and has one that it doesn't use."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.called, self.past, self.unused = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.called(self.tokens(input_ids)) @ self.past.weight.T,)


def test_only_a_weight_that_leads_to_the_output_without_a_call_is_read_past():
    model = Reader()
    layers = {"called": model.called, "past": model.past, "unused": model.unused, "tokens": model.tokens}
    found = read_past(model, [layer.weight for layer in layers.values()])
    assert found == {id(model.past.weight)}
    assert read_past(model, [model.called.weight]) == set()
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_weight_that_is_tied_to_a_called_layer_is_seen():
    model = Reader()
    model.past.weight = model.called.weight
    assert read_past(model, [model.called.weight]) == set()
    check_called(model, ["called.weight"])


@pytest.mark.parametrize("method", [LoRA, Masking])
def test_a_method_on_such_a_layer_says_so_and_on_the_others_works(method):
    model = Reader()
    before = picture(model)
    with pytest.raises(ValueError, match=r"'past.*without calling it.*modules_to_save"):
        method(target_modules=("past",)).attach(model)
    assert differences(before, picture(model)) == []
    assert set(trainable(LoRA(r=2, target_modules="all-linear").attach(model))) == {
        f"{name}.lora_{x}" for name in ("called", "unused") for x in "AB"
    }


def test_where_nothing_can_be_tried_nothing_is_said():
    net = tiny_model("net")  # it reads no tokens
    assert read_past(net, [net.enter.weight]) == set()
    with torch.device("meta"):
        model = Reader()
    assert read_past(model, [model.past.weight]) == set()
    model = Reader()
    model.forward = lambda **inputs: 1 / 0
    assert read_past(model, [model.past.weight]) == set()
    assert not model.past._forward_pre_hooks


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_the_usual_models_call_all_their_layers(kind, tiny):
    model = tiny(kind)
    check_called(model, [name for name, p in model.named_parameters() if p.dim() < 3])
