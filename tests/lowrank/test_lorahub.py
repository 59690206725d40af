"""LoRAHub against HF PEFT's own adding up and dense formulas by torch.func; its search, with nevergrad and without."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from pefttutor import DoRA, LoRA, LoRAHub, as_lora, attached, detach, load, merge, save, switch, trainable
from tests.lowrank.peers import drawn
from tests.pictures import differences, picture

F64 = torch.float64
NAMES = tuple(f"task{i}" for i in range(12))


def plugged(model: nn.Module, names=NAMES, *, targets=("0",), r=2, **settings) -> nn.Module:
    """The model with LoRAs that have learned something."""
    for seed, name in enumerate(names):
        LoRA(r=r, target_modules=targets, **settings).attach(model, name=name)
        drawn(switch(model, name), seed=seed)
    return model


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 6)).double()


def deltas(model: nn.Module, names=NAMES) -> list[torch.Tensor]:
    return [attached(model)[name].parts[0].delta() for name in names]


def with_weights(model: nn.Module, w: torch.Tensor) -> nn.Module:
    model.lorahub_weights.data.copy_(w)
    return model


W = torch.linspace(-1.4, 1.5, len(NAMES), dtype=F64)


@pytest.mark.parametrize("combine", ["factors", "deltas"])
@pytest.mark.parametrize(("kind", "targets"), [("llama", ("q_proj", "v_proj")), ("gpt2", ("c_attn",))])
def test_twelve_plugins_of_a_causal_model_are_added_up_as_the_formula_says(
    tiny, batch, kind, targets, combine
):
    """Of the loss and of its gradient in the weights, by torch.func on weights that are put together densely."""
    base, inputs = tiny(kind, dtype=F64), batch(kind, dtype=F64)
    model = plugged(copy.deepcopy(base), targets=targets, lora_alpha=3)
    hub = LoRAHub(plugins=NAMES, combine=combine).attach(model)
    assert torch.equal(model(**inputs).logits, base(**inputs).logits)
    assert trainable(model) == {"lorahub_weights": 12}
    held = {n: t.detach() for n, t in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    paths = {n.rpartition(".")[0] for n in held}

    def loss(w):
        weights = {}
        for path in paths:
            As, Bs = ([held[f"{path}.lora_{x}@{name}"] for name in NAMES] for x in "AB")
            if combine == "factors":
                delta = sum(x * B for x, B in zip(w, Bs, strict=True)) @ sum(
                    x * A for x, A in zip(w, As, strict=True)
                )
            else:
                delta = sum(x * B @ A for x, A, B in zip(w, As, Bs, strict=True))
            own = base.get_submodule(path).weight.detach()
            weights[f"{path}.weight"] = own + 1.5 * (delta.t() if kind == "gpt2" else delta)
        return functional_call(base, weights, kwargs=inputs).loss

    found = with_weights(hub, W)(**inputs).loss
    torch.testing.assert_close(found.detach(), loss(W), rtol=1e-10, atol=1e-12)
    found.backward()
    torch.testing.assert_close(hub.lorahub_weights.grad, grad(loss)(W), rtol=1e-8, atol=1e-10)
    said = hub(**inputs).logits.detach()
    torch.testing.assert_close(merge(hub)(**inputs).logits, said, rtol=1e-9, atol=1e-10)


def test_the_sum_of_deltas_is_the_one_that_peft_adds_up(tiny, batch):
    """Its combination "cat" of plug-ins with the same weights; its "linear" takes roots, and is another sum."""
    base, inputs = tiny("llama", dtype=F64), batch("llama", dtype=F64)
    names, w = NAMES[:3], W[[2, 7, 11]].clone()
    model = plugged(copy.deepcopy(base), names, targets=("q_proj",), lora_alpha=3)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    parameters = dict(theirs.named_parameters())
    for key, tensor in model.named_parameters():
        if "@" in key:
            path, _, name = key.partition("@")
            parameters[f"base_model.model.{path}.{name}.weight"].data.copy_(tensor.data)
    theirs.add_weighted_adapter(list(names), w.tolist(), "sum", combination_type="cat")
    theirs.set_adapter("sum")
    hub = with_weights(LoRAHub(plugins=names, combine="deltas").attach(model), w)
    torch.testing.assert_close(hub(**inputs).logits, theirs(**inputs).logits, rtol=1e-6, atol=1e-7)


def test_factors_square_the_weights_mix_the_plugins_and_lose_a_sign():
    model = LoRAHub(plugins=("a", "b")).attach(plugged(net(), ("a", "b"), lora_alpha=4))
    part = attached(model)["default"].parts[1]
    one, two = deltas(model, ("a", "b"))
    for w in (0.5, -0.5):
        with_weights(model, torch.tensor([w, 0.0], dtype=F64))
        torch.testing.assert_close(part.delta(), 0.25 * one)
    with_weights(model, torch.tensor([0.5, 2.0], dtype=F64))
    A, B = ([getattr(model[0], f"lora_{x}@{name}") for name in "ab"] for x in "AB")
    crossed = 2 * 0.5 * 2.0 * (B[0] @ A[1] + B[1] @ A[0])  # s = 4 / 2
    torch.testing.assert_close(part.delta(), 0.25 * one + 4 * two + crossed)


def test_plugins_of_different_rank_are_added_up_as_deltas_and_become_one_lora():
    model = plugged(plugged(net(), ("a",), r=1), ("b",), r=3, lora_alpha=5)
    hub, x = LoRAHub(plugins=("a", "b"), combine="deltas").attach(model), torch.randn(5, 8, dtype=F64)
    with_weights(hub, torch.tensor([-0.7, 1.2], dtype=F64))
    one, two = deltas(model, ("a", "b"))
    torch.testing.assert_close(attached(model)["default"].parts[1].delta(), -0.7 * one + 1.2 * two)
    said = hub(x)
    assert max(as_lora(hub, r=4, name="default").values()) < 1e-6
    torch.testing.assert_close(hub(x), said, rtol=1e-5, atol=1e-6)


def test_a_file_holds_the_weights_alone_and_wants_the_same_plugins(tmp_path):
    x = torch.randn(5, 8, dtype=F64)
    model = with_weights(LoRAHub(plugins=NAMES).attach(plugged(net())), W)
    save(model, tmp_path, name="default")
    again = load(plugged(net()), tmp_path)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match=r"holds what computes with .*task0.*, and these were others"):
        load(drawn(plugged(net()), seed=40), tmp_path)
    detach(model, "default")
    assert list(attached(model)) == list(NAMES)


def test_kept_it_leaves_a_plain_model_without_the_plugins():
    x = torch.randn(5, 8, dtype=F64)
    model = with_weights(LoRAHub(plugins=NAMES).attach(plugged(net())), W)
    said = model(x)
    detach(model, keep=True)
    assert attached(model) == {}
    assert list(model.state_dict()) == list(net().state_dict())
    torch.testing.assert_close(model(x), said)


def test_a_plugin_of_another_base_is_refused_when_it_is_loaded(tmp_path):
    other = net()
    other[0].weight.data.add_(1)
    save(plugged(other, ("a",)), tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        load(net(), tmp_path, name="a")


# ---- the search


class Proposals:
    """An optimizer that proposes what it was given, and recommends the best."""

    def __init__(self, parametrization, budget):
        self.array, self.budget, self.told = parametrization, budget, []

    def ask(self):
        return SimpleNamespace(value=[0.1 * len(self.told)] * self.array.size)

    def tell(self, candidate, value):
        self.told.append((value, candidate))

    def provide_recommendation(self):
        assert len(self.told) == self.budget
        return min(self.told, key=lambda pair: pair[0])[1]


@pytest.fixture
def proposing(monkeypatch):
    """In nevergrad's place, so that the search is tested where that isn't installed."""
    made = []

    def array(init, lower, upper):
        made.append(
            SimpleNamespace(size=len(init), init=init, lower=lower, upper=upper, random_state=seeds())
        )
        return made[-1]

    def seeds():
        state = SimpleNamespace(seeded=None)
        state.seed = lambda number: setattr(state, "seeded", number)
        return state

    registry = {"NGOpt": Proposals}
    fake = SimpleNamespace(optimizers=SimpleNamespace(registry=registry), p=SimpleNamespace(Array=array))
    monkeypatch.setitem(sys.modules, "nevergrad", fake)
    return made


def distance(model: nn.Module) -> float:
    """From the function whose weights are all 0.3."""
    assert not model.training
    assert not torch.is_grad_enabled()
    return float((model.lorahub_weights - 0.3).square().mean())


def test_the_search_asks_tells_and_leaves_what_is_recommended(proposing):
    hub = LoRAHub(plugins=NAMES)
    model = hub.attach(plugged(net())).train()
    costs = hub.search(model, distance, steps=6, l1=0.1, seed=5)
    expected = [(0.1 * i - 0.3) ** 2 + 0.1 * 0.1 * i for i in range(6)]
    assert costs == pytest.approx(expected)
    assert hub.weights(model) == pytest.approx(dict.fromkeys(NAMES, 0.1 * expected.index(min(expected))))
    (asked,) = proposing
    assert (asked.init, asked.lower, asked.upper, asked.random_state.seeded) == ([0.0] * 12, -1.5, 1.5, 5)
    assert model.training


def test_a_search_that_fails_leaves_the_weights_as_they_were(proposing):
    hub = LoRAHub(plugins=NAMES)
    model = with_weights(hub.attach(plugged(net())), W).train()
    before = picture(model)
    losses = iter([1.0, float("nan")])
    for loss, settings, message in (
        (lambda model: next(losses), {}, "the loss was nan with the weights .*it must be finite"),
        (distance, {"steps": 0}, "steps is 0; it must be a whole number ≥ 1"),
        (distance, {"bound": 0}, "bound is 0; it must be a number > 0"),
        (distance, {"l1": -1}, "l1 is -1; it must be a number ≥ 0"),
        (
            distance,
            {"optimizer": "Adam"},
            "optimizer is 'Adam', which nevergrad doesn't have; take 'NGOpt' or 'Shiwa'",
        ),
        (distance, {"name": "task0"}, "'task0' is LoRA.*and not this method"),
    ):
        with pytest.raises(ValueError, match=message):
            hub.search(model, loss, **settings)
        assert differences(before, picture(model)) == []
    merge(model)
    with pytest.raises(RuntimeError, match="is merged with the weights it had"):
        hub.search(model, distance)


def test_without_nevergrad_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    hub = LoRAHub(plugins=NAMES)
    model = hub.attach(plugged(net()))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pefttutor\[search\]"'):
        hub.search(model, distance)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("optimizer", ["NGOpt", "Shiwa"])
def test_nevergrad_finds_weights_that_are_better_than_none(optimizer):
    pytest.importorskip("nevergrad")
    hub, x = LoRAHub(plugins=NAMES, combine="deltas"), torch.randn(16, 8, dtype=F64)
    model = hub.attach(plugged(net()))
    wanted = torch.zeros(12, dtype=F64)
    wanted[[2, 5]] = torch.tensor([1.0, -0.8], dtype=F64)
    expected = with_weights(model, wanted)(x).detach()
    with_weights(model, torch.zeros(12, dtype=F64))

    def loss(model):
        return (model(x) - expected).square().mean()

    first, costs = float(loss(model)), hub.search(model, loss, optimizer=optimizer)
    assert len(costs) == 40
    assert max(map(abs, hub.weights(model).values())) <= 1.5
    assert float(loss(model)) < first
    again = hub.search(model, loss, optimizer=optimizer)
    assert again == costs  # by its seed


# ---- memory, and what doesn't go together


@pytest.mark.parametrize("combine", ["factors", "deltas"])
def test_what_does_not_go_together_is_refused(combine):
    model = plugged(plugged(net(), ("a", "b")), ("high",), r=3)
    model.append(nn.Linear(6, 5).double())
    LoRA(r=2, target_modules=("0", "1")).attach(model, name="wide")
    DoRA(r=2, target_modules=("0",)).attach(model, name="dora")
    plugged(model, ("strong",), lora_alpha=64)
    before = picture(model)
    refused = [
        (
            (),
            r"plugins is empty; name those .* This model has \('a', 'b', 'high', 'wide', 'strong'\)",
        ),
        (("a", "nobody"), "nobody"),
        (("a", "wide"), "'a' and 'wide' stand at different layers: only one of them is at '1'"),
        (("a", "dora"), r"'dora' \(DoRA\) is no plain LoRA.*as_lora"),
    ]
    if combine == "factors":
        refused += [
            (("a", "high"), "at '0' the plug-in 'a' has the rank 2 and 'high' 3, .*take combine='deltas'"),
            (("a", "strong"), "at '0' the plug-in 'a' has the s 8 and 'strong' 32"),
        ]
    for names, message in refused:
        with pytest.raises(ValueError, match=message):
            LoRAHub(plugins=names, combine=combine).attach(model)
        assert differences(before, picture(model)) == []
    with pytest.raises(ValueError, match="plugins names 'a' twice"):
        LoRAHub(plugins=("a", "b", "a"))
    with pytest.raises(ValueError, match=r"plugins is a string; write \('a',\)"):
        LoRAHub(plugins="a")
    with pytest.raises(ValueError, match="combine is 'linear'; it must be one of 'factors', 'deltas'"):
        LoRAHub(plugins=("a",), combine="linear")
