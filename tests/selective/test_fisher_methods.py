"""Fisher information of models, FISH masks and Child-Tuning: formulas, budgets, limiting cases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import ChildTuningD, ChildTuningF, FishMask, adapted, fit, load, save, trainable
from pefttutor.parts.entries import masks
from pefttutor.parts.information import fisher_information
from tests.tiny import class_examples, language_examples, llama, llama_classifier, weights

CLOSE = {"rtol": 2e-5, "atol": 1e-12}  # Llama's norms are computed in float32, whatever the model's dtype


def by_loop(model, examples, shift):
    """Batches of one, the mean over the examples, as eq. 4.9 says; the loss of transformers is a mean over tokens."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        model.zero_grad()
        one = {key: value[None] for key, value in example.items()}
        tokens = int((example["labels"][1:] != -100).sum()) if shift else 1
        (-model(**one).loss * tokens).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.square() / len(examples)
    model.zero_grad()
    return total


@pytest.mark.parametrize("classes", [True, False])
def test_information_is_that_of_batches_of_one(classes):
    model = (llama_classifier if classes else llama)().double()
    examples = class_examples(7) if classes else language_examples(7)
    ours = fisher_information(model, examples, batch_size=3)
    for name, expected in by_loop(model, examples, not classes).items():
        torch.testing.assert_close(ours[name], expected, **CLOSE)


def test_the_model_is_left_as_it_was():
    model = llama_classifier(attention_dropout=0.5).train()
    model.model.embed_tokens.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    first = fisher_information(model, class_examples(5))
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(
        first.values(), fisher_information(model, class_examples(5)).values(), strict=True))  # fmt: skip


def test_where_the_model_is_right_about_its_labels_empirical_and_true_agree():
    """E over y ~ p(y|x) of the empirical information is the true one."""
    model = llama_classifier().double()
    examples = class_examples(3)
    true = fisher_information(
        model, [{k: v for k, v in e.items() if k != "labels"} for e in examples], expected=True
    )
    weighted = {name: torch.zeros_like(v) for name, v in true.items()}
    for example in examples:
        rest = {k: v[None] for k, v in example.items() if k != "labels"}
        p = model(**rest).logits.softmax(-1)[0].detach()
        for y in range(3):
            one = fisher_information(model, [{**example, "labels": torch.tensor(y)}])
            for name, value in one.items():
                weighted[name] += p[y] * value / 3
    for name, value in true.items():
        torch.testing.assert_close(value, weighted[name], **CLOSE)


def test_bare_modules_bring_their_own_likelihood():
    model = nn.Linear(3, 2).double()
    generator = torch.Generator().manual_seed(0)
    examples = [{"x": torch.randn(3, generator=generator, dtype=torch.float64)} for _ in range(4)]

    def likelihood(model, batch):
        return model(batch["x"]).log_softmax(-1)[:, 0]

    def stack(rows):
        return {"x": torch.stack([row["x"] for row in rows])}

    ours = fisher_information(model, examples, log_likelihood=likelihood, collate=stack)
    p = model(stack(examples)["x"]).softmax(-1)
    delta = torch.tensor([1.0, 0.0]).double() - p  # ∂ log p(0|x) / ∂ logits
    expected = (delta.square().t() @ stack(examples)["x"].square()) / 4
    torch.testing.assert_close(ours["weight"], expected.detach())


@pytest.mark.parametrize(
    ("examples", "settings", "says"),
    [
        ([], {}, "at least one example"),
        ([{"input_ids": torch.tensor([1, 7])}], {}, "needs labels, and an example has only input_ids"),
        (language_examples(2), {"expected": True}, r"logits are \(2, 9, 320\)"),
    ],
)
def test_data_that_cannot_be_used_is_refused(examples, settings, says):
    model = llama()
    with pytest.raises(ValueError, match=says):
        fisher_information(model, examples, **settings)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_nan_is_refused():
    model = llama_classifier()
    model.score.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        FishMask(fraction=0.1, modules_to_save=("score",)).attach(model, class_examples(4))
    assert adapted(model) is None


# ---- FISH


def test_fish_keeps_to_its_budget_and_takes_the_largest():
    model = llama_classifier()
    everything = sum(p.numel() for p in model.parameters())
    method = FishMask(fraction=0.05, modules_to_save=("score",))
    information = fisher_information(model, class_examples(12))
    method.attach(model, class_examples(12))
    assert sum(trainable(model).values()) == int(0.05 * everything)
    chosen = masks(model)
    assert chosen["score.weight"].all()
    inside = torch.cat([information[n][m] for n, m in chosen.items() if "score" not in n])
    outside = torch.cat([information[n][~m] for n, m in chosen.items()])
    assert inside.min() >= outside.max()


def test_the_mask_of_fish_never_changes_and_is_saved(tmp_path):
    model, before = llama_classifier(), weights(llama_classifier())
    FishMask(fraction=0.05, samples=6, modules_to_save=("score",)).attach(model, class_examples(24))
    chosen = masks(model)
    fit(model, class_examples(), steps=5, lr=0.05, weight_decay=0.5)
    for name, old in before.items():
        new = dict(model.named_parameters())[name]
        assert torch.equal(new[~chosen[name]], old[~chosen[name]])
    save(model, tmp_path)
    again = load(llama_classifier(), tmp_path)  # without examples
    assert all(torch.equal(m, chosen[name]) for name, m in masks(again).items())
    assert weights(again).keys() == weights(model).keys()
    assert all(torch.equal(weights(again)[name], value) for name, value in weights(model).items())


def test_fish_says_what_it_needs():
    with pytest.raises(ValueError, match="chooses by data"):
        FishMask(modules_to_save=("score",), fraction=0.1).attach(llama_classifier())
    with pytest.raises(ValueError, match="take at least"):
        FishMask(modules_to_save=("score",), fraction=0.0001).attach(llama_classifier(), class_examples())
    with pytest.raises(ValueError, match="samples is 0"):
        FishMask(samples=0)


# ---- Child-Tuning


def trained(attach, **settings):
    model = llama_classifier()
    attach(model)
    fit(model, class_examples(), steps=5, lr=0.01, **settings)
    return {n: p.detach() for n, p in model.named_parameters() if not n.endswith("_values")}


def test_with_all_of_the_network_both_are_full_fine_tuning():
    full = trained(lambda model: model.requires_grad_(True))
    of_f = trained(lambda model: ChildTuningF(p_F=1).attach(model))
    of_d = trained(lambda model: ChildTuningD(p_D=1).attach(model, class_examples()))
    for name, weight in full.items():
        assert torch.equal(of_f[name], weight)
        torch.testing.assert_close(of_d[name], weight, rtol=1e-5, atol=1e-7)


def test_the_expected_gradient_of_f_is_the_whole_gradient():
    model = nn.Linear(6, 5)
    method = ChildTuningF(p_F=0.3)
    method.attach(model)
    torch.manual_seed(0)
    whole = torch.randn(5, 6)
    draws = []
    for step in range(4000):
        model.weight.grad = whole.clone()
        method.after_backward(model, step)
        draws.append(model.weight.grad.clone())
    draws = torch.stack(draws)
    kept = (draws != 0).float().mean()
    assert abs(kept - 0.3) < 0.01
    assert set((draws / whole).flatten().mul(3).round().unique().tolist()) == {0.0, 10.0}
    error = (draws.mean(0) - whole).abs() / whole.abs()
    assert error.max() < 5 * ((1 / 0.3 - 1) / 4000) ** 0.5


def test_f_moves_everything_through_momentum_and_d_does_not():
    before = weights(llama_classifier())
    of_f = trained(lambda model: ChildTuningF(p_F=0.3).attach(model), weight_decay=0.1)
    of_d = trained(lambda model: ChildTuningD(p_D=0.3).attach(model, class_examples()), weight_decay=0.1)

    def share(after):
        moved = sum(int((after[n] != old).sum()) for n, old in before.items())
        return moved / sum(old.numel() for old in before.values())

    assert share(of_f) > 0.9
    assert share(of_d) <= 0.3


def test_an_interrupted_run_of_f_goes_on_bit_for_bit(tmp_path):
    class Stop(ChildTuningF):
        def after_backward(self, model, step):
            if step == stop_at:
                raise KeyboardInterrupt
            super().after_backward(model, step)

    def run(**more):
        model = llama_classifier()
        method = Stop(p_F=0.4)
        method.attach(model)
        fit(model, class_examples(), steps=6, lr=0.01, **more)
        return weights(model)

    stop_at = -1
    expected = run()
    stop_at = 3
    run(checkpoint=tmp_path)
    stop_at = -1
    resumed = run(checkpoint=tmp_path, resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("p", [0, 1.01, None])
def test_a_probability_outside_is_refused(p):
    with pytest.raises(ValueError, match=r"p_F is .*\(0, 1\]"):
        ChildTuningF(p_F=p)
    with pytest.raises(ValueError, match=r"p_D is .*\(0, 1\]"):
        ChildTuningD(p_D=p)
