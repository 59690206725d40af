"""Methods against measurement: those that say nothing, those that do, and those that can't be followed."""

import dataclasses

import pytest
import torch

import pefttutor
from pefttutor import memory
from pefttutor.memory.measured import watch_saved
from tests.cases import CANNOT, CASES, attach
from tests.memory.models import TARGET_LENGTH, batch_of, config_of, held, model_of
from tests.tiny import checkpointed


class Bottleneck(torch.nn.Module):
    """A layer that the estimator has never heard of."""

    def __init__(self, layer):
        super().__init__()
        out, device = layer.weight.shape[0], layer.weight.device
        self.layer = layer
        self.down, self.up = torch.nn.Linear(out, 5, device=device), torch.nn.Linear(5, out, device=device)

    def forward(self, x):
        y = self.layer(x)
        return y + self.up(torch.relu(self.down(y)))


class Adapter:
    """A method that states nothing about its memory."""

    def attach(self, model):
        pefttutor.freeze(model)
        for layer in model.model.layers:
            layer.mlp.down_proj = Bottleneck(layer.mlp.down_proj)
        return model


def test_a_method_that_states_nothing_is_counted_all_the_same():
    model, method = model_of("llama"), Adapter()
    estimated = memory.estimate(
        model, method, batch_size=2, sequence_length=24, attention="eager", device="cpu"
    )
    method.attach(model)
    with watch_saved(model.train()) as saved:
        model(**batch_of("llama", 2, 24)).loss.backward()
    trained = sum(pefttutor.trainable(model).values())
    assert trained == 3 * (96 * 5 + 5 + 5 * 96 + 96)
    assert estimated.trained == trained
    assert estimated.adapter_weights == 4 * trained
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.01)
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("name", ["BitFit", "LastLayers", "LayerNormTuning", "LinearProbe"])
def test_methods_that_train_whole_tensors_need_no_word_in_the_estimator(name):
    model, method = model_of("bert"), getattr(pefttutor, name)()
    estimated = memory.estimate(
        model, method, batch_size=2, sequence_length=24, attention="eager", device="cpu"
    )
    method.attach(model)
    with watch_saved(model.train()) as saved:
        model(**batch_of("bert", 2, 24)).loss.backward()
    assert estimated.trained == sum(pefttutor.trainable(model).values())
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.01)


OPTIONS = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}


def chosen(model, share=0.3):
    """Masks of a share of the entries of every tensor."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "t5"])
def test_the_places_of_chosen_entries_are_weights_and_not_activations(kind, dtype):
    model = model_of(kind, dtype=dtype)
    pefttutor.SparseFineTuning().attach(model, chosen(model))
    batch = batch_of(kind, 2, 24, dtype)
    estimated = memory.estimate(model, **OPTIONS, target_length=TARGET_LENGTH)
    measured = memory.measure(lambda: model(**batch).loss.backward(), model=model.train())
    rows = memory.compare(estimated, measured)
    assert rows["weights"].ratio == 1
    assert rows["activations"].ratio == pytest.approx(1, abs=0.05)
    values = sum(pefttutor.trainable(model).values())
    assert estimated.adapter_weights == values * (dtype.itemsize + 4)


def test_what_a_method_holds_on_a_model_that_is_not_of_transformers():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    model.config = {"size": 4}
    pefttutor.SparseFineTuning().attach(model, {"0.weight": torch.ones(3, 4, dtype=torch.bool)})
    measured = memory.measure(lambda: model(torch.ones(1, 4)).sum().backward(), model=model)
    assert measured.weights == 4 * (12 + 3) + 12 * (4 + 4)


def test_phase_one_of_lt_sft_holds_a_second_copy_of_the_weights():
    model, method = model_of("llama"), pefttutor.LTSFT()
    estimated = memory.estimate(model, method, **OPTIONS)
    assert estimated.adapter_weights == estimated.weights
    method.attach(model)
    assert memory.estimate(model, **OPTIONS) == estimated
    batch = batch_of("llama", 2, 24)
    measured = memory.measure(lambda: model(**batch).loss.backward(), model=model.train())
    assert memory.compare(estimated, measured)["weights"].ratio == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "saved"), [("llama", ()), ("bert", ("classifier",)), ("gpt2", ())])
def test_pasta_trains_from_the_first_block_on(kind, saved, checkpointing):
    model = model_of(kind)
    method = pefttutor.PASTA(special_token_ids=(3, 20), modules_to_save=saved)
    estimated = memory.estimate(model, method, **OPTIONS, gradient_checkpointing=checkpointing)
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    measured = held(model, batch_of(kind, 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bloom", "bert", "vit"])
def test_of_a_ladder_the_side_network_alone_is_kept(kind, attention, dropout):
    attention = "eager" if kind == "bloom" else attention
    model, method = model_of(kind, attention=attention, dropout=dropout), pefttutor.LST(reduction=2)
    estimated = memory.estimate(model, method, **OPTIONS | {"attention": attention})
    method.attach(model)
    assert estimated == memory.estimate(model, **OPTIONS | {"attention": attention})
    assert estimated.trained == method.count(model)
    measured = held(model, batch_of(kind, 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_ladder_keeps_as_much_beside_a_model_in_half_or_one_whose_blocks_are_made_again(checkpointing):
    model, method = model_of("llama", dtype=torch.bfloat16), pefttutor.LST(reduction=2, layers=(0, 2))
    estimated = memory.estimate(model, method, **OPTIONS, gradient_checkpointing=checkpointing)
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    measured = held(model, batch_of("llama", 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "bloom"])
def test_virtual_tokens_lengthen_the_texts_inside_of_the_model(kind, checkpointing):
    model, method = model_of(kind), pefttutor.PromptTuning(num_virtual_tokens=10)
    estimated = memory.estimate(
        model, method, **OPTIONS, target_length=TARGET_LENGTH, gradient_checkpointing=checkpointing
    )
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    assert estimated.trained == method.count(model)
    measured = held(model, batch_of(kind, 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "sdpa"), ("bert", "sdpa"), ("t5", "eager")],
)
def test_a_prefix_lengthens_keys_and_values(kind, attention):
    model, method = model_of(kind, attention=attention), pefttutor.PrefixTuning(num_virtual_tokens=10)
    estimated = memory.estimate(
        model, method, **OPTIONS | {"attention": attention}, target_length=TARGET_LENGTH
    )
    method.attach(model)
    assert estimated.trained == method.count(model)
    measured = held(model, batch_of(kind, 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


def test_what_makes_the_virtual_tokens_is_counted_with_its_moments():
    model, method = model_of("llama"), pefttutor.PTuning(num_virtual_tokens=10)
    estimated = memory.estimate(model, method, **OPTIONS)
    assert estimated.trained == method.count(model) == 10 * 96 + 46 * 96**2 + 35 * 96
    assert estimated.optimizer == 8 * estimated.trained


MADE = [
    (pefttutor.PTuning(num_virtual_tokens=10), {"encoder": "none"}),
    (pefttutor.PTuning(num_virtual_tokens=10, encoder="mlp"), {"encoder": "none"}),
    (pefttutor.PrefixTuning(num_virtual_tokens=10, prefix_projection=True), {"prefix_projection": False}),
]


@pytest.mark.parametrize(("method", "without"), MADE, ids=["lstm", "relu", "tanh"])
def test_what_the_network_keeps_that_makes_the_virtual_tokens_is_counted(method, without):
    """In float64, of which oneDNN has no kernel of its own."""
    sizes = []
    for each in (method, dataclasses.replace(method, **without)):
        model = model_of("llama", dtype=torch.float64)
        estimated = memory.estimate(model, each, **OPTIONS)
        measured = held(each.attach(model), batch_of("llama", 2, 24))
        sizes.append((sum(estimated.activations.values()), measured))
    (more, seen), (less, seen_less) = sizes
    assert more - less == seen - seen_less > 0


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [("llama", True), ("gpt2", False), ("bert", False), ("t5", False), ("vit", False)],
)
def test_bottleneck_adapters_keep_what_their_projections_read(kind, placement, checkpointing):
    model = model_of(kind)
    method = pefttutor.Adapter(placement=placement, bottleneck=16, activation="gelu", scaling=2.0)
    options = OPTIONS | {"target_length": TARGET_LENGTH, "gradient_checkpointing": checkpointing}
    estimated = memory.estimate(model, method, **options)
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    measured = held(model, batch_of(kind, 2, 24))
    assert estimated.trained == sum(pefttutor.trainable(model).values())
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("fields", [{"activation": "relu"}, {"target_modules": ("output.LayerNorm",)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_next_to_half_precision_and_at_a_norm(fields, dtype):
    model = pefttutor.Adapter(bottleneck=16, **fields).attach(model_of("bert", dtype=dtype))
    estimated = memory.estimate(model, **OPTIONS)
    measured = held(model, batch_of("bert", 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["BitFit", "DiffPruning"])
def test_methods_that_reach_the_patches_of_a_picture(name, checkpointing):
    """Among the parameters are two that belong to no layer: of the first token, and of the positions."""
    model, method = model_of("vit"), getattr(pefttutor, name)()
    estimated = memory.estimate(model, method, **OPTIONS, gradient_checkpointing=checkpointing)
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    measured = held(model, batch_of("vit", 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.002)


class Parallel(Adapter):
    """An adapter beside a whole part of every block."""

    def __init__(self, part):
        self.part = part

    def attach(self, model):
        pefttutor.freeze(model)
        for i, layer in enumerate(model.model.layers):
            if self.part == "block":
                model.model.layers[i] = torch.nn.ModuleDict({"inner": layer})
            else:
                layer.mlp = torch.nn.ModuleDict({"inner": layer.mlp})
        return model


class Hidden(Adapter):
    """An adapter that stands beside the layers, and is called by a hook."""

    def attach(self, model):
        pefttutor.freeze(model)
        for layer in model.model.layers:
            layer.extra = torch.nn.Linear(96, 96)
            layer.mlp.register_forward_hook(
                lambda mlp, args, output, layer=layer: output + layer.extra(output)
            )
        return model


PLACES = ("q_proj", "down_proj")
LOW_RANK = {"r": 4, "target_modules": PLACES}
FROZEN = {
    "LoRA": pefttutor.LoRA(**LOW_RANK),
    "LoRA with dropout": pefttutor.LoRA(**LOW_RANK, lora_dropout=0.1),
    "LoRA of words": pefttutor.LoRA(r=4, target_modules=("embed_tokens",)),
    "SLTrain": pefttutor.SLTrain(**LOW_RANK),
    "PiSSA": pefttutor.PiSSA(**LOW_RANK),
    "LoHa": pefttutor.LoHa(**LOW_RANK),
    "LoTR": pefttutor.LoTR(**LOW_RANK),
    "SoRA": pefttutor.SoRA(**LOW_RANK),
    "VeRA": pefttutor.VeRA(**LOW_RANK),
    "DoRA": pefttutor.DoRA(**LOW_RANK),
    "IncreLoRA": pefttutor.IncreLoRA(target_r=2, max_r=2, incre_interval=1, top_h=99, target_modules=PLACES),
    "IA3": pefttutor.IA3(target_modules=("k_proj", "down_proj"), feedforward_modules=("down_proj",)),
    "Adapter": pefttutor.Adapter(bottleneck=40),
    "Compacter": pefttutor.Compacter(n=2),
    "AdapterBias": pefttutor.AdapterBias(),
    "InvertibleAdapter": pefttutor.InvertibleAdapter(),
    "PASTA": pefttutor.PASTA(special_token_ids=(1, 2)),
}


LEARNS = {"llama": "up_proj", "gpt2": "mlp.c_fc", "bert": "intermediate.dense"}  # hardly a method's own layer
EVERYWHERE = {  # methods that change this layer too
    *(("DiffPruning", kind) for kind in LEARNS),
    *(("SSF", kind) for kind in LEARNS),
    ("Masking", "gpt2"),
    ("Masking", "bert"),
}
NOT_BELOW = {  # a side network takes the base's states without their gradient; the others don't attach to these models
    *(("LST", kind) for kind in LEARNS),
    *(("ProxyTuning", kind) for kind in LEARNS),
    ("BitFit", "llama"),
}
BELOW = [cell for name in CASES for kind in LEARNS if (cell := (name, kind)) not in {*CANNOT, *NOT_BELOW}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), BELOW)
def test_every_method_frozen_beside_what_trains(name, kind, dtype):
    model = attach(name, kind, model_of(kind, dtype=dtype))
    pefttutor.LoRA(r=4, target_modules=(LEARNS[kind],)).attach(model, name="learning")
    pefttutor.switch(model, "default", "learning", train=("learning",))
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}
    if (name, kind) in EVERYWHERE:
        with pytest.raises(ValueError, match=r"2 attachments change the same .*memory\.measure"):
            memory.estimate(model, **options)
        return
    estimated = sum(memory.estimate(model, **options).activations.values())
    # In bfloat16 next to float32 the rounded gates and prefixes of a tiny model count, which nobody writes down.
    rel = 0.005 if dtype is torch.float32 else 0.02
    assert estimated == pytest.approx(held(model, batch_of(kind, 2, 24)), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_beside_what_trains_keeps_only_what_flows_on(name, dtype):
    model = FROZEN[name].attach(model_of("llama", dtype=dtype), name="frozen")
    pefttutor.LoRA(r=4, target_modules=("v_proj",)).attach(model, name="learning")
    pefttutor.switch(model, "frozen", "learning", train=("learning",))
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}
    estimated = sum(memory.estimate(model, **options).activations.values())
    assert estimated == pytest.approx(held(model, batch_of("llama", 2, 24)), rel=0.005)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Parallel("mlp"), "no attribute 'gate_proj'.*in the place of single layers.*memory.measure"),
        (Parallel("block"), "no attribute 'self_attn'.*in the place of single layers.*memory.measure"),
        (
            Hidden(),
            "'model.layers.0.extra.weight' trains, and the estimator met no layer that uses it.*measure",
        ),
    ],
)
def test_a_method_that_the_formulas_do_not_reach_is_refused(method, says):
    with pytest.raises(ValueError, match=says):
        memory.estimate(config_of("llama"), method)


class FirstWeight(Adapter):
    """A method that chooses by a value."""

    def attach(self, model):
        return super().attach(model) if model.get_input_embeddings().weight[0, 0] < 9 else model


def test_a_method_that_looks_at_values_is_estimated_after_attaching():
    with pytest.raises(ValueError, match=r"FirstWeight needs the model's values.*estimate\(method.attach"):
        memory.estimate(config_of("llama"), FirstWeight())
