"""Masking: a mask that is learned through a step, and prunes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pefttutor import (
    Masking,
    fit,
    load,
    save,
)
from pefttutor.selective.masking import packed_masks
from tests.pictures import differences, picture
from tests.tiny import (
    base_weights,
    class_examples,
    llama_classifier,
    weights,
)


def test_the_straight_through_gradient_is_the_closed_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    Masking(target_modules=("0",), init_sparsity=0.5).attach(model)
    x, delta = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    model(x).backward(delta)
    torch.testing.assert_close(model[0].weight_scores.grad, model[0].weight * (delta.t() @ x))
    assert model[0].weight.grad is None
    kept = model[0].weight_scores > 0.01
    torch.testing.assert_close(model(x), x @ (model[0].weight * kept).t() + model[0].bias)


def test_with_all_scores_above_the_threshold_the_model_is_the_base(tiny, batch):
    base, model = tiny("bert"), Masking().attach(tiny("bert"))
    changed = model(**batch("bert")).logits
    assert not torch.equal(changed, base(**batch("bert")).logits)  # 5 % of the weights are pruned
    shares = []
    for name, p in model.named_parameters():
        if name.endswith("_scores"):
            assert p.min() >= -0.02
            shares.append((p <= 0.01).float().mean().item())
            p.data.clamp_(min=0.02)
    assert abs(sum(shares) / len(shares) - 0.05) < 0.01
    assert torch.equal(model(**batch("bert")).logits, base(**batch("bert")).logits)


IDS = torch.tensor([[1, 7, 8, 9], [1, 20, 30, 5]])


def test_only_scores_train_and_the_mask_packs_into_bits(tmp_path):
    model, before = llama_classifier(), weights(llama_classifier())
    method = Masking(target_modules=("q_proj", "up_proj"), init_sparsity=0.3, modules_to_save=("score",))
    method.attach(model)
    fit(model, class_examples(), steps=4, lr=0.05, weight_decay=0.1)
    after = base_weights(model)
    assert all(torch.equal(after[n], old) for n, old in before.items() if n != "score.weight")
    assert not torch.equal(after["score.weight"], before["score.weight"])
    packed = packed_masks(model)
    assert set(packed) == {
        f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")
    }
    for name, bits in packed.items():
        scores = dict(model.named_parameters())[f"{name}_scores"]
        assert len(bits) == math.ceil(scores.numel() / 8)
        unpacked = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        assert torch.equal(unpacked.flatten()[: scores.numel()].bool(), (scores > 0.01).flatten())
    save(model, tmp_path)
    assert torch.equal(load(llama_classifier(), tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ("score",), "modules_to_save": ("score",)}, "nothing is masked"),
        ({"target_modules": ("mlp",)}, r"'model.layers.0.mlp' is a LlamaMLP, without a weight"),
    ],
)
def test_masking_without_a_weight_to_mask(settings, says):
    model = llama_classifier()
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        Masking(**settings).attach(model)
    assert differences(before, picture(model)) == []
