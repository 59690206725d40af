"""Any change of linear weights as a LoRA, against the singular values of the merged weights' difference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pefttutor as pt
from pefttutor.parts.linear import dense_weight
from tests.cases import moved
from tests.pictures import differences, picture
from tests.tiny import tiny_batch, tiny_model

ADALORA = pt.AdaLoRA(init_r=4, target_r=4, total_step=2, target_modules=("q",))
IA3 = pt.IA3(target_modules=("k", "o"), feedforward_modules=("o",))


def dense_changes(model: Any, base: Any) -> dict[str, Tensor]:
    """W' − W of every linear layer, by the weights that merging makes."""
    pt.merge(model)
    found = {}
    for name, layer in base.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)) or type(layer).__name__ == "Conv1D":
            delta = (dense_weight(model.get_submodule(name)) - dense_weight(layer)).detach()
            found |= {name: delta} if delta.any() else {}
    pt.unmerge(model)
    return found


def logits(model: Any, kind: str) -> Tensor:
    return model.eval()(**tiny_batch(kind)).logits.detach()


def fish(kind: str, **settings: Any) -> Any:
    model = tiny_model(kind)
    batch = tiny_batch(kind)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(2)]
    return moved(pt.FishMask(fraction=0.2, **settings).attach(model, rows))


MADE = {
    "LoRA": ("llama", lambda: moved(pt.LoRA(r=4, target_modules=("q_proj", "down_proj")).attach(tiny_model("llama")))),
    "PiSSA": ("gpt2", lambda: moved(pt.PiSSA(r=4, target_modules=("c_attn", "wte")).attach(tiny_model("gpt2")))),
    "DoRA": ("llama", lambda: moved(pt.DoRA(r=2, target_modules=("v_proj",)).attach(tiny_model("llama")))),
    "AdaLoRA": ("t5", lambda: moved(ADALORA.attach(tiny_model("t5")))),
    "IA3": ("t5", lambda: moved(IA3.attach(tiny_model("t5")))),
    "DiffPruning": ("llama", lambda: moved(pt.DiffPruning(structured=False).attach(tiny_model("llama")))),
    "FishMask": ("t5", lambda: fish("t5")),
    "Masking": ("gpt2", lambda: pt.Masking(target_modules=("c_fc",), init_sparsity=0.3).attach(tiny_model("gpt2"))),
    "LastLayers": ("gpt2", lambda: moved(pt.LastLayers(fraction=0.5).attach(tiny_model("gpt2")))),
}  # fmt: skip


@pytest.mark.parametrize("which", MADE)
def test_what_is_lost_is_what_the_best_approximation_loses(which):
    """Eckart and Young: ‖ΔW − B A‖_F is the root of the sum of the other singular values' squares."""
    kind, make = MADE[which]
    model, base = make(), tiny_model(kind)
    deltas = dense_changes(model, base)
    lost = pt.as_lora(model, r=2, leave_out=True)
    assert type(pt.adapted(model)).__name__ == "LoRA"
    for path, delta in deltas.items():
        S = torch.linalg.svdvals(delta)
        if path not in lost:  # a table that is smaller than the rank, such as of T5's positions
            assert lost[f"{path}.weight"] == 1
            continue
        assert lost[path] == pytest.approx(float(S[2:].norm() / S.norm()), abs=2e-5)
    assert len(deltas) <= len(lost)
    pt.detach(model)
    assert differences(dict(base.state_dict()), dict(model.state_dict())) == []


@pytest.mark.parametrize("which", ["LoRA", "DoRA", "AdaLoRA", "IA3", "PiSSA"])
def test_with_rank_enough_nothing_is_lost_and_the_model_says_the_same(which):
    kind, make = MADE[which]
    model = make()
    said = logits(model, kind)
    rank = {"LoRA": 4, "PiSSA": 8, "DoRA": 12, "AdaLoRA": 4, "IA3": 20}[which]
    lost = pt.as_lora(model, r=rank)
    assert max(lost.values()) < 1e-5
    torch.testing.assert_close(logits(model, kind), said, rtol=1e-4, atol=1e-4)


def test_what_is_merged_in_training_and_the_change_beside_it_are_one():
    """Two links of a chain lie in the weight, and a third beside it: rank 6 holds them all, and rank 4 doesn't."""
    model = pt.ReLoRA(r=2, reset_every=1).attach(tiny_model("llama"))
    for seed in range(3):
        moved(model, seed)
        if seed < 2:
            pt.adapted(model).after_step(model, seed)
    said, whole = logits(model, "llama"), copy.deepcopy(model)
    assert max(pt.as_lora(model, r=6).values()) < 1e-5
    torch.testing.assert_close(logits(model, "llama"), said, rtol=1e-4, atol=1e-4)
    assert min(pt.as_lora(whole, r=4).values()) > 0.01


def test_modules_that_stay_whole_and_a_tied_table(tmp_path):
    """Everything has changed: norms stay whole, and a weight that two layers share becomes a LoRA of each."""
    model, base = tiny_model("gpt2"), tiny_model("gpt2")
    model = moved(pt.LTSFT().attach(model))
    said = logits(model, "gpt2")
    changed = [name for name, p in model.named_parameters() if not p.equal(base.get_parameter(name))]
    lost = pt.as_lora(model, r=24, modules_to_save=("ln_1", "ln_2", "ln_f"), leave_out=True)
    assert {name for name, error in lost.items() if error == 1} == {
        n for n in changed if n.endswith("bias") and "ln_" not in n
    }
    assert {"transformer.wte", "lm_head"} <= set(lost)
    for name in [name for name in changed if name in lost]:  # what was dropped is the base's again
        assert model.get_parameter(name).equal(base.get_parameter(name))
    assert not model.transformer.ln_f.weight.equal(base.transformer.ln_f.weight)
    assert (logits(model, "gpt2") - said).abs().max() < (logits(base, "gpt2") - said).abs().max()
    folder = pt.to_peft(model, tmp_path)  # and any server takes it
    assert torch.equal(logits(pt.from_peft(tiny_model("gpt2"), folder), "gpt2"), logits(model, "gpt2"))


def test_the_head_that_a_method_names_stays_whole_and_others_stay_attached():
    model = pt.LoRA(r=2, target_modules=("value",)).attach(tiny_model("bert"), name="other")
    method = pt.DoRA(r=2, target_modules=("query",), modules_to_save=("classifier",))
    moved(method.attach(model, name="mine"))
    said = logits(model, "bert")
    assert max(pt.as_lora(model, r=20, name="mine").values()) < 0.2
    assert list(pt.attached(model)) == ["other", "mine"]
    assert pt.adapted(model, "mine").modules_to_save == ("classifier",)
    assert (logits(model, "bert") - said).abs().max() < 0.1


@pytest.mark.parametrize(
    ("kind", "method", "settings", "message"),
    [
        ("llama", pt.LayerNormTuning(), {}, r"also changed model.layers.0.input_layernorm.weight; .*modules_to_save"),
        ("llama", pt.LayerNormTuning(), {"leave_out": True}, "has changed no linear layer that takes a LoRA of rank 2"),
        ("gpt2", pt.IA3(target_modules=("c_attn",), feedforward_modules=()), {}, "also changed .*c_attn.bias"),
        ("llama", pt.PromptTuning(num_virtual_tokens=2), {}, "can't become a LoRA: it changes what the model computes"),
        ("llama", pt.LoRA(r=2), {"r": 0}, "r is 0; it must be a whole number"),
        ("llama", pt.LoRA(r=2), {"modules_to_save": "lm_head"}, "modules_to_save is a string"),
        ("llama", pt.LoRA(r=2), {"r": 13}, "which a LoRA of rank 13 can't hold"),
    ],
)  # fmt: skip
def test_what_a_lora_cannot_hold_is_refused_and_the_model_is_as_it_was(kind, method, settings, message):
    model = moved(method.attach(tiny_model(kind)))
    before, said = picture(model), logits(model, kind)
    with pytest.raises(ValueError, match=message):
        pt.as_lora(model, **{"r": 2} | settings)
    assert differences(before, picture(model)) == []
    assert torch.equal(logits(model, kind), said)


def test_next_to_a_half_precision_weight_the_change_is_taken_in_float32():
    model = moved(pt.LoRA(r=2).attach(tiny_model("llama", dtype=torch.bfloat16)))
    assert max(pt.as_lora(model, r=2).values()) < 1e-5


def test_autocast_does_not_round_it():
    model = moved(pt.LoRA(r=2).attach(tiny_model("llama")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert max(pt.as_lora(model, r=2).values()) < 1e-5


def test_what_another_one_builds_on_is_refused():
    """The LoRA would act after the DoRA, whose norm is that of what the first one has made of the weight."""
    first, second = (pt.LoRA(r=2), pt.DoRA(r=2))
    model = moved(second.attach(moved(first.attach(tiny_model("llama"), name="first")), name="second"))
    before, said = picture(model), logits(model, "llama")
    with pytest.raises(ValueError, match=r"would act after 'second' \(DoRA\), which builds on"):
        pt.as_lora(model, r=2, name="first")
    assert differences(before, picture(model)) == []
    assert torch.equal(logits(model, "llama"), said)
    pt.as_lora(model, r=12, name="second")
