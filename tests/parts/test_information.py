"""What `fisher_information` takes and refuses, what it leaves as it was, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor.bench.memory import transient_bytes
from pefttutor.parts.information import fisher_information
from tests.conftest import tiny_model
from tests.tiny import class_examples, language_examples, llama_classifier


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
