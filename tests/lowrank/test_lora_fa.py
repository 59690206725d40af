"""LoRA-FA against HF PEFT's LoRA with a frozen A, and what it doesn't keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import LoRA, LoRAFA, memory, merge, trainable
from pefttutor.memory.measured import watch_saved
from pefttutor.widgets.spectrum import updates
from tests.lowrank.peers import assert_same_as_peft, drawn, lora_config
from tests.memory.models import batch_of, model_of

F64 = torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft_with_a_frozen(tiny, batch, kind, names, dropout):
    ours = LoRAFA(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout, use_rslora=True)
    base = tiny(kind, dtype=F64)
    drawn_A = {n: b for n, b in ours.attach(tiny(kind, dtype=F64)).named_buffers() if n.endswith("lora_A")}

    def freeze_A(theirs):
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
                key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                parameter.data.copy_(drawn_A[key])

    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(base, ours, lora_config(ours), inputs, train=dropout > 0, prepare=freeze_A)


def test_a_is_a_buffer_that_is_drawn_as_loras_and_never_moves():
    method = LoRAFA(r=2, target_modules=("0",))
    model = method.attach(nn.Sequential(nn.Linear(6, 5)))
    twin = LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 5)))
    A = model[0].lora_A.clone()
    assert torch.equal(A, twin[0].lora_A)
    assert trainable(model) == {"0.lora_B": 10}
    assert "0.lora_A" in model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].lora_A, A)
    span = torch.linalg.qr(A.T)[0]
    delta = updates(model)["0"].matrix().float()
    torch.testing.assert_close(delta @ span @ span.T, delta)  # only the directions that A has drawn


def test_an_embedding_can_learn_too():
    model = LoRAFA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Embedding(7, 5)))
    model(torch.tensor([1, 3])).square().sum().backward()
    assert model[0].lora_B.grad.abs().min() > 0
    drawn(model).eval()
    said = model(torch.tensor([1, 3])).detach()
    torch.testing.assert_close(merge(model)(torch.tensor([1, 3])), said)


@pytest.mark.parametrize("names", [("q_proj", "down_proj"), ("embed_tokens",)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps_and_the_input_is_not_among_it(names, dropout):
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}
    found = {}
    for kind in (LoRA, LoRAFA):
        model, method = model_of("llama"), kind(r=4, target_modules=names, lora_dropout=dropout)
        estimated = memory.estimate(model, method, **options)
        method.attach(model)
        with watch_saved(model.train()) as saved:
            model(**batch_of("llama", 2, 24)).loss.backward()
        assert estimated.trained == sum(trainable(model).values()) == method.count(model)
        assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.01)
        found[kind] = saved.peak_bytes
    if "q_proj" in names and not dropout:
        assert found[LoRAFA] < found[LoRA]
