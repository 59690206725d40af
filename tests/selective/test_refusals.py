"""What the selection methods refuse: clear words, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import LTSFT, PASTA, DiffPruning, FishDip, Masking, SparseFineTuning, adapted
from tests.tiny import llama_classifier


def untouched(model):
    return (
        adapted(model) is None
        and all(p.requires_grad for p in model.parameters())
        and not any("_shadows" in vars(m) or m._forward_pre_hooks for m in model.modules())
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ("score",), "modules_to_save": ("score",)}, "nothing is masked"),
        ({"target_modules": ("mlp",)}, r"'model.layers.0.mlp' is a LlamaMLP, without a weight"),
    ],
)
def test_masking_without_a_weight_to_mask(settings, says):
    model = llama_classifier()
    with pytest.raises(ValueError, match=says):
        Masking(**settings).attach(model)
    assert untouched(model)


def test_a_weight_that_is_not_contiguous_is_refused_at_once():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight.data = model[0].weight.data.t()
    with pytest.raises(ValueError, match=r"'0.weight' \(3, 3\) isn't contiguous.*\.contiguous\(\)"):
        SparseFineTuning().attach(model, {"0.weight": torch.ones(3, 3).bool()})
    assert untouched(model)


@pytest.mark.parametrize(
    ("name", "mask"), [("weight", torch.tensor([[0, 1], [1, 0], [0, 0]])), ("bias", torch.tensor([0, 1, 1]))]
)
def test_a_mask_of_whole_numbers_is_told_to_be_booleans(name, mask):
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"mask\.bool\(\)"):
        SparseFineTuning().attach(model, {f"0.{name}": mask})
    assert untouched(model)


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
        with pytest.raises(ValueError, match=rf"without calling its layer.*modules_to_save=\('{own}',\)"):
            attach(model)
        assert untouched(model)
    chosen = {n: torch.ones_like(p).bool() for n, p in make().named_parameters()}
    method = SparseFineTuning(modules_to_save=(own,))
    assert adapted(method.attach(make(), chosen)) is method


@pytest.mark.parametrize("hardest", [-1, 0, 2.5])
def test_hardest_is_a_count(hardest):
    with pytest.raises(ValueError, match="hardest is"):
        FishDip(hardest=hardest)


# ---- PASTA


@pytest.mark.parametrize("ids", [5, "[CLS]", (1.5,)])
def test_special_tokens_are_whole_numbers(ids):
    with pytest.raises(ValueError, match="special_token_ids is"):
        PASTA(special_token_ids=ids)


@pytest.mark.parametrize(("kind", "says"), [("t5", "has two"), ("vit", "has none")])
def test_a_model_that_does_not_read_one_text_is_refused(kind, says, tiny):
    model = tiny(kind)
    with pytest.raises(ValueError, match=says):
        PASTA(special_token_ids=(1,)).attach(model)
    assert untouched(model)
    with pytest.raises(ValueError, match=says):
        PASTA(special_token_ids=(1,)).count(tiny(kind))


def test_embeddings_as_input_hide_the_special_tokens():
    model = PASTA(special_token_ids=(1,)).attach(llama_classifier())
    with pytest.raises(ValueError, match="input_ids; give these, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="give these"):
        model(input_ids=None, inputs_embeds=torch.zeros(1, 3, 16))
