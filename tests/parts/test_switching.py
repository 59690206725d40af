"""Several methods on one model: switched, merged and taken out, against HF PEFT's own model with several adapters."""

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch
from torch import nn

from pefttutor import (
    IA3,
    BitFit,
    DiffPruning,
    LoRA,
    Masking,
    SparseFineTuning,
    attached,
    detach,
    fit,
    merge,
    switch,
    trainable,
    unmerge,
)
from pefttutor.method import merged
from tests.cases import answer, gradients, loss_of, moved
from tests.pictures import differences, picture, tensors
from tests.tiny import rows_of, tiny_batch, tiny_model

F64 = torch.float64
GERMAN = LoRA(r=3, lora_alpha=7, target_modules=("q_proj", "v_proj"))
BANK = LoRA(r=2, lora_alpha=5, target_modules=("v_proj", "down_proj"), init_seed=4)
EXACT = {"rtol": 1e-9, "atol": 1e-11}


# ---- against HF PEFT: two LoRAs that share a layer, and the biases


@pytest.fixture(scope="module")
def ours() -> nn.Module:
    """A Llama-like model with three methods that have learned something."""
    model = tiny_model("llama", dtype=F64)
    GERMAN.attach(model, name="german")
    BANK.attach(model, name="bank")
    BitFit().attach(model, name="biases")
    return moved(model)


@pytest.fixture
def three(ours) -> nn.Module:
    return copy.deepcopy(ours)


class Theirs:
    """The same by HF PEFT, which has no BitFit: the biases of its base are set and frozen by hand."""

    def __init__(self, learned: nn.Module) -> None:
        from peft import LoraConfig, get_peft_model

        def config(method: LoRA) -> LoraConfig:
            targets = list(method.target_modules)
            return LoraConfig(
                r=method.r, lora_alpha=method.lora_alpha, target_modules=targets, lora_dropout=0.0
            )

        self.model = get_peft_model(tiny_model("llama", dtype=F64), config(GERMAN), adapter_name="german")
        self.model.add_adapter("bank", config(BANK))
        values = dict(learned.named_parameters())
        self.parameters = {}
        for name, p in self.model.named_parameters():
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            for adapter in ("german", "bank"):
                name = name.replace(f".{adapter}.weight", f"@{adapter}")
            self.parameters[name] = p
            if "lora_" in name:
                p.data.copy_(values[name])
        biases = [name for name in self.parameters if name.endswith("bias")]
        self.biases = {
            name: (self.parameters[name].data.clone(), values[name].data.clone()) for name in biases
        }

    def switch(self, *names: str) -> nn.Module:
        loras = [name for name in names if name != "biases"]
        if loras:
            self.model.base_model.set_adapter(loras)
        self.model.base_model.enable_adapter_layers() if loras else self.model.base_model.disable_adapter_layers()
        for name, p in self.parameters.items():
            if not loras or "lora_" not in name:
                p.requires_grad_("biases" in names and name in self.biases)
        for name, (base, learned) in self.biases.items():
            self.parameters[name].data.copy_(learned if "biases" in names else base)
        return self.model.base_model


def same_as_theirs(model: nn.Module, theirs: Theirs, active: tuple[str, ...]) -> None:
    inputs, other = tiny_batch("llama"), theirs.switch(*active)
    torch.testing.assert_close(answer(model, inputs), answer(other, inputs), **EXACT)
    if not active:
        assert trainable(model) == {}
        return
    found = gradients(model, loss_of(model, inputs))
    loss_of(other, inputs).backward()
    expected = {name: p.grad for name, p in theirs.parameters.items() if p.requires_grad}
    assert set(found) == set(expected)
    for name, grad in found.items():
        assert grad.abs().max() > (1e-18 if "k_proj.bias" in name else 1e-8), f"{name} gets no gradient"
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)
    other.zero_grad()


SUBSETS = [
    (), ("german",), ("bank",), ("biases",), ("german", "bank"), ("german", "biases"), ("german", "bank", "biases"),
]  # fmt: skip


@pytest.mark.parametrize("active", SUBSETS, ids=lambda names: "+".join(names) or "none")
def test_what_is_switched_on_gives_the_outputs_and_gradients_of_peft(three, active):
    theirs = Theirs(three)
    assert switch(three, *active) is three
    assert {name for name, a in attached(three).items() if a.active} == set(active)
    same_as_theirs(three, theirs, active)


def test_switching_to_and_fro_is_as_switching_once(three):
    theirs = Theirs(three)
    for active in (*SUBSETS, *reversed(SUBSETS)):
        switch(three, *active)
    for active in (("bank", "biases"), ("german", "bank", "biases")):
        same_as_theirs(switch(three, *active), theirs, active)


@pytest.mark.parametrize(
    "names", [("german",), ("german", "bank"), ("bank", "biases"), ("biases", "german", "bank")]
)
def test_merged_weights_and_outputs_are_those_of_peft(three, names):
    theirs, inputs = Theirs(three), tiny_batch("llama")
    expected, before = answer(three, inputs), picture(three)
    other = theirs.switch("german", "bank", "biases")
    merge(three, *names)
    other.merge_adapter(adapter_names=[name for name in names if name != "biases"])
    torch.testing.assert_close(answer(three, inputs), expected, **EXACT)
    own = dict(three.named_parameters())
    for name, p in theirs.parameters.items():
        torch.testing.assert_close(own[name], p, **EXACT, msg=name)
    assert [a.name for a in attached(three).values() if a.merged] == [
        n for n in attached(three) if n in names
    ]
    unmerge(three)
    assert not merged(three)
    assert differences(before, picture(three)) == []
    assert torch.equal(answer(three, inputs), expected)


@pytest.mark.filterwarnings("ignore:Adapter german was active which is now deleted:UserWarning:peft")
def test_one_taken_out_leaves_the_others_as_in_peft(three):
    theirs, other = Theirs(three), copy.deepcopy(three)
    detach(three, "german")
    theirs.model.delete_adapter("german")
    theirs.parameters = {name: p for name, p in theirs.parameters.items() if "@german" not in name}
    assert list(attached(three)) == ["bank", "biases"]
    assert not any("german" in name for name, _ in three.named_parameters())
    same_as_theirs(three, theirs, ("bank", "biases"))
    detach(other, "biases", "bank")
    assert list(attached(other)) == ["german"]
    same_as_theirs(other, Theirs(three_again(other)), ("german",))


def three_again(other: nn.Module) -> nn.Module:
    """What `Theirs` reads from, with the factors that are left; the others aren't looked at."""
    model = tiny_model("llama", dtype=F64)
    GERMAN.attach(model, name="german")
    BANK.attach(model, name="bank")
    left = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if name in left:
            p.data.copy_(left[name])
    return model


# ---- switching


def test_the_frozen_one_of_two_stacked_acts_and_does_not_learn(three):
    inputs = tiny_batch("llama")
    switch(three, "german", "bank")
    expected = gradients(three, loss_of(three, inputs))
    switch(three, "german", "bank", train=("bank",))
    assert set(trainable(three)) == {name for name in expected if name.endswith("@bank")}
    found = gradients(three, loss_of(three, inputs))
    assert set(found) == set(trainable(three))
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **EXACT)
    before = tensors(three)
    fit(three, rows_of(inputs), steps=2, lr=0.01, weight_decay=0.1)
    assert set(differences(before, tensors(three))) == set(found)
    assert set(trainable(switch(three, "german", "bank", train=()))) == set()
    assert set(trainable(switch(three, "german", "bank"))) == set(expected)


def test_switching_off_puts_the_base_back_and_on_what_was_learned(three):
    base, learned = tensors(tiny_model("llama", dtype=F64)), tensors(three)
    switch(three)
    assert differences(base, {n: t for n, t in tensors(three).items() if n in base}) == []
    inputs = tiny_batch("llama")
    assert torch.equal(answer(three, inputs), answer(tiny_model("llama", dtype=F64), inputs))
    switch(three, "german", "bank", "biases")
    assert differences(learned, tensors(three)) == []


@pytest.mark.parametrize("names", list(permutations(("german", "bank", "biases"))), ids="-".join)
def test_the_order_of_taking_out_does_not_matter(three, names):
    base = tensors(tiny_model("llama", dtype=F64))
    for i, name in enumerate(names):
        detach(three, name)
        assert set(attached(three)) == set(names[i + 1 :])
    assert differences(base, tensors(three)) == []


@pytest.mark.parametrize("act", [switch, merge, detach])
def test_a_name_that_is_not_there_is_told_with_those_that_are(three, act):
    before = picture(three)
    with pytest.raises(
        ValueError, match=r"nothing called 'english' .*'german' \(LoRA\), 'bank' \(LoRA\), 'biases' \(Bi"
    ):
        act(three, "german", "english")
    assert differences(before, picture(three)) == []


@pytest.mark.parametrize("train", [("bank",), "german", ("german", "english")])
def test_only_what_is_switched_on_can_train(three, train):
    before = picture(three)
    with pytest.raises(ValueError, match=r"expected some of the names that are switched on, \('german',\)"):
        switch(three, "german", train=train)
    assert differences(before, picture(three)) == []


@pytest.mark.parametrize("act", [switch, detach])
def test_a_plain_model_has_nothing_to_switch_or_take_out(act):
    with pytest.raises(RuntimeError, match="no method is attached to this model"):
        act(nn.Linear(2, 2))


def test_a_part_of_an_adapted_model_is_not_the_model(three):
    outer = nn.Sequential(three)
    for act in (switch, merge, unmerge, detach):
        with pytest.raises(ValueError, match="attached to the part '0' of this model"):
            act(outer)


def test_what_is_merged_is_neither_switched_off_nor_merged_again(three):
    merge(three, "german")
    before = picture(three)
    with pytest.raises(
        ValueError, match=r"'german' is merged into the weights: pefttutor\.unmerge\(model\) first"
    ):
        switch(three, "bank")
    with pytest.raises(RuntimeError, match="'german' is merged already"):
        merge(three, "bank", "german")
    with pytest.raises(RuntimeError, match="'bank' isn't merged"):
        unmerge(three, "german", "bank")
    assert differences(before, picture(three)) == []
    switch(three, "german")
    with pytest.raises(ValueError, match="'bank' is switched off"):
        merge(three, "bank")


# ---- methods that share a weight


def up(name: str, model: nn.Module) -> nn.Module:
    """One of five methods on the first block's first layer (and others, for gates), under its own name."""
    path = "blocks.0.up"
    every_second = torch.arange(12 * 8).remainder(2).bool().view(12, 8)
    {
        "lora": lambda: LoRA(r=2, target_modules=(path,)).attach(model, name=name),
        "scales": lambda: IA3(target_modules=(path,), feedforward_modules=()).attach(model, name=name),
        "mask": lambda: Masking(target_modules=(path,), init_sparsity=0.3).attach(model, name=name),
        "gates": lambda: DiffPruning().attach(model, name=name),
        "entries": lambda: SparseFineTuning().attach(model, {f"{path}.weight": every_second}, name=name),
    }[name]()
    return model


KINDS = ("lora", "scales", "mask", "gates", "entries")
PAIRS = list(permutations(KINDS, 2))
in_pairs = pytest.mark.parametrize("pair", PAIRS, ids="+".join)


def both(pair: tuple[str, str]) -> nn.Module:
    """A network of one's own with the two methods on one weight, which have learned something."""
    model = tiny_model("net")
    for name in pair:
        up(name, model)
    answer(moved(model), tiny_batch("net"))  # chosen entries are in their weights from here on
    return model


@in_pairs
def test_both_act_and_each_can_be_taken_out_alone(pair):
    x, model = tiny_batch("net"), both(pair)
    together = answer(model, x)
    for name, other in (pair, reversed(pair)):
        one = copy.deepcopy(model)
        alone = answer(switch(one, name), x)
        assert not torch.allclose(alone, together, atol=1e-3)
        detach(one, other)
        assert torch.equal(answer(one, x), alone)
        assert differences(tensors(tiny_model("net")), tensors(detach(one))) == []


@in_pairs
def test_both_switched_off_and_on_in_any_way_are_what_they_were(pair):
    model, x = both(pair), tiny_batch("net")
    together = answer(model, x)
    for names in ((pair[1],), (pair[0],), ()):
        switch(model, *names)
        for order in (pair, pair[::-1]):
            assert torch.equal(answer(switch(model, *order), x), together)
            switch(model, *names)


@in_pairs
@pytest.mark.parametrize("named", ["the first", "as attached", "the other way round", "not at all"])
def test_two_that_share_a_weight_are_merged_and_kept_only_if_both_are_added(pair, named):
    """Which comes first matters for what they compute, and the weight couldn't be told apart again."""
    names = {"the first": pair[:1], "as attached": pair, "the other way round": pair[::-1], "not at all": ()}[
        named
    ]
    model, x = both(pair), tiny_batch("net")
    before, expected = picture(model), answer(model, x)
    if set(pair) == {"lora", "scales"} and len(names) != 1:  # changes of one layer are folded in their order
        merge(model, *names)
        torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="unmerge both"):
            unmerge(model, pair[0])
        unmerge(model)
        assert differences(before, picture(model)) == []
        detach(model, *names, keep=True)
        torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
        assert list(model.state_dict()) == list(tiny_model("net").state_dict())
        return
    with pytest.raises(ValueError, match=r"share a weight and aren't simply added.*switch the other one off"):
        merge(model, *names)
    with pytest.raises(ValueError, match=r"share a weight and aren't simply added.*take the other one out"):
        detach(model, *names, keep=True)
    assert differences(before, picture(model)) == []
    assert torch.equal(answer(model, x), expected)


@in_pairs
def test_of_two_that_share_a_weight_each_is_merged_while_the_other_is_off(pair):
    model, x = both(pair), tiny_batch("net")
    for name in pair:
        switch(model, name)
        expected, before = answer(model, x), picture(model)
        merge(model)
        torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
        unmerge(model)
        assert differences(before, picture(model)) == []
        assert torch.equal(answer(model, x), expected)


def test_two_loras_on_one_layer_are_merged_and_kept_independently():
    model, x = up("lora", tiny_model("net")), tiny_batch("net")
    LoRA(r=3, target_modules=("up",), init_seed=5).attach(model, name="other")
    moved(model)
    expected = answer(model, x)
    for name in ("other", "lora"):
        merge(model, name)
        torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
    unmerge(model, "other")
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
    detach(model, "lora", keep=True)
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
    detach(model, "other")
    only = moved(up("lora", tiny_model("net")))
    for key in ("lora_A@lora", "lora_B@lora"):
        assert key not in dict(model.blocks[0].up.named_parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny_model("net").modules()]
    assert only is not model


@pytest.mark.parametrize("second", ["entries", "mask", "scales", "lora"])
def test_what_is_attached_while_another_is_merged_does_not_cost_a_bit_of_the_base(second):
    """Either it is refused, or both can be taken out again."""
    model = moved(up("lora" if second != "lora" else "scales", tiny_model("net")))
    merge(model)
    before = picture(model)
    try:
        up(second, model)
    except ValueError:
        assert differences(before, picture(model)) == []
    else:
        unmerge(model)
        moved(switch(model, second))
        answer(model, tiny_batch("net"))
    detach(model)
    assert differences(tensors(tiny_model("net")), tensors(model)) == []


@in_pairs
def test_what_is_switched_on_while_another_is_merged_is_refused_or_right(pair):
    model, x = both(pair), tiny_batch("net")
    expected = answer(model, x)
    merge(switch(model, pair[0]))
    before = picture(model)
    try:
        switch(model, *pair)
    except ValueError:
        assert differences(before, picture(model)) == []
    else:
        torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    torch.testing.assert_close(answer(switch(model, *pair), x), expected, rtol=1e-4, atol=1e-5)


@in_pairs
def test_what_was_kept_stays_when_one_that_was_off_is_switched_on_and_taken_out(pair):
    """Either keeping is refused while the other hangs on the same weight, or the other leaves what was kept alone."""
    model, x = both(pair), tiny_batch("net")
    expected = answer(switch(model, pair[0]), x)
    before = picture(model)
    try:
        detach(model, pair[0], keep=True)
    except ValueError:
        assert differences(before, picture(model)) == []
        return
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)
    switch(model, pair[1])
    answer(model, x)
    detach(model)
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-5)


def test_merging_what_is_off_or_nothing_changes_nothing():
    model = both(("lora", "entries"))
    before = picture(switch(model))
    merge(model)
    assert not merged(model)
    assert differences(before, picture(model)) == []
    with pytest.raises(RuntimeError, match="nothing to unmerge"):
        unmerge(model)


def test_merging_inside_autocast_is_refused():
    model = both(("lora", "scales"))
    before = picture(model)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="merge outside of it"),
    ):
        merge(model)
    assert differences(before, picture(model)) == []


def test_what_inference_mode_has_merged_or_kept_trains_all_the_same():
    """Tensors of inference mode could neither be trained nor kept for a backward pass."""
    model, batch = moved(GERMAN.attach(tiny_model("llama"), name="german")), tiny_batch("llama")
    with torch.inference_mode():
        merge(model)
    BitFit().attach(model, name="bias")
    assert gradients(model, loss_of(model, batch))
    with torch.inference_mode():
        detach(model, "bias")
        detach(model, keep=True)
    assert not any(p.is_inference() for p in model.parameters())
    assert len(gradients(model, loss_of(model, batch))) == len(list(model.parameters()))
