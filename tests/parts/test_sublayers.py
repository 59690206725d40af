"""Where sublayers end and start, seen in a trial: on every architecture of the tests, and where it can't be said."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from pefttutor.memory.meta import on_meta
from pefttutor.parts.sublayers import sublayers
from tests.architectures import ARCHITECTURES
from tests.cases import ENDS, base_of, fresh, layers
from tests.pictures import differences, picture
from tests.tiny import KINDS, made, tiny_model

STARTS = {
    "llama": ("q_proj", "gate_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "bert": ("query", "intermediate.dense"),
    "t5": ("q", "wi"),
    "vit": ("q_proj", "fc1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_sublayer_is_found_with_its_end_and_its_start(kind):
    found = sublayers(base_of(kind))
    assert {one.end for one in found} == set(layers(base_of(kind), ENDS[kind]))
    assert {one.start for one in found} == set(layers(base_of(kind), STARTS[kind]))
    blocks = 3 if kind == "t5" else 2  # an encoder of one, a decoder of two
    assert sum(one.last for one in found) == blocks
    assert len(found) == 2 * blocks + (2 if kind == "t5" else 0)
    feed_forward = set(layers(base_of(kind), ("mlp.c_proj",) if kind == "gpt2" else ENDS[kind][-1:]))
    attention = set(layers(base_of(kind), ("attention.output.dense",)))
    assert {one.end for one in found if one.last} == feed_forward - attention


@pytest.mark.parametrize("kind", KINDS)
def test_without_values_the_same_is_found(kind):
    assert sublayers(on_meta(base_of(kind))) == sublayers(base_of(kind))


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_the_trial_leaves_no_trace(kind):
    model = fresh(kind).train()
    model.requires_grad_(False)
    before, state = picture(model), torch.get_rng_state()
    sublayers(model)
    assert differences(before, picture(model)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_is_called_after_a_sublayer_is_not_the_start_of_the_next_blocks():
    model = tiny_model("llama")
    expected = sublayers(model)
    block = model.model.layers[0]
    block.probe = nn.Linear(24, 3)
    block.register_forward_hook(lambda module, args, output: (module.probe(output), None)[1])
    assert sublayers(model) == expected


def test_a_model_that_adds_in_place_is_tried_all_the_same():
    found = sublayers(ARCHITECTURES["Falcon"].build())
    assert [one.end.split(".", 3)[3] for one in found] == ["self_attention.dense", "mlp.dense_4h_to_h"] * 2


def test_names_do_not_matter_and_neither_does_the_order_of_registration():
    model = tiny_model("llama")
    for block in model.model.layers:
        mlp = block.mlp
        modules = dict(mlp._modules)
        mlp._modules.clear()
        mlp._modules.update({name: modules[name] for name in ("down_proj", "act_fn", "up_proj", "gate_proj")})
        swapped = mlp._modules["down_proj"], mlp._modules["up_proj"]
        mlp._modules["up_proj"], mlp._modules["down_proj"] = swapped
        mlp.forward = type(mlp).forward.__get__(_Turned(mlp))
    ends = [one.end for one in sublayers(model) if one.last]
    assert ends == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


class _Turned:
    """A feed-forward layer whose second layer is called up_proj, and its first down_proj."""

    def __init__(self, mlp: nn.Module) -> None:
        self.gate_proj, self.act_fn = mlp.gate_proj, mlp.act_fn
        self.up_proj, self.down_proj = mlp.down_proj, mlp.up_proj


def mixture(make: str, config: str, **own: object) -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return made(getattr(hf, make), getattr(hf, config)(**sizes, **own))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda: mixture("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
            r"'model.layers.0.mlp.*' reaches the sum without one: name in target_modules .* It has: .*o_proj",
        ),
        (
            lambda: mixture("Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2,
                            moe_intermediate_size=16, shared_expert_intermediate_size=16),
            r"'model.layers.0.mlp.*' reaches the sum without one",
        ),
        (
            lambda: made(hf.MambaForCausalLM, hf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2)),
            r"'backbone.layers.0.mixer.out_proj' is the only end of one in its block.*It has: in_proj",
        ),
        (
            lambda: made(hf.SwitchTransformersForConditionalGeneration, hf.SwitchTransformersConfig(
                vocab_size=50, d_model=16, d_kv=5, d_ff=24, num_layers=2, num_heads=2, num_decoder_layers=2,
                num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, decoder_start_token_id=0)),
            r"expert_\d.wi' isn't called by every text",
        ),
        (lambda: tiny_model("net"), r"can't be tried \(.*it reads something of its own.*It has: enter, up, down"),
    ],
    ids=["Mixtral", "Qwen2-MoE", "Mamba", "Switch", "net"],
)  # fmt: skip
def test_where_it_can_not_be_said_the_names_that_exist_are(build, says):
    model = build().eval()
    with pytest.raises(ValueError, match=says):
        sublayers(model)
    before = picture(model)  # a router of Switch notes things on itself when it runs first
    with pytest.raises(ValueError, match=says):
        sublayers(model)
    assert differences(before, picture(model)) == []
