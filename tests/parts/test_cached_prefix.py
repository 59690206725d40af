"""A frozen prefix of blocks: what freezes with it, and when its outputs may be kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import AutoFreeze, LastLayers, trainable
from pefttutor.parts.blocks import below, blocks
from pefttutor.parts.cached_prefix import CachedPrefix
from tests.tiny import bert, llama, llama_classifier

BELOW = {
    "bert": [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.LayerNorm.weight",
        "bert.embeddings.LayerNorm.bias",
    ],
    "vit": [
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.embeddings.patch_embeddings.projection.bias",
    ],
    "gpt2": ["transformer.wte.weight", "transformer.wpe.weight"],
    "llama": ["model.embed_tokens.weight"],
    "t5": ["shared.", "encoder."],
}


def freeze_one_block(model):
    """AutoFreeze as if it had decided to freeze one block."""
    method = AutoFreeze(interval=100)
    method.attach(model)
    model.get_buffer("autofreeze_frozen").fill_(1)
    method.after_backward(model, 0)
    return model


@pytest.mark.parametrize("kind", list(BELOW))
def test_everything_below_a_frozen_block_is_frozen_and_nothing_above(kind, tiny, batch):
    model = freeze_one_block(tiny(kind))
    first = f"{blocks(model)[0]}.0."
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith((*BELOW[kind], first))}
    inputs = batch(kind)
    prefix = CachedPrefix(model)
    assert prefix.depth == 1
    kept = prefix.compute(inputs)
    expected = model(**inputs).loss
    with prefix.skipped(kept):
        assert torch.equal(model(**inputs).loss, expected)


def test_a_tied_head_is_frozen_with_the_embeddings():
    assert "model.embed_tokens.weight" not in trainable(freeze_one_block(llama()))
    assert "bert.embeddings.word_embeddings.weight" not in trainable(freeze_one_block(bert()))


def test_a_final_norm_registered_before_the_blocks_trains_on():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.embed, self.final_layer_norm, self.project_out = (nn.Linear(3, 3) for _ in range(3))
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    model = nn.ModuleDict({"body": Body(), "head": nn.Linear(3, 3)})
    body = model["body"]
    assert below(model) == {body.token, *body.embed.parameters()}


def test_an_overflowing_gradient_leaves_no_nan_in_the_norms():
    model = llama_classifier(num_hidden_layers=3)
    method = AutoFreeze(interval=2)
    method.attach(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    method.after_backward(model, 0)
    before = model.get_buffer("autofreeze_norms").clone()
    assert before[1].min() > 0
    model.model.layers[1].mlp.up_proj.weight.grad[0, 0] = float("nan")
    method.after_backward(model, 1)
    assert torch.equal(model.get_buffer("autofreeze_norms")[0], before[1])


def only(model, *names):
    """Train the parameters whose names begin so."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(names))
    return model


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gpt2", ("transformer.wte.", "transformer.h.1.")),
        ("t5", ("encoder.", "decoder.block.1.")),
        ("bert", ("bert.embeddings.LayerNorm.", "bert.encoder.layer.1.")),
        ("vit", ("vit.embeddings.cls_token", "vit.layers.1.")),
    ],
)
def test_what_depends_on_something_that_trains_is_not_kept(kind, names, tiny, batch):
    model = only(tiny(kind), *names)
    with pytest.raises(ValueError, match=r"0 puts out can't be kept: something below it trains"):
        CachedPrefix(model).compute(batch(kind))
    assert not any(block._forward_hooks for block in blocks(model)[1])


def test_a_fixed_encoder_prefix_is_kept_without_a_gradient(tiny, batch):
    """A head whose name says "embed" isn't below; T5's blocks put out several tensors."""
    model = LastLayers(fraction=0.5).attach(tiny("t5"))
    kept = CachedPrefix(model).compute(batch("t5"))
    parts = kept if isinstance(kept, tuple) else (kept,)
    assert not any(isinstance(part, torch.Tensor) and part.requires_grad for part in parts)
    model = tiny("bert")
    model.embed_head = nn.Linear(2, 2)
    only(model, "embed_head", "bert.encoder.layer.1.")
    with torch.no_grad():
        assert not CachedPrefix(model).compute(batch("bert")).requires_grad
