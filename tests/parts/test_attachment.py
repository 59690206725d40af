"""What a model carries, under which names: what can stand side by side, is saved by its name, and trains together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor import (
    IA3,
    PASTA,
    BitFit,
    LastLayers,
    LayerNormTuning,
    LoRA,
    SparseFineTuning,
    adapted,
    attached,
    detach,
    fit,
    load,
    merge,
    save,
    switch,
    trainable,
    unmerge,
)
from pefttutor.method import find, trained_by
from pefttutor.parts.attachment import added_key, base_of, check_apart
from pefttutor.parts.fingerprint import describe_base
from tests.cases import answer, moved
from tests.pictures import differences, picture, tensors
from tests.tiny import Quantised, class_examples, llama_classifier, rows_of, tiny_batch, tiny_model


def chosen(model: nn.Module, *names: str, start: int = 0) -> dict[str, torch.Tensor]:
    """Every second entry of the tensors of these names, from `start` on."""
    return {n: torch.arange(start, model.get_parameter(n).numel(), 2) for n in names}


UP = "blocks.0.up.weight"


def net(*attach) -> nn.Module:
    """A network of one's own with methods that have learned something."""
    model = tiny_model("net")
    for one in attach:
        one(model)
    answer(moved(model), tiny_batch("net"))
    return model


def lora(model: nn.Module, name: str = "lora") -> nn.Module:
    return LoRA(r=2, target_modules=("up", "down")).attach(model, name=name)


def sparse(model: nn.Module, name: str = "sparse", start: int = 0) -> nn.Module:
    return SparseFineTuning().attach(model, chosen(model, UP, start=start), name=name)


# ---- names


@pytest.mark.parametrize("name", ["", "two words", "a.b", "a@b", "ü", None, 3, "x\n"])
def test_a_name_is_letters_digits_and_dashes(name):
    model = tiny_model("net")
    before = picture(model)
    with pytest.raises(ValueError, match=r"name is .*; expected letters, digits, _ and -, such as 'german'"):
        BitFit().attach(model, name=name)
    assert differences(before, picture(model)) == []


def test_a_name_that_is_taken_says_who_has_it_and_what_to_do():
    model = net(lora)
    before = picture(model)
    with pytest.raises(
        ValueError, match=r"carries 'lora' \(LoRA\(.*\)\)\. Give another name.*detach\(model, 'lora'\)"
    ):
        BitFit().attach(model, name="lora")
    assert differences(before, picture(model)) == []


def test_the_same_method_twice_under_two_names_is_two_attachments():
    model = lora(lora(tiny_model("net"), "one"), "two")
    assert adapted(model, "one") == adapted(model, "two")
    assert len(trainable(model)) == 2 * len(trainable(lora(tiny_model("net"))))
    torch.testing.assert_close(
        *(answer(m, tiny_batch("net")) for m in (moved(detach(model, "one")), net(lora)))
    )


def test_the_default_name_is_left_out_of_the_keys_and_others_are_behind_an_at():
    assert added_key("lora_A", "default") == "lora_A"
    assert added_key("lora_A", "german") == "lora_A@german"
    model = lora(lora(tiny_model("net"), "default"), "german")
    assert set(trainable(model)) >= {"blocks.0.up.lora_A", "blocks.0.up.lora_A@german"}


def test_what_is_attached_can_be_asked_by_name_in_the_order_of_attaching():
    model = net(sparse, lora)
    assert list(attached(model)) == ["sparse", "lora"]
    assert isinstance(adapted(model), SparseFineTuning)
    assert isinstance(adapted(model, "lora"), LoRA)
    assert find(model, "lora").learns
    with pytest.raises(
        ValueError, match=r"nothing called 'x' is attached to this model; it carries 'sparse' \(Sparse"
    ):
        adapted(model, "x")
    with pytest.raises(
        ValueError, match=r"this model carries 'sparse' .*'lora' \(LoRA\): say which one by its name"
    ):
        find(model)
    with pytest.raises(ValueError, match="no method is attached"):
        find(nn.Linear(2, 2))
    assert attached(nn.Linear(2, 2)) == {}
    assert adapted(nn.Linear(2, 2)) is None


def test_a_method_that_is_attached_trains_its_own_and_any_other_all():
    model = net(lora, sparse)
    assert {id(p) for p in trained_by(model, adapted(model, "sparse"))} == {
        id(model.blocks[0].up.get_parameter("weight_values@sparse"))
    }
    assert len(trained_by(model, BitFit())) == len(trainable(model))
    switch(model, "lora", "sparse", train=("lora",))
    assert trained_by(model, adapted(model, "sparse")) == []


# ---- what can't stand side by side


def test_two_that_change_one_tensor_in_place_are_refused_until_one_is_off():
    model = net(sparse)
    before = picture(model)
    message = (
        r"'sparse' \(Sparse.*\) and 'other' \(Sparse.*\) would both change 'blocks\.0\.up\.weight' in place"
    )
    with pytest.raises(ValueError, match=message):
        sparse(model, "other", start=1)
    assert differences(before, picture(model)) == []
    first = answer(model, tiny_batch("net"))
    sparse(switch(model), "other", start=1)
    answer(moved(model, seed=4), tiny_batch("net"))
    second = answer(model, tiny_batch("net"))
    for names, expected in ((("sparse",), first), (("other",), second), (("sparse",), first)):
        assert torch.equal(answer(switch(model, *names), tiny_batch("net")), expected)
    before = picture(model)
    with pytest.raises(ValueError, match="would both change"):
        switch(model, "sparse", "other")
    assert differences(before, picture(model)) == []
    assert differences(tensors(tiny_model("net")), tensors(detach(model))) == []


@pytest.mark.parametrize(
    "second", [BitFit(), LastLayers(fraction=0.5), LayerNormTuning(modules_to_save=("classifier",))], ids=str
)
def test_a_head_that_two_would_train_is_refused_whatever_else_they_train(second):
    model = LoRA(r=2, target_modules=("up",), modules_to_save=("classifier", "norm", "blocks.1.down")).attach(
        tiny_model("net"), name="first"
    )
    before = picture(model)
    with pytest.raises(
        ValueError, match=r"'first' \(LoRA\) and 'second' .* would both change '.*' in place \(\d+ such"
    ):
        second.attach(model, name="second")
    assert differences(before, picture(model)) == []
    check_apart(
        vars(model)["_pefttutor"], find(BitFit().attach(tiny_model("net")))
    )  # of another model: apart


def test_learned_bits_come_back_and_base_bits_too_whatever_is_switched_between():
    model, base = net(sparse, lora), tensors(tiny_model("net"))
    learned = tensors(model)
    for names in ((), ("lora",), ("sparse",), ("lora", "sparse")):
        switch(model, *names)
        now = tensors(model)
        on_the_weight = learned if "sparse" in names else base
        assert torch.equal(now[UP], on_the_weight[UP])
    assert differences(learned, tensors(model)) == []


# ---- training


def test_fit_trains_all_that_are_on_and_nothing_else():
    def off(model):
        LayerNormTuning().attach(model, name="norms")
        moved(model)
        switch(model, "lora", "sparse")

    model, rows = tiny_model("net"), rows_of(tiny_batch("net"))
    lora(model), sparse(model), off(model)
    norms = [part.learned for part in find(model, "norms").parts]
    before = tensors(model)
    fit(model, rows, steps=3, lr=0.05, weight_decay=0.1, loss=cross_entropy)
    changed = set(differences(before, tensors(model)))
    assert changed == {*trainable(model), UP}
    assert all("lora" in name or "sparse" in name for name in trainable(model))
    outside = torch.arange(1, 12 * 8, 2)
    assert torch.equal(tensors(model)[UP].flatten()[outside], before[UP].flatten()[outside])
    assert all(torch.equal(a, b) for one, part in zip(norms, find(model, "norms").parts, strict=True)
               for a, b in zip(one, part.learned, strict=True))  # fmt: skip
    detach(model)
    assert differences(tensors(tiny_model("net")), tensors(model)) == []


def cross_entropy(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def test_two_trained_together_take_the_steps_of_one_optimizer_over_both():
    model, rows = tiny_model("net"), rows_of(tiny_batch("net"))
    lora(model), sparse(model)
    twin, loss = copy.deepcopy(model).train(), None
    fit(model, rows, steps=3, batch_size=3, lr=0.05, warmup=0, schedule="constant", max_grad_norm=None,
        loss=cross_entropy)  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        loss = cross_entropy(twin, tiny_batch("net"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, size in trainable(twin).items():
        assert size > 0
        torch.testing.assert_close(model.get_parameter(name), twin.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_two_sparse_ones_switched_in_turns_learn_as_each_alone():
    rows, turns = rows_of(tiny_batch("net")), {"sparse": 0, "other": 1}
    model = tiny_model("net")
    for name, start in turns.items():
        sparse(switch(model) if attached(model) else model, name, start)
    for name in turns:
        fit(switch(model, name), rows, steps=2, lr=0.05, loss=cross_entropy)
    for name, start in turns.items():
        alone = sparse(tiny_model("net"), name, start)
        fit(alone, rows, steps=2, lr=0.05, loss=cross_entropy)
        switch(model, name)
        assert (
            differences(tensors(alone), {n: t for n, t in tensors(model).items() if n in tensors(alone)})
            == []
        )


# ---- saving by name


def test_each_is_saved_by_its_name_and_loaded_beside_others_under_any(tmp_path):
    model, x = net(lora, sparse), tiny_batch("net")
    with pytest.raises(ValueError, match="say which one by its name"):
        save(model, tmp_path / "which")
    assert not (tmp_path / "which").exists()
    for name in ("lora", "sparse"):
        save(model, tmp_path / name, name=name)
    with pytest.raises(ValueError, match="nothing called 'german'"):
        save(model, tmp_path / "which", name="german")
    for order in (("lora", "sparse"), ("sparse", "lora")):
        again = tiny_model("net")
        for name in order:
            assert load(again, tmp_path / name, name=f"{name}-again") is again
        assert list(attached(again)) == [f"{name}-again" for name in order]
        assert torch.equal(answer(again, x), answer(model, x))
    alone = load(tiny_model("net"), tmp_path / "sparse")
    assert list(attached(alone)) == ["default"]
    assert torch.equal(answer(alone, x), answer(switch(model, "sparse"), x))


def test_a_name_in_use_is_not_loaded_over(tmp_path):
    model = net(lora)
    save(model, tmp_path)
    before = picture(model)
    with pytest.raises(ValueError, match=r"already adapted: it carries 'lora' \(LoRA"):
        load(model, tmp_path, name="lora")
    assert differences(before, picture(model)) == []


def test_what_is_merged_or_off_is_not_saved(tmp_path):
    model = net(lora)
    with pytest.raises(
        RuntimeError, match=r"'lora' is switched off.*pefttutor.switch\(model, 'lora'\) first"
    ):
        save(switch(model), tmp_path / "a")
    with pytest.raises(RuntimeError, match="merged"):
        save(merge(switch(model, "lora")), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_base_is_described_as_it_was_before_any_of_them():
    base = describe_base(tiny_model("net"), without=())
    model = net(
        lambda m: LoRA(r=2, target_modules=("down",)).attach(m, name="low"),
        sparse,
        lambda m: BitFit().attach(m, name="biases"),
    )
    assert base_of(model, without=()) == base
    merge(model)
    assert base_of(model, without=()) == base
    unmerge(model)
    assert base_of(switch(model), without=()) == base
    without = base_of(model, without=("classifier.weight",))
    assert without == {name: values for name, values in base.items() if name != "classifier.weight"}


def test_one_is_loaded_onto_a_base_that_another_has_changed_in_place(tmp_path):
    save(net(lora), tmp_path / "lora", name="lora")
    model = net(sparse)
    load(model, tmp_path / "lora", name="lora")
    assert torch.equal(answer(model, tiny_batch("net")), answer(together(model), tiny_batch("net")))
    kept = detach(net(sparse), keep=True)  # now it is another base
    with pytest.raises(
        ValueError, match=r"trained on another base model\. In this one blocks.0.up.weight has other val"
    ):
        load(kept, tmp_path / "lora", name="lora")


def together(model: nn.Module) -> nn.Module:
    """Both attached at once, with the values of `model`."""
    other = sparse(lora(tiny_model("net")))
    values = dict(model.named_parameters())
    for name, p in other.named_parameters():
        p.data.copy_(values[name])
    return other


# ---- LoRA on a quantised layer


@pytest.fixture
def quantised() -> nn.Module:
    model = tiny_model("net").double()
    model.blocks[0].up = Quantised(model.blocks[0].up)
    return model


def test_on_a_quantised_layer_outputs_and_gradients_are_those_of_the_dense_formula(quantised):
    model, x = quantised, torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = model.blocks[0].up
    LoRA(r=3, lora_alpha=7, target_modules=("up",)).attach(model)
    moved(model)
    assert set(trainable(model)) == {f"blocks.{i}.up.lora_{x}" for i in (0, 1) for x in "AB"}
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    A, B = (layer.get_parameter(f"lora_{key}").detach().clone().requires_grad_() for key in "AB")
    weights = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 12)
    expected = F.linear(x2, layer.dense_weight() + 7 / 3 * B @ A, layer.bias)
    found = layer(x1)
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in ((x1, x2), (layer.lora_A, A), (layer.lora_B, B)):
        torch.testing.assert_close(one.grad, other.grad)
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2, target_modules=("up",)), IA3(target_modules=("up",), feedforward_modules=()),
     IA3(target_modules=("up",), feedforward_modules=("up",))],
    ids=["LoRA", "IA3 on the output", "IA3 on the input"],
)  # fmt: skip
def test_on_a_quantised_layer_merging_is_refused_with_the_reason_and_the_rest_works(
    quantised, method, tmp_path
):
    base, x = copy.deepcopy(quantised), tiny_batch("net", dtype=torch.float64)
    model = moved(method.attach(quantised))
    expected, before = answer(model, x), picture(model)
    for act in (merge, lambda model: detach(model, keep=True)):
        with pytest.raises(
            ValueError, match=r"can't be merged: 'blocks.0.up' keeps its weight in a form .*quantised"
        ):
            act(model)
    assert differences(before, picture(model)) == []
    save(model, tmp_path)
    assert torch.equal(answer(load(copy.deepcopy(base), tmp_path), x), expected)
    assert torch.equal(answer(copy.deepcopy(model), x), expected)
    assert torch.equal(answer(switch(model), x), answer(base, x))
    assert differences(tensors(base), tensors(detach(model))) == []
    assert type(model.blocks[0].up) is Quantised


def test_all_linear_finds_a_quantised_layer(quantised):
    model = LoRA(r=2, target_modules="all-linear").attach(quantised)
    assert "blocks.0.up.lora_A" in trainable(model)


# ---- two of the same kind of hook


def test_two_pastas_count_their_own_tokens():
    inputs = {"input_ids": torch.tensor([[1, 7, 8, 2, 9], [1, 20, 30, 5, 2]])}
    model = llama_classifier()
    for name, tokens in (("starts", (1,)), ("ends", (2,))):
        PASTA(special_token_ids=tokens, num_special=1).attach(model, name=name)
    moved(model)
    both = answer(model, inputs)
    for name in ("starts", "ends"):
        alone = answer(switch(copy.deepcopy(model), name), inputs)
        assert not torch.equal(alone, both)
    assert torch.equal(answer(switch(model), inputs), answer(llama_classifier(), inputs))
    assert torch.equal(answer(switch(model, "starts", "ends"), inputs), both)


def test_one_that_fails_while_another_is_there_leaves_that_one_whole():
    model = moved(LoRA(r=2).attach(llama_classifier(), name="german"))
    before = picture(model)
    for act in (
        lambda: PASTA(special_token_ids=(1,), modules_to_save=("nowhere",)).attach(model, name="b"),
        lambda: LoRA(r=2, modules_to_save=("nowhere",)).attach(model, name="b"),
        lambda: SparseFineTuning().attach(model, {"score.weight": torch.zeros(3, 16).bool()}, name="b"),
    ):
        with pytest.raises(ValueError, match=r"nowhere|no entry is chosen"):
            act()
    assert differences(before, picture(model)) == []
    fit(model, class_examples(6), steps=1)
