"""Estimates against what really happens on this machine: the saved-tensor hooks, and what model and optimizer hold."""

import pytest
import torch

import pefttutor
from pefttutor import memory
from pefttutor.memory.measured import watch_saved
from pefttutor.train.losses import causal_lm_loss
from tests.memory.models import KINDS, batch_of, estimated_and_measured, held, method_of, model_of
from tests.tiny import checkpointed

GRID = [
    (kind, how, attention, checkpointing)
    for kind in KINDS
    for how in ("full", "query and value", "every")
    for attention in ("eager", "sdpa")
    for checkpointing in (False, True)
    if (kind, attention) != ("bloom", "sdpa")
]


@pytest.mark.parametrize(("kind", "how", "attention", "checkpointing"), GRID)
def test_activations_within_two_percent(kind, how, attention, checkpointing):
    case = {"checkpointing": checkpointing, "attention": attention}
    for size in ({"batch_size": 2, "length": 24}, {"batch_size": 3, "length": 40}):
        estimated, saved, _ = estimated_and_measured(kind, how, **case, **size)
        assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.02)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3"])
@pytest.mark.parametrize("how", ["full", "every, dropout"])
def test_dropout_and_sixteen_bits(kind, how):
    estimated, saved, _ = estimated_and_measured(kind, how, dropout=0.1)
    assert estimated.activations["dropout"] > 0
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.02)
    estimated, saved, _ = estimated_and_measured(kind, how, dtype=torch.bfloat16)
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.02)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "checkpointing", "padding", "dropout"),
    [
        ("gpt2", True, False, 0.1),
        ("gpt2", True, True, 0.0),
        ("bert", True, True, 0.0),
        ("vit", True, True, 0.1),  # whose pictures are of one size
        ("t5", True, True, 0.0),
        ("t5", False, True, 0.0),
        ("t5", True, False, 0.0),
    ],
)
def test_what_checkpointed_layers_are_given(kind, checkpointing, padding, dropout, attention):
    """Masks that a model hands to its layers, and the mask of the dropout before the first one; on longer texts."""
    model, method, batch = (
        model_of(kind, attention, dropout),
        method_of(kind, "query and value"),
        batch_of(kind, 4, 60),
    )
    options = {"batch_size": 4, "sequence_length": 60, "attention": attention, "device": "cpu"}
    if kind == "t5":
        options["target_length"] = 40
        batch["labels"] = batch["input_ids"][:, :40].contiguous()
    estimated = memory.estimate(
        model, method, gradient_checkpointing=checkpointing, padding=padding, **options
    )
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    if padding and kind != "vit":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -10:] = 0
    assert sum(estimated.activations.values()) == pytest.approx(held(model, batch), rel=0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["full", "every"])
def test_weights_gradients_and_optimizer_to_the_byte(kind, how):
    estimated, _, model = estimated_and_measured(kind, how)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.dim()]
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert estimated.adapter_weights == adapters
    assert estimated.weights == sum(p.nbytes for p in model.parameters()) - adapters
    assert estimated.trained == sum(pefttutor.trainable(model).values())
    assert estimated.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert estimated.optimizer == sum(t.nbytes for t in state)


@pytest.mark.parametrize("how", ["full", "every", "something before the head"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_lean_loss(kind, how, monkeypatch):
    """`causal_lm_loss` brings hooks of its own, which ours must go through to be seen."""
    from pefttutor.kernels import recompute

    model = model_of(kind)
    if how == "something before the head":
        method = pefttutor.InvertibleAdapter(bottleneck=120)
    else:
        method = None if how == "full" else method_of(kind, how)
    estimated = memory.estimate(
        model, method, batch_size=2, sequence_length=24, attention="eager", loss=causal_lm_loss, device="cpu"
    )
    if method:
        method.attach(model)
    with watch_saved(model.train()) as saved:
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def both():
            kept = torch.autograd.graph.saved_tensors_hooks
            return kept(
                lambda t: p if not isinstance(p := recompute._pack(t), torch.Tensor) else outer[0](p),
                lambda p: (
                    outer[1](p)
                    if hasattr(p, "tensor") or isinstance(p, torch.Tensor)
                    else recompute._unpack(p)
                ),
            )

        monkeypatch.setattr("pefttutor.train.losses.recompute_activations", both)
        causal_lm_loss(model, batch_of(kind, 2, 24)).backward()
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.02)
