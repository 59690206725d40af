"""InvertibleAdapter, and MAD-X made of it and Adapters, against the authors' library and the formula in hooks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from pefttutor import Adapter, InvertibleAdapter, attached, detach, fit, load, memory, save, switch, trainable
from pefttutor.parts.blocks import blocks
from pefttutor.parts.coupling import coupled, uncoupled
from pefttutor.train.losses import causal_lm_loss
from tests.additive.input.mad_x_library import BOTTLENECK, FILE, NAMES, model_of, value_of
from tests.cases import answer, base_answer, batch_of, fresh, gradients, loss_of, moved
from tests.memory.models import TARGET_LENGTH, held
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import bert, checkpointed, rows_of, tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}

# ---- the authors' library


def mad_x(model: nn.Module, bottleneck: int = BOTTLENECK) -> nn.Module:
    """A language with its words, and a task above it; all of them train."""
    how = {"placement": "pfeiffer", "bottleneck": bottleneck, "activation": "relu"}
    InvertibleAdapter().attach(model, name="words")
    for name in NAMES:
        Adapter(**how).attach(model, name=name)
    return model


def our_name(theirs: str) -> str:
    """bert.invertible_adapters.language.F.0.bias → bert.encoder.layer.0.invertible_F_down_bias@words"""
    path, _, rest = theirs.partition(".invertible_adapters.")
    if rest:
        _, which, place, key = rest.split(".")
        first = f"{path}.encoder.layer.0" if path == "bert" else f"{path}.layers.0"
        return (
            f"{first}.invertible_{which}_{'down' if place == '0' else 'up'}{'_bias' * (key == 'bias')}@words"
        )
    path, _, rest = theirs.replace("output_adapters.adapters", "output.adapters").partition(
        ".output.adapters."
    )
    name, which, *_, key = rest.split(".")
    end = "output.dense" if path.startswith("bert") else "mlp.down_proj"
    return f"{path}.{end}.{which}{'_bias' * (key == 'bias')}@{name}"


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_mad_x_is_what_the_authors_library_makes_of_it(kind):
    """Logits of an encoder whose head is tied, and of a decoder with its own, and the gradient of all that is added."""
    stored = {n.partition("/")[2]: t for n, t in load_file(FILE).items() if n.startswith(f"{kind}/")}
    model = model_of(kind)
    for name, p in model.named_parameters():
        p.data.copy_(stored[f"base/{name}"])
    mad_x(model)
    theirs = {our_name(n.removeprefix("value/")): t for n, t in stored.items() if n.startswith("value/")}
    assert set(trainable(model)) == set(theirs)
    for name, value in theirs.items():
        model.get_parameter(name).data = value.double()
    logits, value = value_of(model)
    torch.testing.assert_close(logits, stored["logits"], **EXACT)
    expected = {our_name(n.removeprefix("grad/")): t for n, t in stored.items() if n.startswith("grad/")}
    found = gradients(model, value)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.abs().max() > 1e-6, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)


# ---- the formula

WHERE = {  # what gives what the first block gets, and the output embeddings
    "llama": (("model.embed_tokens",), "lm_head"),
    "gpt2": (("transformer.drop",), "lm_head"),
    "bert": (("bert.embeddings",), None),
    "masked": (("bert.embeddings",), "cls.predictions.decoder"),
    "t5": (("encoder.embed_tokens", "decoder.embed_tokens"), "lm_head"),
}


def base_of(kind: str) -> nn.Module:
    if kind == "masked":
        model = bert(dropout=0.0).double().eval()
        model.load_state_dict(
            {n: 5 * t for n, t in model.state_dict().items()}
        )  # else it says all words alike
        return model
    return tiny_model(kind, dtype=F64)


def inputs_of(kind: str) -> dict[str, Tensor]:
    batch = tiny_batch("llama" if kind == "masked" else kind, side="left", dtype=F64)
    return batch if kind == "bert" else batch | {"labels": batch["input_ids"]}


def by_hand(base: nn.Module, kind: str, leaves: dict[str, Tensor]) -> nn.Module:
    """The base with hooks of our own, in which x and y are taken apart by their places."""
    w = {name.partition("invertible_")[2]: leaf for name, leaf in leaves.items()}

    def network(which: str, x: Tensor) -> Tensor:
        narrow = torch.relu(x @ w[f"{which}_down"].mT + w[f"{which}_down_bias"])
        return narrow @ w[f"{which}_up"].mT + w[f"{which}_up_bias"]

    def forward(module, args, x):
        half = x.shape[-1] // 2
        first = x[..., :half] + network("F", x[..., half:])
        return torch.cat([first, x[..., half:] + network("G", first)], -1)

    def back(module, args):
        half = args[0].shape[-1] // 2
        second = args[0][..., half:] - network("G", args[0][..., :half])
        return (torch.cat([args[0][..., :half] - network("F", second), second], -1),)

    enters, head = WHERE[kind]
    for module in {base.get_submodule(path) for path in enters}:
        module.register_forward_hook(forward)
    if head:
        base.get_submodule(head).register_forward_pre_hook(back)
    return base


@pytest.mark.parametrize("kind", WHERE)
def test_outputs_and_every_gradient_are_those_of_the_formula(kind):
    ours, inputs = moved(InvertibleAdapter().attach(base_of(kind))), inputs_of(kind)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if p.requires_grad}
    assert len(leaves) == 8
    base = by_hand(base_of(kind), kind, leaves)
    torch.testing.assert_close(answer(ours, inputs), answer(base, inputs), **EXACT)
    assert not torch.allclose(answer(base_of(kind), inputs), answer(base, inputs), rtol=1e-3)
    expected = torch.autograd.grad(loss_of(base, inputs), list(leaves.values()))
    found = gradients(ours, loss_of(ours, inputs))
    assert found.keys() == leaves.keys()
    for (name, grad), right in zip(found.items(), expected, strict=True):
        assert grad.abs().max() > 1e-8, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, right, **EXACT, msg=name)


def drawn(d: int, m: int) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    shapes = [(m, d // 2), (m,), (d // 2, m), (d // 2,)]
    return [[torch.randn(*shape, generator=g, dtype=F64) for shape in shapes] for _ in "fg"]


def test_the_inverse_gives_back_what_went_in():
    f, g = drawn(24, 6)
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    y = coupled(x, f, g)
    assert (y - x).abs().min() > 1e-4, "something was left as it was"
    torch.testing.assert_close(uncoupled(y, f, g), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(coupled(uncoupled(x, f, g), f, g), x, rtol=0, atol=1e-12)


def test_it_keeps_volumes_as_the_determinant_says():
    f, g = drawn(8, 3)
    x = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda x: coupled(x, f, g), x)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet) < 1e-12
    assert not torch.allclose(jacobian, torch.eye(8, dtype=F64), atol=0.1)


def test_the_count_for_bert_base_is_the_closed_formula():
    """2 · (2 · 384 · 192 + 192 + 384), a number that the authors' library gives as well."""
    with torch.device("meta"):
        model = hf.BertForMaskedLM(hf.BertConfig())
    assert InvertibleAdapter().count(model) == 296_064
    assert sum(trainable(InvertibleAdapter().attach(model)).values()) == 296_064
    assert InvertibleAdapter(bottleneck=10).count(tiny_model("bert")) == 2 * 24 * 10 + 2 * 10 + 24


# ---- how it starts


def test_it_starts_as_the_base_and_only_the_way_up_gets_a_gradient():
    model, inputs = InvertibleAdapter().attach(fresh("bert")), batch_of("bert")
    assert torch.equal(answer(model, inputs), base_answer("bert"))
    found = gradients(model, loss_of(model, inputs))
    assert {name.partition("_")[2]: bool(g.any()) for name, g in found.items()} == {
        f"{which}_{key}": "up" in key for which in "FG" for key in ("down", "down_bias", "up", "up_bias")
    }


def test_with_a_number_it_starts_near_it_and_a_seed_fixes_the_start():
    one, same, other = (
        tensors(InvertibleAdapter(init_std=0.02, init_seed=i).attach(fresh("gpt2"))) for i in (1, 1, 2)
    )
    assert differences(one, same) == []
    changed = [name for name in differences(one, other) if "invertible" in name]
    assert len(changed) == 4
    assert all(0 < one[name].abs().max() <= 0.04 for name in changed)
    assert all(not one[name].any() for name in one if "invertible" in name and name not in changed)


# ---- MAD-X


def language_and_task(seed: int) -> nn.Module:
    """Two languages that have learned something, and a task above them that hasn't."""
    model = fresh("llama")
    for i, language in enumerate(("velan", "german")):
        InvertibleAdapter().attach(model, name=f"{language}-words")
        Adapter(placement="pfeiffer", bottleneck=5).attach(model, name=language)
        moved(switch(model, f"{language}-words", language), seed=seed + i)
    Adapter(placement="pfeiffer", bottleneck=3, init_seed=seed).attach(model, name="topic")
    return model


def test_a_task_learns_above_a_frozen_language_and_is_used_with_another():
    model, batch = language_and_task(0), batch_of("llama")
    velan, german = (f"{language}-words {language} topic".split() for language in ("velan", "german"))
    switch(model, *velan, train=("topic",))
    assert trainable(model)
    assert all(name.endswith("@topic") for name in trainable(model))
    before = tensors(model)
    fit(model, rows_of(batch), steps=3, batch_size=3, lr=1e-2, progress=False)
    assert {name.rpartition("@")[2] for name in differences(before, tensors(model))} == {"topic"}
    said = answer(switch(model, *german), batch)
    others = [("german-words", "german"), ("german", "topic"), ("german-words", "topic"), tuple(velan)]
    for names in others:
        assert not torch.allclose(answer(switch(model, *names), batch), said, atol=1e-3), names
    assert torch.equal(answer(switch(model, *reversed(german)), batch), said)


def test_a_task_above_a_language_is_by_hand_an_adapter_of_what_the_other_gives():
    model, batch = moved(switch(language_and_task(0), "velan", "topic")), batch_of("llama")
    said, base = answer(model, batch), fresh("llama")
    for i, layer in enumerate(base.model.layers):
        own = model.model.layers[i].mlp.down_proj

        def two(module, args, h, own=own):
            for name in ("velan", "topic"):
                w = {
                    k: own.get_parameter(f"adapter_{k}@{name}")
                    for k in ("down", "down_bias", "up", "up_bias")
                }
                narrow = torch.nn.functional.gelu(h @ w["down"].mT + w["down_bias"])
                h = h + narrow @ w["up"].mT + w["up_bias"]
            return h

        layer.mlp.down_proj.register_forward_hook(two)
    torch.testing.assert_close(said, answer(base, batch), rtol=1e-5, atol=1e-5)


def test_a_language_learned_by_a_language_model_is_put_onto_a_classifier_by_its_names():
    """Which has no output embeddings: what its blocks get and give is what the language model's do."""
    model, batch = moved(mad_x(fresh("llama"))), batch_of("llama")
    classifier = hf.LlamaForSequenceClassification(copy.deepcopy(model.config)).eval()
    classifier.model.load_state_dict(fresh("llama").model.state_dict())
    mad_x(classifier)
    learned = {name: t for name, t in tensors(model).items() if "@" in name}
    assert set(learned) == set(trainable(classifier))
    classifier.load_state_dict(learned, strict=False)
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs, base = (
            each.model(**ids).last_hidden_state for each in (classifier, model, fresh("llama"))
        )
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, base, atol=1e-2)


@pytest.mark.parametrize("name", ["words", "language", "task"])
def test_each_of_the_three_has_a_file_of_its_own(name, tmp_path):
    model = moved(mad_x(fresh("bert")))
    save(model, tmp_path, name=name)
    again = load(fresh("bert"), tmp_path, name="again")
    assert torch.equal(answer(again, batch_of("bert")), answer(switch(model, name), batch_of("bert")))
    assert not torch.equal(answer(again, batch_of("bert")), base_answer("bert"))


def test_the_loss_without_logits_calls_no_head():
    model, batch = moved(InvertibleAdapter().attach(fresh("llama"))), batch_of("llama")
    causal_lm_loss(model, batch)  # proved now
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape), always_call=True)
    loss = causal_lm_loss(model, batch)
    assert seen
    assert all(shape[-1] == 0 for shape in seen[-1:])
    torch.testing.assert_close(loss, loss_of(model, batch), rtol=1e-5, atol=1e-6)


# ---- two languages together


def two_languages(kind: str) -> nn.Module:
    """In float64, with bottlenecks of their own, far from their start."""
    model = tiny_model(kind, dtype=F64)
    for i, name in enumerate(("velan", "german")):
        InvertibleAdapter(bottleneck=3 + 2 * i).attach(model, name=name)
    return moved(model, seed=3)


def passing(model: nn.Module) -> nn.Module:
    """The blocks and the norm after them give what they get."""
    _, stack = blocks(model)
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    for module in (*stack, norm):
        module.forward = lambda x, *args, **kwargs: x
    return model


def read_by_head(model: nn.Module, kind: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    answer(model, tiny_batch(kind, dtype=F64))
    handle.remove()
    return seen[0]


def loaded_onto(fresh_one: nn.Module, model: nn.Module, folder: Path) -> nn.Module:
    for name in ("german", "velan"):
        save(model, folder / name, name=name)
        load(fresh_one, folder / name, name=name)
    return fresh_one


TOGETHER = {
    "as attached": lambda model, kind, folder: model,
    "switched on one by one": lambda model, kind, folder: switch(
        switch(switch(model), "german"), "german", "velan"
    ),
    "the other one detached": lambda model, kind, folder: detach(model, "velan"),
    "another in the place of the first": lambda model, kind, folder: moved(
        InvertibleAdapter().attach(detach(model, "velan"), name="again"), seed=5
    ),
    "another attached while one is off": lambda model, kind, folder: switch(
        moved(InvertibleAdapter().attach(switch(model, "german"), name="third"), seed=5),
        "third", "velan", "german",
    ),
    "loaded in another order": lambda model, kind, folder: loaded_onto(
        tiny_model(kind, dtype=F64), model, folder
    ),
    "copied": lambda model, kind, folder: copy.deepcopy(model),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", TOGETHER.values(), ids=TOGETHER)
def test_the_head_takes_back_what_all_of_them_have_changed(change, kind, tmp_path):
    """Where the blocks do nothing, it reads what it would read without any."""
    model = passing(change(two_languages(kind), kind, tmp_path))
    entered: list[Tensor] = []
    blocks(model)[1][0].register_forward_hook(lambda block, args, output: entered.append(args[0].detach()))
    expected = read_by_head(passing(tiny_model(kind, dtype=F64)), kind)
    torch.testing.assert_close(read_by_head(model, kind), expected, rtol=0, atol=1e-12)
    assert (entered[0] - expected).abs().max() > 0.1, "nothing was changed that could be taken back"


# ---- what it refuses


def albert() -> nn.Module:
    sizes = {"vocab_size": 97, "embedding_size": 8, "hidden_size": 24, "intermediate_size": 40}
    return hf.AlbertForMaskedLM(hf.AlbertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def opt() -> nn.Module:
    sizes = {"vocab_size": 97, "hidden_size": 24, "ffn_dim": 40, "word_embed_proj_dim": 12}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4))


def head_at(name: str) -> nn.Module:
    """A model that takes another layer for its output embeddings."""
    model = tiny_model("llama")
    model.get_output_embeddings = lambda: model.model.layers[1].get_submodule(name)
    return model


REFUSED = {
    "odd": (
        lambda: tiny_model("gpt2", width=21, heads=3),
        r"half by half, and the blocks of this GPT2LMHeadModel are 21 features wide; expected an even number",
    ),
    "called twice": (
        albert,
        r"the first block of a AlbertForMaskedLM, '[\w.]+', is called 2 times for a text. Adapter changes",
    ),
    "projected": (
        opt,
        r"those of this OPTForCausalLM read \[12\] and give 97 features, with 97 tokens and blocks of the width 24\. "
        r".*attach it to the body, model.base_model",
    ),
    "no head": (lambda: head_at("mlp.down_proj"), r"read \[40\] and give 24 features, with 97 tokens"),
    "no words": (lambda: head_at("self_attn.o_proj"), r"read \[24\] and give 24 features, with 97 tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), REFUSED.values(), ids=REFUSED)
def test_a_model_in_which_it_has_no_place_is_refused_and_left_as_it_was(make, says):
    model = make().eval()
    before = picture(model)
    for ask in (InvertibleAdapter().attach, InvertibleAdapter().count):
        with pytest.raises(ValueError, match=says):
            ask(model)
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_head_that_is_replaced_later_is_never_passed_by(kind):
    """A tied one is as large as the embeddings afterwards and the same module; another is a new one, without hooks."""
    model = moved(InvertibleAdapter().attach(fresh(kind)))
    inputs = {key: value for key, value in batch_of(kind).items() if key != "labels"}
    before, head = answer(model, inputs), model.lm_head
    model.resize_token_embeddings(105, mean_resizing=False)
    if head is model.lm_head:
        assert torch.equal(answer(model, inputs)[..., :97], before)
        return
    with pytest.raises(
        ValueError, match=r"this LlamaForCausalLM aren't those .* Replace them first and attach then"
    ):
        model(**inputs)
    learned = {name: t for name, t in tensors(model).items() if "invertible" in name}
    again = InvertibleAdapter().attach(detach(model))
    again.load_state_dict(learned, strict=False)
    torch.testing.assert_close(answer(again, inputs)[..., :97], before)


def test_the_body_of_a_refused_model_takes_it_as_the_message_says():
    body = opt().eval().model
    assert len(trainable(InvertibleAdapter().attach(body))) == 8
    assert attached(body)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bottleneck": 0}, r"bottleneck is 0; .*≥ 1"),
        ({"bottleneck": 2.5}, r"bottleneck is 2.5"),
        ({"init_std": 0.0}, r"init_std is 0.0; .*> 0"),
        ({"init_seed": -1}, r"init_seed is -1"),
        ({"modules_to_save": "score"}, r"modules_to_save is a string"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        InvertibleAdapter(**settings)


# ---- memory

OPTIONS = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "bert", "t5"])
def test_the_estimate_is_what_autograd_keeps(kind, dtype):
    model, method = model_for_memory(kind, dtype=dtype), InvertibleAdapter(bottleneck=40)
    estimated = memory.estimate(model, method, **OPTIONS, target_length=TARGET_LENGTH)
    method.attach(model)
    assert estimated == memory.estimate(model, **OPTIONS, target_length=TARGET_LENGTH)
    assert estimated.trained == method.count(model)
    measured = held(model, batch_for_memory(kind, 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_that_are_made_again_and_a_language_that_is_frozen(frozen):
    model = mad_x(model_for_memory("llama"), bottleneck=8)
    switch(model, "words", "task", train=("task",) if frozen else None)
    checkpointed(model, reentrant=True)
    estimated = memory.estimate(model, **OPTIONS)
    measured = held(model, batch_for_memory("llama", 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)
