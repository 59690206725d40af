"""A model's blocks, and what comes before them: on every architecture, and around a final norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor.parts.blocks import below, blocks
from pefttutor.parts.cached_prefix import CachedPrefix
from tests.tiny import freeze_one_block

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
