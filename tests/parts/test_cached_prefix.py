"""A frozen prefix of blocks: what it saves, and when its outputs may be kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import (
    LastLayers,
)
from pefttutor.parts.blocks import blocks
from pefttutor.parts.cached_prefix import CachedPrefix
from tests.tiny import (
    weights,
)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_kept_features_give_identical_losses_and_gradients(kind, tiny, batch):
    def run(cached):
        model, inputs = tiny(kind, num_hidden_layers=4), batch(kind)
        LastLayers(fraction=0.25).attach(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if cached:
            prefix = CachedPrefix(model)
            kept = prefix.compute(inputs)
            assert prefix.depth == 3
        losses = []
        for _ in range(3):
            if cached:
                with prefix.skipped(kept):
                    loss = model(**inputs).loss
            else:
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, weights(model)

    (a, one), (b, two) = run(False), run(True)
    assert a == b
    assert len(set(a)) == 3
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_prefix_that_trains_cannot_be_kept(tiny):
    with pytest.raises(ValueError, match="no block can be skipped"):
        CachedPrefix(tiny("bert"))


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
