"""What every method must hold, on every architecture: its life from attaching to being taken out again.

A cell is a method on an architecture. How the method is made there, what then trains, and what it can't do, stands in
tests/cases.py and nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import pefttutor as pt
from pefttutor.method import DEFAULT, Counts, Method, trained_by
from pefttutor.parts.blocks import blocks
from pefttutor.parts.entries import entries
from pefttutor.parts.linear import sizes
from pefttutor.parts.part import of_kind
from pefttutor.parts.weight_delta import WeightDelta
from pefttutor.train.hooks import Hooks
from pefttutor.train.losses import causal_lm_loss
from tests.cases import (
    ARCHITECTURES,
    BEFORE,
    CANNOT,
    CASES,
    DECODERS,
    HEAD_WEIGHTS,
    HEADS,
    ITS_OWN_CACHES,
    LEARNS_STATISTICS,
    LOOKED_AT,
    NO_SLOPE,
    SPECIAL,
    STARTS_OTHERWISE,
    TEXTS,
    TRAINS_NOTHING,
    WRITERS,
    answer,
    attach,
    attached_to,
    base_answer,
    base_of,
    batch_of,
    beneath,
    everything,
    fresh,
    gradients,
    learned_on,
    logits_of,
    looked_at,
    loss_of,
    moved,
    prepared,
    said,
    starts_otherwise,
)
from tests.pictures import differences, ours, picture, tensors
from tests.tiny import KINDS, checkpointed

BF16, F64 = torch.bfloat16, torch.float64
CELLS = [(name, kind) for name in CASES for kind in ARCHITECTURES if (name, kind) not in CANNOT]
REFUSED = [cell for cell in CANNOT if cell[1] in ARCHITECTURES]


def cells(*kinds: str, learns: bool = False) -> pytest.MarkDecorator:
    """Every method on these architectures, or on all, without those that it refuses; with `learns`, if it trains."""
    chosen = [(name, kind) for name, kind in CELLS if not kinds or kind in kinds]
    chosen = [cell for cell in chosen if not learns or cell[0] not in TRAINS_NOTHING]
    return pytest.mark.parametrize(("name", "kind"), chosen, ids=["-".join(cell) for cell in chosen])


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Small models gain nothing from a second thread, and what is imported isn't worth collecting again and again."""
    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)  # a copied model is some thousand objects
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    torch.set_num_threads(threads)


# ---- the table


def test_every_method_of_the_package_has_its_line():
    there, listed = set(pt.methods()), set(CASES)
    lines = [f'"{name}": Case(lambda kind: pt.{name}(…), what trains, sources),' for name in there - listed]
    assert not lines, "add to CASES in tests/cases.py:\n" + "\n".join(sorted(lines))
    assert listed <= there, f"CASES has lines for what isn't a method: {listed - there}"


def test_nothing_is_declared_that_no_test_asks():
    asked = {(name, where) for name in CASES for where in (*ARCHITECTURES, "merge")}
    assert set(CANNOT) <= asked
    assert [n for n in CASES if CASES[n].trains("llama", base_of("llama"), CASES[n].make("llama")) == {}] == [
        *TRAINS_NOTHING
    ]
    assert set(STARTS_OTHERWISE) | set(NO_SLOPE) | set(LEARNS_STATISTICS) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_method_is_frozen_settings_and_nothing_else(name):
    method = CASES[name].make("bert")
    assert isinstance(method, Method)
    assert method == CASES[name].make("bert")
    with pytest.raises(AttributeError):
        method.anything = 1


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=map("-".join, REFUSED))
def test_what_a_method_refuses_it_says_and_the_model_is_unchanged(name, kind):
    model = fresh(kind)
    before = picture(model)
    with pytest.raises(ValueError, match=CANNOT[name, kind]):
        attach(name, kind, model)
    assert differences(before, picture(model)) == []


# ---- at the start


def otherwise(name: str, kind: str) -> str | None:
    return starts_otherwise(name, CASES[name].make(kind))


@cells()
def test_an_attached_method_starts_as_the_base_bit_for_bit(name, kind):
    found = answer(attached_to(name, kind), batch_of(kind))
    assert torch.equal(found, base_answer(kind)) is (not otherwise(name, kind))
    assert not torch.equal(said(name, kind), base_answer(kind))


@cells("llama")
@pytest.mark.parametrize("without", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"])
def test_attached_where_gradients_are_switched_off_it_trains_elsewhere(name, kind, without):
    model = fresh(kind)
    with without():
        attach(name, kind, model)
    assert not any(p.is_inference() for p in model.parameters())
    if name not in TRAINS_NOTHING:
        assert gradients(model, loss_of(model, batch_of(kind)))


@cells()
def test_exactly_that_trains_which_the_closed_formula_says(name, kind):
    model, method = attached_to(name, kind), CASES[name].make(kind)
    expected = CASES[name].trains(kind, base_of(kind), method)
    if isinstance(expected, int):  # so many entries, of those tensors in which some are chosen
        chosen = {f"{weight}_values": len(index) for weight, index in entries(model).items()}
        assert sum(chosen.values()) == expected
        expected = chosen
    assert pt.trainable(model) == expected
    assert pt.adapted(model, DEFAULT) == method
    if isinstance(method, Counts):
        assert method.count(prepared(name, kind)) == method.count(model) == sum(expected.values())


# ---- training


OPTIMIZERS = {
    "sgd": lambda trained: torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda trained: torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1),
}


def train(model: nn.Module, inputs: dict[str, Tensor], optimizer: str, steps: int = 3) -> set[str]:
    """A loop of one's own, which asks the hooks; returned is what got a gradient. All is given to the optimizer."""
    hooks, step, learned = Hooks(model), OPTIMIZERS[optimizer](model.parameters()), set()
    model.train()
    for number in range(steps):
        (loss_of(model, inputs) + hooks.penalty()).backward()
        hooks.after_backward(number)
        learned |= {n for n, p in model.named_parameters() if p.grad is not None}
        step.step()
        hooks.after_step(number)
        step.zero_grad()
    model.eval()
    return learned


@cells()
def test_three_steps_of_each_optimizer_leave_every_frozen_bit_alone(name, kind):
    """First with SGD, then with AdamW, both with weight decay; what trains gets a gradient, and moves."""
    model, base = attached_to(name, kind), beneath(name, kind)
    before, trains = tensors(model), set(pt.trainable(model))
    for optimizer in OPTIMIZERS:
        assert train(model, batch_of(kind), optimizer) == trains
        assert_only_what_trains_has_moved(model, base, before, statistics=name in LEARNS_STATISTICS)


def assert_only_what_trains_has_moved(
    model: nn.Module, base: set[str], before: dict[str, Tensor], *, statistics: bool
) -> None:
    """What trains has, and of the base's other tensors not a bit, but for chosen entries."""
    after, chosen = tensors(model), entries(model)
    changed = set(differences(before, after))
    assert set(pt.trainable(model)) <= changed
    every = dict(model.named_parameters(remove_duplicate=False))  # a tied one by each of its names
    names = {id(p): n for n, p in model.named_parameters()}
    free = {n for n, p in every.items() if p.requires_grad}
    free |= {n for n, _ in model.named_buffers()} if statistics else set()
    for weight in (changed & base) - free:
        index = chosen.get(names.get(id(every.get(weight))))
        assert index is not None, f"{weight} is frozen and has changed"
        outside = torch.ones(after[weight].numel()).index_fill_(0, index.long(), 0).bool()
        assert torch.equal(after[weight].flatten()[outside], before[weight].flatten()[outside])


@cells(*KINDS, learns=True)
def test_checkpointing_gives_every_gradient_reentrant_or_not(name, kind):
    model, inputs, found = learned_on(name, kind).train(), batch_of(kind), []
    for reentrant in (None, True, False):
        if reentrant is not None:
            checkpointed(model, reentrant=reentrant)
        torch.manual_seed(3)  # a gate may be drawn
        found.append(gradients(model, loss_of(model, inputs)))
    assert set(found[0]) == set(pt.trainable(model))
    for one in found[1:]:
        assert one.keys() == found[0].keys()
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-6)


@cells(learns=True)
def test_next_to_bfloat16_it_starts_as_the_base_and_learns(name, kind):
    model, base, inputs = attached_to(name, kind, BF16), base_of(kind, BF16), batch_of(kind, dtype=BF16)
    assert torch.equal(answer(model, inputs), base_answer(kind, BF16)) is (not otherwise(name, kind))
    before = tensors(model)
    learned = train(model, inputs, "adamw", steps=1)
    assert learned == set(pt.trainable(model))
    changed = set(differences(before, tensors(model)))
    assert len(learned & changed) > 0.9 * len(learned)
    assert all(p.isfinite().all() for p in model.parameters())
    others = learned | (beneath(name, kind) - set(tensors(base)))  # what it stands on is no part of the base
    assert {p.dtype for n, p in model.named_parameters() if n in before and n not in others} <= {BF16}
    pt.detach(model)
    assert differences(tensors(base), tensors(model)) == []


@cells("llama", "gpt2", learns=True)
def test_a_small_change_of_a_weight_stays_what_it_is_under_autocast(name, kind):
    """Half precision rounds each number by some thousandths; a difference of weights would be gone with that."""
    model = attached_to(name, kind)
    parts = [part for a in pt.attached(model).values() for part in of_kind(a.parts, WeightDelta)]
    if not parts:
        pytest.skip("it adds no change to a weight")
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_by(model, pt.attached(model)[DEFAULT].method):
        parameter.data.add_(1e-4 * torch.randn(parameter.shape, generator=generator))
    for part in parts:
        x = torch.randn(9, sizes(part.layer)[0], generator=generator)
        exact = part.product(x)
        with torch.autocast("cpu", dtype=BF16):
            assert (part.product(x) - exact).norm() < 0.02 * exact.norm()


class _Reached(Exception):
    """The block on the other device has been run."""


@cells("llama", "bert")
def test_a_block_on_another_device_finds_there_what_it_needs(name, kind):
    """The meta device stands for a second card; what moves the hidden states comes after the method's own hooks."""
    model = attached_to(name, kind)
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("it adds nothing to a block")
    block = blocks(model)[1][1].to("meta")

    def moved_on(value):
        if isinstance(value, tuple):
            return tuple(map(moved_on, value))
        return value.to("meta") if isinstance(value, Tensor) else value

    def bring(module, args, kwargs):
        return moved_on(args), {key: moved_on(value) for key, value in kwargs.items()}

    def leave(module, args, output):
        raise _Reached

    block.register_forward_pre_hook(bring, with_kwargs=True)
    block.register_forward_hook(leave)
    with pytest.raises(_Reached):
        model.train()(**batch_of(kind))


SMALLEST = [  # each of these has a head called classifier
    (name, next(kind for kind in ("net", "bert", "vit") if (name, kind) in CELLS))
    for name in CASES
    if name not in TRAINS_NOTHING
]
on_the_smallest = pytest.mark.parametrize(
    ("name", "kind"), SMALLEST, ids=["-".join(cell) for cell in SMALLEST]
)


@on_the_smallest
def test_the_gradient_is_the_slope_of_the_loss(name, kind):
    """Against a central difference in float64, in a direction in which all that trains moves."""
    model, inputs = moved(attached_to(name, kind, F64)), batch_of(kind, dtype=F64)
    found = gradients(model, loss_of(model, inputs))
    generator = torch.Generator().manual_seed(4)
    start = {n: model.get_parameter(n).detach().clone() for n in found}
    way = {n: torch.randn(p.shape, generator=generator, dtype=F64) for n, p in start.items()}
    losses = []
    for length in (1e-6, -1e-6):
        for n, p in start.items():
            model.get_parameter(n).data.copy_(p + length * way[n])
        with torch.no_grad():
            losses.append(loss_of(model, inputs).item())
    slope = sum((grad * way[n]).sum().item() for n, grad in found.items())
    assert abs(slope) > 1e-3
    expected = pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)
    assert (slope == expected) is (name not in NO_SLOPE)


@pytest.mark.parametrize("name", TRAINS_NOTHING)
def test_what_trains_nothing_says_so_when_it_is_to_be_trained_or_saved(name, tmp_path):
    model = attached_to(name, "llama")
    before = picture(model)
    with pytest.raises(ValueError, match="nothing trains"):
        pt.fit(model, [batch_of("llama")], steps=1)
    with pytest.raises(ValueError, match="trains nothing, so there is nothing to save"):
        pt.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert differences(before, picture(model)) == []


# ---- files and copies


@cells(learns=True)
def test_saved_and_loaded_onto_a_fresh_base_it_gives_identical_outputs(name, kind, tmp_path):
    model = looked_at(name, kind)
    pt.save(model, tmp_path, name=DEFAULT)
    again = pt.load(prepared(name, kind), tmp_path)
    assert torch.equal(answer(again, batch_of(kind)), said(name, kind))
    assert pt.trainable(again) == pt.trainable(model)
    assert differences(tensors(model), tensors(again)) == []


@cells(learns=True)
def test_a_copy_shares_nothing_and_can_be_detached_alone(name, kind):
    model, inputs = looked_at(name, kind), batch_of(kind)
    twin, before = copy.deepcopy(model), picture(model)
    assert torch.equal(answer(twin, inputs), said(name, kind))
    assert not torch.equal(answer(moved(twin, seed=5), inputs), said(name, kind))
    pt.detach(twin)
    assert differences(tensors(base_of(kind)), tensors(twin)) == []
    assert differences(before, picture(model)) == []


@cells("gpt2", "bert", "net")
def test_a_pickled_model_comes_back_whole(name, kind):
    model = looked_at(name, kind)
    again = pickle.loads(pickle.dumps(model))
    assert differences(tensors(model), tensors(again)) == []
    assert torch.equal(answer(again, batch_of(kind)), said(name, kind))
    assert pt.adapted(again) == pt.adapted(model)
    pt.detach(again)
    assert differences(tensors(base_of(kind)), tensors(again)) == []


# ---- folding in, and taking out


def folds(name: str, act, model: nn.Module) -> bool:
    """Let `act` fold the method into the weights; False if it says that it can't, as declared, and changes nothing."""
    if (name, "merge") not in CANNOT:
        act(model)
        return True
    before = picture(model)
    with pytest.raises(ValueError, match=CANNOT[name, "merge"]):
        act(model)
    assert differences(before, picture(model)) == []
    return False


@cells()
def test_merged_it_computes_the_same_and_unmerged_every_bit_is_back(name, kind):
    model = looked_at(name, kind)
    sides, before = ("right", "left") if kind in TEXTS else ("right",), picture(model)
    expected = [said(name, kind, side) for side in sides]
    if not folds(name, pt.merge, model):
        return
    found = [answer(model, batch_of(kind, side)) for side in sides]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="merged already"):
        pt.merge(model)
    pt.unmerge(model)
    assert differences(before, picture(model)) == []


@cells()
def test_detaching_leaves_the_model_as_it_was_before(name, kind):
    without = base_answer(kind)  # first: a classifier's first loss writes its kind of labels into its config
    model, inputs = fresh(kind), batch_of(kind)
    next(model.parameters()).requires_grad_(False)  # frozen by somebody before, and so it must stay
    model.register_forward_hook(lambda module, args, output: None)
    before = picture(model)
    attach(name, kind, model)
    train(moved(model), inputs, "sgd", steps=1)
    assert not torch.equal(answer(model, inputs), without)
    assert pt.detach(model) is model
    assert differences(before, picture(model)) == []
    assert pt.attached(model) == {}


@cells()
def test_detached_with_keep_it_is_a_plain_model_that_knows_what_was_learned(name, kind, tmp_path):
    model, inputs = learned_on(name, kind), batch_of(kind)
    if not folds(name, lambda model: pt.detach(model, keep=True), model):
        return
    base = base_of(kind)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, _ in base.named_parameters()
    ]
    assert not any("_pefttutor" in vars(m) or any(map(ours, hooks(m))) for m in model.modules())
    kept = answer(model, inputs)
    torch.testing.assert_close(kept, said(name, kind), rtol=1e-4, atol=1e-5)
    assert not torch.equal(kept, base_answer(kind))
    if kind in KINDS:
        assert model.config.to_dict() == looked_at(name, kind).config.to_dict()
    if kind in DECODERS:  # untied and tied; after the lines above the others are no different
        model.save_pretrained(tmp_path)
        assert torch.equal(answer(type(model).from_pretrained(tmp_path), inputs), kept)


def hooks(module: nn.Module) -> list[object]:
    tables = [table for name, table in vars(module).items() if "hooks" in name and table]
    return [hook for table in tables for hook in table.values()]


# ---- texts


@cells(*TEXTS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_in_the_padding_changes_nothing(name, kind, side):
    """Not even special tokens there: outputs of the real tokens and every gradient, bit for bit and nearly so."""
    model, inputs, found = looked_at(name, kind), batch_of(kind, side), []
    padding = inputs["attention_mask"] == 0
    for filling in (0, SPECIAL[0]):
        filled = inputs | {"input_ids": inputs["input_ids"].masked_fill(padding, filling)}
        read = real_states(model, kind, filled)
        weights = torch.linspace(-1, 1, read.numel()).view(read.shape)
        value = (read * weights).sum()  # a head that alone trains comes after the body
        found.append((read.detach(), gradients(model, value) if value.requires_grad else {}))
    (outputs, grads), (others, of_others) = found
    assert torch.equal(outputs, others)
    torch.testing.assert_close(grads, of_others, rtol=1e-4, atol=1e-6)


def real_states(model: nn.Module, kind: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the body makes of the tokens that aren't padding; of T5, what its decoder says."""
    if kind == "t5":
        return logits_of(model, inputs)
    hidden = model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    return hidden[inputs["attention_mask"].bool()]


@cells(*DECODERS, learns=True)
def test_the_loss_without_logits_is_the_models_own(name, kind):
    model, inputs = looked_at(name, kind), batch_of(kind, "left" if kind == "gpt2" else "right")
    own, ours = loss_of(model, inputs), causal_lm_loss(model, inputs)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    expected = gradients(model, own)
    assert set(expected) == set(pt.trainable(model))
    torch.testing.assert_close(
        gradients(model, causal_lm_loss(model, inputs)), expected, rtol=1e-3, atol=1e-5
    )


@cells(*WRITERS)
def test_generating_with_a_cache_says_the_same_as_without(name, kind, monkeypatch):
    model, inputs, texts = looked_at(name, kind), batch_of(kind, "left"), []
    if kind == "t5":  # transformers makes the cache as long as the encoder, whatever the decoder is
        monkeypatch.setattr(model.config, "num_layers", 2)
    for use_cache in (True, False):
        texts.append(
            model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=use_cache,
                do_sample=False, min_new_tokens=3, max_new_tokens=3, output_logits=True,
                return_dict_in_generate=True,
            )
        )  # fmt: skip
    with_cache, without = texts
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.logits, without.logits, rtol=1e-4, atol=1e-4)


@cells("llama")
def test_a_cache_of_fixed_length_says_the_same_or_is_refused_with_what_to_leave_out(name, kind):
    inputs = {key: value for key, value in batch_of(kind, "left").items() if key != "labels"}
    model = copy.deepcopy(looked_at(name, kind))  # generate keeps such a cache in the model
    how = {"do_sample": False, "min_new_tokens": 2, "max_new_tokens": 2}
    if name in ITS_OWN_CACHES:
        with pytest.raises(ValueError, match="leave cache_implementation out"):
            model.generate(**inputs, **how, cache_implementation="static")
        return
    found = model.generate(**inputs, **how, cache_implementation="static")
    assert torch.equal(found, model.generate(**inputs, **how))


# ---- a head beside it


@on_the_smallest
def test_a_new_head_trains_fully_beside_it_and_is_saved(name, kind, tmp_path):
    case, model = CASES[name], prepared(name, kind)
    if not hasattr(case.make(kind), "modules_to_save"):
        assert everything == case.trains  # it trains a head as all else
        return
    method = dataclasses.replace(case.make(kind), modules_to_save=(HEADS[kind],))
    arguments, how = case.sources(kind, model)
    method.attach(model, *arguments, **how)
    trains = pt.trainable(model)
    assert all(trains[n] == base_of(kind).get_parameter(n).numel() for n in HEAD_WEIGHTS[kind])
    assert not any(n.startswith(tuple(f"{weight}_" for weight in HEAD_WEIGHTS[kind])) for n in trains)
    train(moved(model), batch_of(kind), "adamw", steps=1)
    pt.save(model, tmp_path, name=DEFAULT)
    other = prepared(name, kind)
    other.classifier.weight.data.mul_(3)  # a new head starts at random: it is no part of the base
    assert torch.equal(answer(pt.load(other, tmp_path), batch_of(kind)), answer(model, batch_of(kind)))


def test_looking_has_changed_nothing():
    """Saving, pickling, merging for a while, losses, padding and generating above shared one model; it is as it was."""
    changed = {cell: differences(before, picture(LOOKED_AT[cell])) for cell, before in BEFORE.items()}
    assert {cell: found for cell, found in changed.items() if found} == {}
