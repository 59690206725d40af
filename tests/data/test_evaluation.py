"""evaluate: loss and accuracy against plain definitions, for every kind of label."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from pefttutor.data.batches import collator
from pefttutor.data.evaluation import evaluate
from tests.data import unusual
from tests.tiny import bert, class_examples, language_examples, llama, llama_classifier


def with_labels(labels: list[Any]) -> list[dict[str, torch.Tensor]]:
    rows = class_examples(len(labels))
    return [{**row, "labels": torch.tensor(label)} for row, label in zip(rows, labels, strict=True)]


def answered(model: Any, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The logits of each text alone."""
    with torch.no_grad():
        inputs = [{k: v[None] for k, v in row.items() if k != "labels"} for row in rows]
        return torch.cat([model(**row).logits for row in inputs])


@pytest.mark.parametrize("name", ["bart", "gemma_with_pictures", "decoder", "smoothed", "xlm"])
def test_accuracy_compares_each_label_with_what_the_model_is_trained_to_say(name: str) -> None:
    model = getattr(unusual, name)()
    batch = unusual.words(4, 9, prompt=0)
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
    first = int(name not in ("bart", "xlm"))  # how far the labels are shifted
    batch["labels"][:2] = torch.cat(
        [torch.full((2, first), 3), said[:2, : 9 - first]], 1
    )  # two texts all right
    batch["labels"][2:] = said[2:].roll(first, 1).add(1).remainder(50)
    found = evaluate(model, unusual.examples_of(batch))
    assert found["accuracy"] == pytest.approx(0.5)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_an_encoder_and_a_decoder_with_few_labels_for_many_tokens() -> None:
    model = unusual.t5()
    inputs, labels = unusual.words(4, 9), unusual.words(4, 4, prompt=0, seed=1)["labels"]
    with torch.no_grad():
        for _ in range(5):  # until the labels are what is said when they are read
            labels = model(**inputs | {"labels": labels}).logits.argmax(-1)
        expected = model(**inputs | {"labels": labels})
    rows = unusual.examples_of(inputs | {"labels": labels})
    rows[0] = rows[0] | {"labels": labels[0, :2]}  # and not as many everywhere
    right = (expected.logits.argmax(-1) == labels)[1:].sum() + (
        expected.logits[0, :2].argmax(-1) == labels[0, :2]
    ).sum()
    assert evaluate(model, rows)["accuracy"] == pytest.approx(right.item() / 14)


def test_texts_without_a_label_that_counts_are_left_out() -> None:
    model, rows = llama(), language_examples(4)
    for row in rows[:2]:
        row["labels"] = torch.full_like(row["labels"], -100)

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).loss

    expected = evaluate(model, rows[2:], loss=loss)
    assert evaluate(model, rows, loss=loss, batch_size=1) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"nothing can be measured: no label of data counts, all are -100"):
        evaluate(model, rows[:2], loss=loss)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 1}, [0.0, 3.8, 0.0, 1.5]),
        ({"num_labels": 1}, [0, 3, 0, 1]),
        ({"num_labels": 2, "problem_type": "regression"}, [[0.0, 3.8], [1.0, 0.0], [0.5, 0.5], [1.0, 1.0]]),
    ],
)
def test_a_regression_has_a_loss_and_no_accuracy(settings: dict[str, Any], labels: list[Any]) -> None:
    model, rows = llama_classifier(**settings), with_labels(labels)
    found = evaluate(model, rows, batch_size=3)
    squares = (answered(model, rows).squeeze(-1) - torch.tensor(labels)).square()
    assert found == {"loss": pytest.approx(squares.mean().item(), rel=1e-5)}


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_several_yes_or_no_labels_are_right_one_by_one(problem: str | None) -> None:
    model = llama_classifier(problem_type=problem)
    labels = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    rows = with_labels(labels)
    logits = answered(model, rows)
    found = evaluate(model, rows, batch_size=3)
    assert found["accuracy"] == ((logits > 0) == torch.tensor(labels).bool()).double().mean().item()
    assert found["loss"] == pytest.approx(
        torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels)).item(), rel=1e-5
    )


def test_one_class_a_text() -> None:
    model, rows = llama_classifier(), class_examples(7)
    classes, logits = torch.stack([row["labels"] for row in rows]), answered(model, rows)
    found = evaluate(model, rows, batch_size=3)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == classes).double().mean().item())
    assert found["loss"] == pytest.approx(cross_entropy(logits, classes).item(), rel=1e-5)


def test_a_loss_over_whole_sequences_has_no_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_values": torch.randn(200, generator=generator), "labels": torch.tensor([3, 4, 5])}
        for _ in range(2)
    ]
    assert set(evaluate(unusual.speech_ctc(), rows)) == {"loss"}


def test_inside_autocast_the_weights_are_those_of_now() -> None:
    model, rows = llama(), language_examples(4)
    with torch.autocast("cpu", torch.bfloat16):
        model(**collator(model)(rows)).loss.backward()  # autocast keeps the weights of this moment, rounded
        with torch.no_grad():
            model.lm_head.weight.mul_(50)
        found = evaluate(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(model, rows) == found


def test_padding_on_the_left_can_be_asked_for() -> None:
    model, rows = bert(), language_examples(2, lengths=(3, 5))
    batch = collator(model, side="left")(rows)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    found = evaluate(model, rows, collate=collator(model, side="left"))
    assert found["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_batch_below_one_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"^batch_size={wrong}, expected a whole number of at least 1"):
        evaluate(llama(), language_examples(4), batch_size=wrong)
