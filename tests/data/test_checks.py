"""What is refused before the first step, by name and with what to do, and what is let through."""

from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from pefttutor.data.checks import check_examples
from tests.data import unusual
from tests.tiny import class_examples, language_examples, llama, llama_classifier

ROWS = language_examples(4)
LISTS = {"input_ids": [[7, 8], [9, 10]], "labels": [[7, 8], [9, 10]]}


def refuse(message: str, examples: Any, model: Any = None, *, needs_labels: bool = True) -> None:
    with pytest.raises(ValueError, match=message):
        check_examples(model or llama(), examples, "train", needs_labels=needs_labels)


@pytest.mark.parametrize("needs_labels", [True, False])
@pytest.mark.parametrize(
    ("message", "examples"),
    [
        (r"train is a DataLoader; .*loader.dataset, with batch_size=2", DataLoader(ROWS, batch_size=2)),  # type: ignore[arg-type]
        (r"train is a dict of input_ids, labels; .*one dict an example", LISTS),
        (r"train is a BatchEncoding of input_ids, labels; .*one dict an example", BatchEncoding(LISTS)),
        (r"train is a DatasetDict of train; .*one split: data\['train'\]", DatasetDict(train=Dataset.from_dict(LISTS))),
        (r"train is a generator.*list\(…\)", (row for row in ROWS)),
        (r"train\[0\] is \['input_ids', 'labels'\] with a list as 'input_ids'; .*format", Dataset.from_dict(LISTS)),
        (r"train\[0\] is a BatchEncoding; expected a dict of tensors. Make it one", [BatchEncoding(LISTS)]),
        (r"train\[0\] is a tuple; expected a dict of tensors", [(torch.ones(3), torch.ones(3))]),
        (r"train\[0\] is a str; expected a dict of tensors. Make them with", ["a text"]),
        (r"train\[0\]: input_ids have the shape \(1, 3\); expected one sequence", [{"input_ids": torch.ones(1, 3)}]),
        (r"train is empty", []),
    ],
)  # fmt: skip
def test_what_is_no_list_of_examples(message: str, examples: Any, needs_labels: bool) -> None:
    refuse(message, examples, needs_labels=needs_labels)


def test_what_the_messages_advise_works() -> None:
    rows = [{key: torch.as_tensor(LISTS[key][i]) for key in LISTS} for i in range(2)]
    for examples in (
        rows,
        Dataset.from_dict(LISTS).with_format("torch"),
        DataLoader(rows).dataset,  # type: ignore[arg-type]
        [{k: torch.as_tensor(v) for k, v in BatchEncoding(row).items()} for row in rows],
    ):
        check_examples(llama(), examples, "train", needs_labels=True)  # type: ignore[arg-type]


def labelled(*labels: Any) -> list[dict[str, torch.Tensor]]:
    return [
        {**row, "labels": torch.tensor(label)} for row, label in zip(class_examples(), labels, strict=False)
    ]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 3}, [0, 2]),
        ({"num_labels": 1}, [3.8, -2.0]),
        ({"num_labels": 1}, [3, -2]),
        ({"num_labels": 3, "problem_type": "regression"}, [[3.8, 0.0, 1.0]]),
        ({"num_labels": 3}, [[1.0, 0.0, 1.0]]),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[1.0, 0.0, 1.0]]),
    ],
)
def test_labels_of_texts_that_fit(settings: dict[str, Any], labels: list[Any]) -> None:
    model = llama_classifier(**settings)
    rows = labelled(*labels)
    check_examples(model, rows, "train", needs_labels=True)
    for row in rows:
        assert model(**{key: value[None] for key, value in row.items()}).loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({"num_labels": 3}, [0, 3], r"train\[1\]: the label is 3, expected 0 to 2"),
        ({"num_labels": 3}, [0.5], r"is 0.5 \(torch.float32\), expected one class, .* from 0 to 2.*num_labels=1"),
        ({"num_labels": 3}, [[1.0, 0.0]], r"expected 3 numbers 0.0 or 1.0, one a class"),
        ({"num_labels": 3}, [[1, 0, 1]], r"is \[1, 0, 1\] \(torch.int64\), expected 3 numbers .* as floats"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, [[1.0, 0.0, 1.0]], "expected one class"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [2], "expected 3 numbers 0.0 or 1.0"),
        ({"num_labels": 1}, [[1.0, 0.0]], "expected 1 number, for a regression"),
    ],
)  # fmt: skip
def test_labels_of_texts_that_do_not_fit(settings: dict[str, Any], labels: list[Any], message: str) -> None:
    model = llama_classifier(**settings)
    refuse(message, labelled(*labels), model)
    assert model.config.problem_type == settings.get("problem_type")


def test_a_decoder_that_cannot_tell_where_a_text_ends() -> None:
    model = llama_classifier()
    model.config.pad_token_id = -1
    refuse(r"pad_token_id is -1, which is no token", class_examples(), model)
    check_examples(model, class_examples(1), "train", needs_labels=True)


def test_source_and_target_may_differ_in_length() -> None:
    rows = unusual.examples_of(unusual.words(2, 9) | {"labels": unusual.words(2, 4, prompt=0)["labels"]})
    for model in (unusual.t5(), unusual.bart("ForConditionalGeneration")):
        check_examples(model, rows, "train", needs_labels=True)
        refuse(
            r"train\[0\]: a label is 50, expected 0 to 49", [rows[0] | {"labels": torch.tensor([50])}], model
        )
        refuse(r"train\[0\] has no label to learn from", [rows[0] | {"labels": torch.tensor([-100])}], model)
    refuse(r"labels have the length 4, input_ids 9", rows, unusual.decoder())


def test_the_first_label_counts_where_labels_are_not_shifted() -> None:
    row = {"input_ids": torch.tensor([7, 8, 9]), "labels": torch.tensor([7, -100, -100])}
    check_examples(unusual.bart(), [row], "train", needs_labels=True)
    refuse("no label to learn from: all are -100 after the first", [row], unusual.decoder())
    refuse("no label to learn from: all are -100 after the first", [row], unusual.gemma_with_pictures())
