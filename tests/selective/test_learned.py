"""Learned masks: each method against its closed formula and its limiting cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from pefttutor import (
    LTSFT,
    PASTA,
    AutoFreeze,
    DiffPruning,
    FishDip,
    FishMask,
    Masking,
    SecondOrderMask,
    SparseFineTuning,
    adapted,
    fit,
    load,
    save,
    trainable,
)
from pefttutor.parts.entries import entries, masks
from pefttutor.parts.information import example_losses as losses
from pefttutor.parts.information import total_gradient
from pefttutor.parts.ranking import largest
from pefttutor.selective.auto_freeze import settled
from pefttutor.selective.diff_pruning import gate, open_probability
from pefttutor.selective.lt_sft import add_differences, difference
from pefttutor.selective.masking import packed_masks
from pefttutor.selective.second_order import second_order_scores
from tests.tiny import class_examples, llama_classifier, weights

IDS = torch.tensor([[1, 7, 8, 9], [1, 20, 30, 5]])


def plain(model):
    """The base's own parameters, without what a method has added."""
    added = ("_values", "_scores", "_delta", "_alpha", "_group", "special")
    return {name: value for name, value in weights(model).items() if not name.endswith(added)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- Masking


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


def test_only_scores_train_and_the_mask_packs_into_bits(tmp_path):
    model, before = llama_classifier(), weights(llama_classifier())
    method = Masking(target_modules=("q_proj", "up_proj"), init_sparsity=0.3, modules_to_save=("score",))
    method.attach(model)
    fit(model, class_examples(), steps=4, lr=0.05, weight_decay=0.1)
    after = plain(model)
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


# ---- Diff-pruning


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.7, 5.0])
def test_the_chance_of_an_open_gate_is_what_a_million_draws_say(alpha):
    u = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-7)
    z = gate(torch.tensor(alpha), u)
    assert abs((z != 0).float().mean() - open_probability(torch.tensor(alpha))) < 0.002
    assert z.min() >= 0
    assert z.max() <= 1


def test_the_expected_count_is_the_penalty():
    model = llama_classifier()
    size = sum(p.numel() for n, p in model.named_parameters() if "score" not in n)
    DiffPruning(alpha_init=0.3, l0_weight=2.0, structured=False, modules_to_save=("score",)).attach(model)
    expected = 2 * size / (1 + math.exp(-0.3))  # log(−l / r) = 0
    assert adapted(model).penalty(model).item() == pytest.approx(expected, rel=1e-5)
    model = DiffPruning(alpha_init=0.3, l0_weight=2.0, modules_to_save=("score",)).attach(llama_classifier())
    assert adapted(model).penalty(model).item() == pytest.approx(expected / (1 + math.exp(-0.3)), rel=1e-5)


def test_diff_pruning_trains_projects_and_trains_on_with_the_kept_entries(tmp_path):
    model, before = llama_classifier(), weights(llama_classifier())
    method = DiffPruning(l0_weight=1e-5, modules_to_save=("score",))
    method.attach(model)
    assert torch.equal(model(input_ids=IDS).logits, llama_classifier()(input_ids=IDS).logits)
    fit(model, class_examples(), steps=3, lr=0.02)
    assert same({n: v for n, v in plain(model).items() if n != "score.weight"},
                {n: v for n, v in before.items() if n != "score.weight"})  # fmt: skip
    deltas = {n: p for n, p in model.named_parameters() if n.endswith("_delta")}
    assert all(p.abs().max() > 0 for n, p in deltas.items() if "embed" not in n)
    method.project(model, fraction=0.02)
    chosen = masks(model)
    count = sum(int(m.sum()) for n, m in chosen.items() if n != "score.weight")
    assert count == int(0.02 * sum(v.numel() for n, v in before.items() if n != "score.weight"))
    fit(model, class_examples(), steps=3, lr=0.02, weight_decay=0.5)
    after = plain(model)
    for name, old in before.items():
        assert torch.equal(after[name][~chosen[name]], old[~chosen[name]])
        assert (after[name][chosen[name]] != old[chosen[name]]).all()
    save(model, tmp_path)
    again = load(llama_classifier(), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_everything_projected_is_the_model_that_was_trained():
    model = llama_classifier()
    method = DiffPruning(modules_to_save=("score",)).attach(model)
    fit(model, class_examples(), steps=3, lr=0.02)
    expected = model(input_ids=IDS).logits
    adapted(method).project(model, fraction=1)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="with its gates"):
        adapted(model).project(model)


def test_gates_have_their_own_learning_rate():
    model = llama_classifier()
    method = DiffPruning(alpha_lr=0.3)
    method.attach(model)
    groups = method.optimizer(model, lr=0.01, weight_decay=0.1).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 0.1), (0.3, 0.0)]
    assert len(groups[1]["params"]) == 2 * len(groups[0]["params"])


# ---- LT-SFT


def test_rewinding_is_bit_exact_and_only_what_moved_most_trains():
    model, before = llama_classifier(), weights(llama_classifier())
    method = LTSFT(fraction=0.1)
    method.attach(model)
    fit(model, class_examples(), steps=3, lr=0.02, weight_decay=0.3)
    moved = {n: (v - before[n]).abs() for n, v in weights(model).items()}
    method.rewind(model)
    assert same(plain(model), before)
    expected = largest(moved, int(0.1 * sum(v.numel() for v in before.values())))
    chosen = masks(model)
    assert all(torch.equal(chosen[name], mask) for name, mask in expected.items())
    fit(model, class_examples(), steps=3, lr=0.02, weight_decay=0.3)
    for name, new in plain(model).items():
        assert torch.equal(new[~chosen[name]], before[name][~chosen[name]])


def test_differences_add_up_in_any_order():
    def trained(seed):
        model = llama_classifier()
        method = LTSFT(fraction=0.05)
        method.attach(model)
        fit(model, class_examples(seed=seed), steps=3, lr=0.02)
        method.rewind(model)
        fit(model, class_examples(seed=seed), steps=3, lr=0.02)
        return model, difference(model, llama_classifier())

    (one, task), (_, language) = trained(2), trained(9)
    back = add_differences(llama_classifier(), task)
    torch.testing.assert_close(plain(back), plain(one), rtol=1e-6, atol=1e-7)
    both = weights(add_differences(llama_classifier(), task, language))
    swapped = weights(add_differences(llama_classifier(), language, task))
    torch.testing.assert_close(both, swapped, rtol=1e-6, atol=1e-7)
    for name in task:
        free = ~torch.isin(task[name][0], language[name][0]) if name in language else slice(None)
        where = task[name][0][free]  # chosen by one alone: exactly that one's values
        assert torch.equal(both[name].flatten()[where], plain(back)[name].flatten()[where])


def test_lt_sft_in_its_first_phase_is_full_fine_tuning_and_can_be_saved(tmp_path):
    full, model = llama_classifier().requires_grad_(True), LTSFT().attach(llama_classifier())
    for one in (full, model):
        fit(one, class_examples(), steps=3, lr=0.02)
    assert same(weights(full), weights(model))
    save(model, tmp_path)
    assert same(weights(load(llama_classifier(), tmp_path)), weights(model))
    with pytest.raises(RuntimeError, match="phase 1"):
        LTSFT().rewind(llama_classifier())
    with pytest.raises(ValueError, match="doesn't fit this model"):
        add_differences(llama_classifier(), {"nowhere": (torch.tensor([0]), torch.ones(1))})


# ---- second order


def test_on_a_quadratic_the_rule_is_the_best_subset():
    g = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.1, 1.5, 0.7])
    h = torch.tensor([0.1, 1.0, 9.0, 2.0, 0.01, 4.0, 0.3])

    def loss(mask):
        delta = -(g / h) * mask
        return (g * delta + h * delta.square() / 2).sum()

    subsets = [torch.zeros(7).index_fill(0, torch.tensor(s), 1) for s in itertools.combinations(range(7), 3)]
    best = min(subsets, key=loss)
    chosen = largest({"w": second_order_scores(g, h)}, 3)["w"]
    assert torch.equal(chosen.float(), best)
    assert not torch.equal(largest({"w": second_order_scores(g)}, 3)["w"].float(), best)  # h matters here
    with pytest.raises(ValueError, match="add a damping"):
        second_order_scores(g, h * 0)


def test_signed_sums_choose_otherwise_than_sums_of_squares():
    model, examples = llama_classifier(), class_examples()
    gradient = total_gradient(model, examples)
    model.requires_grad_(True)
    from pefttutor.data.batches import collate

    model(**collate(examples)).loss.backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-3, atol=1e-6)
    chosen = SecondOrderMask(fraction=0.1, modules_to_save=("score",)).masks(model, examples)
    for name, mask in chosen.items():
        assert int(mask.sum()) == max(1, int(0.1 * mask.numel())), name
    together = SecondOrderMask(fraction=0.1, per_tensor=False).masks(model, examples)
    assert sum(int(m.sum()) for m in together.values()) == int(
        0.1 * sum(m.numel() for m in together.values())
    )
    fish = largest({n: g.square() for n, g in gradient.items()}, 100)
    assert fish.keys() == together.keys()
    damped = SecondOrderMask(fraction=0.1, damping=0.1, per_tensor=False).masks(model, examples)
    assert any(not torch.equal(damped[n], together[n]) for n in damped)
    assert SecondOrderMask(fraction=0.05).attach(model, examples) is model


# ---- Fish-Dip


def test_with_all_examples_and_no_refresh_fish_dip_is_fish():
    examples = class_examples(12)
    dip = FishDip(fraction=0.05, hardest=12, share=1).masks(llama_classifier(), examples)
    fish = FishMask(fraction=0.05).masks(llama_classifier(), examples)
    assert all(torch.equal(dip[name], fish[name]) for name in fish)


def test_a_refresh_follows_the_hardest_examples_and_keeps_what_was_learnt():
    model, examples = llama_classifier(), class_examples(40)
    method = FishDip(fraction=0.02)
    method.attach(model, examples)
    first = masks(model)
    fit(model, examples, steps=6, lr=0.05, weight_decay=0.1)
    learnt = plain(model)
    order = losses(model, examples).argsort(descending=True)[:4]  # 10 % of 40
    method.refresh(model, examples)
    assert same(plain(model), learnt)
    second = masks(model)
    assert any(not torch.equal(first[n], second[n]) for n in first)
    expected = FishMask(fraction=0.02).masks(model_of(learnt), [examples[int(i)] for i in order])
    assert all(torch.equal(second[name], expected[name]) for name in expected)
    assert sum(trainable(model).values()) == sum(int(m.sum()) for m in first.values())
    fit(model, examples, steps=2, lr=0.05, weight_decay=0.5)
    after = plain(model)
    assert all(torch.equal(after[n][~second[n]], learnt[n][~second[n]]) for n in after)
    with pytest.raises(RuntimeError, match="needs one FishDip"):
        method.refresh(llama_classifier(), examples)


def model_of(values):
    model = llama_classifier()
    model.load_state_dict(values, strict=False)
    return model


# ---- AutoFreeze


def test_what_has_settled_is_frozen_up_to_the_first_that_has_not():
    before = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert settled(before, torch.tensor([1.001, 0.99, 0.5, 1.02]), 0) == 2
    assert settled(before, torch.tensor([0.5, 0.99, 0.9, 1.0]), 0) == 0
    assert settled(before, torch.tensor([0.0, 0.999, 0.5, 0.98]), 1) == 2  # block 0 isn't looked at any more
    assert settled(before, before, 3) == 3


def test_auto_freeze_freezes_a_growing_prefix_and_can_be_interrupted(tmp_path):
    class Stop(AutoFreeze):
        def after_backward(self, model, step):
            if step == stop_at:
                raise KeyboardInterrupt
            super().after_backward(model, step)
            frozen.append(int(model.get_buffer("autofreeze_frozen")))

    def run(**more):
        model = llama_classifier(num_hidden_layers=4)
        method = Stop(interval=2, percentile=90)
        method.attach(model)
        fit(model, class_examples(), steps=9, lr=0.01, weight_decay=0.1, **more)
        return model

    stop_at, frozen = -1, []
    model = run()
    assert frozen == sorted(frozen)
    assert 0 < frozen[-1] < 4
    trains = trainable(model)
    for i in range(4):
        assert any(name.startswith(f"model.layers.{i}.") for name in trains) == (i >= frozen[-1])
    assert "model.embed_tokens.weight" not in trains
    stop_at, history, frozen = 6, frozen, []
    run(checkpoint=tmp_path)
    stop_at = -1
    assert same(weights(run(checkpoint=tmp_path, resume=True)), weights(model))
    assert frozen == history


# ---- PASTA


def test_pasta_starts_as_the_base_and_changes_special_tokens_only(tiny, batch, tmp_path):
    inputs = batch("bert")
    inputs["input_ids"][:, 0], inputs["input_ids"][0, 5] = 1, 2
    method = PASTA(special_token_ids=(1, 2), num_special=2)
    model = method.attach(tiny("bert"))
    assert torch.equal(model(**inputs).logits, tiny("bert")(**inputs).logits)
    assert sum(trainable(model).values()) == method.count(tiny("bert")) == 2 * 24 * 2
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(generator=torch.Generator().manual_seed(1))
    seen = {}

    def note(key):
        def hook(module, args, kwargs):
            seen[key] = args[0] if args else kwargs["hidden_states"]

        return hook

    expected = tiny("bert")
    for key, one in (("ours", model), ("base", expected)):
        one.bert.encoder.layer[0].attention.register_forward_pre_hook(note(key), with_kwargs=True)
        one(**inputs)
    change = (seen["ours"] - seen["base"]).abs().sum(-1) > 1e-6
    assert change.sum() == 4  # three first tokens and one end
    vectors = model.bert.encoder.layer[0].special
    torch.testing.assert_close(seen["ours"][0, 5] - seen["base"][0, 5], vectors[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["ours"][2, 0] - seen["base"][2, 0], vectors[0], rtol=1e-5, atol=1e-6)
    save(model, tmp_path)
    assert torch.equal(load(tiny("bert"), tmp_path)(**inputs).logits, model(**inputs).logits)


# ---- what they refuse


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LTSFT(fraction=0), r"fraction is 0"),
        (lambda: FishDip(share=2), "share is 2"),
        (lambda: SecondOrderMask(damping=0), "damping is 0"),
        (lambda: Masking(init_sparsity=0), "init_sparsity is 0"),
        (lambda: DiffPruning(alpha_lr=0), "alpha_lr is 0"),
        (lambda: AutoFreeze(interval=0), "interval is 0"),
        (lambda: PASTA().attach(llama_classifier()), "special_token_ids"),
        (lambda: PASTA(num_special=0), "num_special is 0"),
        (lambda: FishDip().attach(llama_classifier()), "chooses by data"),
        (lambda: SecondOrderMask().attach(llama_classifier()), "chooses by data"),
        (lambda: DiffPruning().project(llama_classifier(), fraction=0), "fraction is 0"),
        (lambda: Masking().attach(llama_classifier()), "target_modules"),
    ],
)
def test_bad_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("method", [LTSFT(), Masking(target_modules=("q_proj",)), DiffPruning(), AutoFreeze(),
                                    PASTA(special_token_ids=(1,))])  # fmt: skip
def test_an_adapted_model_is_refused(method):
    model = llama_classifier()
    SparseFineTuning().attach(model, {"score.weight": torch.ones(3, 16).bool()})
    with pytest.raises(ValueError, match="already adapted"):
        method.attach(model)
    assert list(entries(model)) == ["score.weight"]
