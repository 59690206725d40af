"""Fisher information: the formula, what is taken and refused, what is left as it was, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor.data.evaluation import evaluate
from pefttutor.memory.allocator import transient_bytes
from pefttutor.parts.information import example_losses as losses
from pefttutor.parts.information import fisher_information, total_gradient
from tests.tiny import (
    class_examples,
    language_examples,
    llama,
    llama_classifier,
    tiny_model,
)

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


@pytest.mark.parametrize("measure", [losses, total_gradient, evaluate])
def test_each_module_keeps_its_own_mode(measure):
    model = llama_classifier().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    measure(model, class_examples(4))
    assert [m.training for m in model.modules()] == before
    with pytest.raises(Exception):  # noqa: B017, PT011
        measure(model, [{"input_ids": torch.tensor([5000]), "labels": torch.tensor(0)}])
    assert [m.training for m in model.modules()] == before


def stack(rows):
    return {"x": torch.stack([row["x"] for row in rows])}


def likelihood(model, batch):
    return model(batch["x"]).log_softmax(-1)[:, 0]


@pytest.mark.parametrize("settings", [{"samples": 0}, {"samples": -1}, {"batch_size": 0}])
def test_numbers_below_one_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
        fisher_information(llama_classifier(), class_examples(3), **settings)


def test_labels_of_a_regression_are_refused():
    model = llama_classifier()
    examples = [{**example, "labels": torch.tensor(0.5)} for example in class_examples(3)]
    with pytest.raises(ValueError, match=r"labels are torch.float32 \(2,\).*log_likelihood"):
        fisher_information(model, examples)


def test_an_encoder_decoder_reads_its_labels_shifted():
    model = tiny_model("t5", dtype=torch.float64)
    examples = [
        {"input_ids": e["input_ids"] % 97, "attention_mask": torch.ones(len(e["input_ids"])).long(),
         "labels": (e["input_ids"] % 97)[2:]} for e in language_examples(4)
    ]  # fmt: skip
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        model.zero_grad()
        one = {key: value[None] for key, value in example.items()}
        (-model(**one).loss * len(example["labels"])).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square() / len(examples)
    ours = fisher_information(model, examples, batch_size=3)
    for name, expected in total.items():
        torch.testing.assert_close(ours[name], expected, rtol=2e-5, atol=1e-12)
    with pytest.raises(ValueError, match="expected=True sums over all labels"):
        fisher_information(model, examples, expected=True)


def test_it_works_where_gradients_are_off():
    model, examples = llama_classifier(), class_examples(3)
    expected = fisher_information(model, examples)
    with torch.no_grad():
        ours = fisher_information(model, examples)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert not any(value.requires_grad for value in ours.values())


def test_every_module_keeps_its_own_mode_and_every_parameter_its_flag_on_an_error_too():
    model = llama_classifier().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    for examples in (class_examples(3), [{**class_examples(1)[0], "labels": torch.tensor(0.5)}]):
        try:
            fisher_information(model, examples)
        except ValueError:
            assert examples[0]["labels"] == 0.5
        assert [module.training for module in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags


def test_parameters_of_integers_are_left_alone():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.arange(6, dtype=torch.int8).view(3, 2), requires_grad=False)
            self.head = nn.Linear(2, 2)

        def forward(self, x):
            return self.head(x @ self.codes.float())

    examples = [{"x": torch.randn(3)} for _ in range(4)]
    found = fisher_information(Quantized(), examples, log_likelihood=likelihood, collate=stack)
    assert set(found) == {"head.weight", "head.bias"}
    assert found["head.weight"].all()


@pytest.mark.parametrize("threads", [1], indirect=True)  # the profiler sees no helper's memory
def test_memory_is_the_result_and_max_bytes_however_many_batches(threads):
    model = nn.Linear(256, 2048)
    examples = [{"x": torch.randn(3, 256)} for _ in range(6)]
    weight = model.weight.numel() * 4

    def peak(**settings):
        return transient_bytes(
            lambda: fisher_information(
                model,
                examples,
                batch_size=2,
                collate=stack,
                log_likelihood=lambda model, batch: model(batch["x"]).sum((1, 2)),
                **settings,
            )
        )

    assert peak(max_bytes=1 << 14) < 1.2 * weight
    assert 1.9 * weight < peak() < 2.3 * weight


@pytest.mark.parametrize("wrong", [0, -1])
def test_the_total_gradient_has_batches_of_one_or_more(wrong):
    with pytest.raises(ValueError, match=f"^batch_size={wrong}, expected a whole number of at least 1"):
        total_gradient(llama_classifier(), class_examples(3), batch_size=wrong)
