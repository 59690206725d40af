"""What `fit` refuses before its first step, and which run it goes on with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pefttutor import (
    BitFit,
    LoRA,
    merge,
    switch,
)
from pefttutor.train import evaluate, fit
from tests.tiny import class_examples, language_examples, llama, llama_classifier, weights


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


NOT_CHANGED = language_examples(4)


def refuse(match: str, model: Any = None, train: Any = NOT_CHANGED, **settings: Any) -> None:
    model = model or llama()
    before = weights(model)
    with pytest.raises(ValueError, match=match):
        fit(model, train, **{"steps": 1, **settings})
    assert equal(before, weights(model))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, r"steps=0, expected a positive whole number"),
        ({"steps": 2.5}, r"steps=2.5, expected a positive whole number"),
        ({"steps": None, "epochs": -1}, r"epochs=-1, expected a positive number"),
        ({"steps": 1, "epochs": 1}, r"both given; choose one"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"accumulate": True}, r"accumulate=True"),
        ({"lr": -0.1}, r"lr=-0.1"),
        ({"lr": math.nan}, r"lr=nan"),
        ({"max_grad_norm": 0}, r"max_grad_norm=0"),
        ({"evaluate_every": 0}, r"evaluate_every=0"),
        ({"warmup": 1.0}, r"warmup=1.0.*0 ≤ warmup < 1"),
        ({"weight_decay": -1}, r"weight_decay=-1"),
        ({"schedule": "step"}, r"schedule='step', expected one of linear, constant, cosine"),
        ({"resume": True}, r"resume=True needs checkpoint="),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    refuse(match, **settings)


def test_nothing_to_train() -> None:
    refuse(r"nothing trains.*Attach a method first", llama().requires_grad_(False))


def test_empty_data() -> None:
    refuse(r"train is empty", train=[])
    refuse(r"validation is empty", validation=[])
    with pytest.raises(ValueError, match="data is empty"):
        evaluate(llama(), [])


def spoiled(**changes: Any) -> list[dict[str, Any]]:
    data = language_examples(4)
    data[2] = {key: value for key, value in {**data[2], **changes}.items() if value is not None}
    return data


def test_labels_that_cannot_be_trained_on() -> None:
    refuse(
        r"train\[2\]: labels have the length 3, input_ids 7", train=spoiled(labels=torch.tensor([7, 8, 9]))
    )
    refuse(r"train\[2\] has no labels, only input_ids, attention_mask", train=spoiled(labels=None))
    refuse(r"train\[2\] has no label to learn from", train=spoiled(labels=torch.full((7,), -100)))
    only_first = torch.full((7,), -100)
    only_first[0] = 9
    refuse(r"no label to learn from: all are -100 after the first position", train=spoiled(labels=only_first))
    refuse(r"train\[2\]: a label is 320, expected 0 to 319", train=spoiled(labels=torch.full((7,), 320)))
    refuse(r"train\[2\]: a label is -1, expected 0 to 319", train=spoiled(labels=torch.full((7,), -1)))
    refuse(r"train\[2\]: input_ids is 999, expected 0 to 319", train=spoiled(input_ids=torch.full((7,), 999)))


def test_class_outside_the_models_classes() -> None:
    data = class_examples(6, classes=4)
    refuse(r"train\[3\]: the label is 3, expected 0 to 2 \(there are 3 classes", llama_classifier(), data)
    refuse(r"validation\[3\]: the label is 3", llama_classifier(), class_examples(6), validation=data)


def test_rows_instead_of_tensors() -> None:
    refuse(
        r"train\[0\] is \['label', 'text'\].*expected a dict of tensors.*encode",
        train=[{"text": "a", "label": 0}],
    )


def test_resume_without_a_state_or_with_other_settings(tmp_path: Path) -> None:
    data = language_examples()
    with pytest.raises(FileNotFoundError, match=r"there is no fit.safetensors in .*nowhere.*resume=False"):
        fit(llama(), data, steps=2, checkpoint=tmp_path / "nowhere", resume=True)
    fit(llama(), data, steps=2, checkpoint=tmp_path)
    refuse(
        r"lr was 0.001, now 0.01; examples was 24, now 4", steps=2, lr=0.01, checkpoint=tmp_path, resume=True
    )


# ---- which run it goes on with


def low(**more: Any) -> Any:
    return LoRA(**{"r": 2, **more}).attach(llama(), name="low")


def bits(model: Any) -> Any:
    return BitFit().attach(model, name="bits")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: low(lora_alpha=5), r"the saved run trained .*'lora_alpha': 16.*carries .*'lora_alpha': 5"),
        (
            lambda: LoRA(r=2).attach(llama(), name="other"),
            r"the saved run trained .*'low'.*carries .*'other'",
        ),
        (lambda: bits(llama()), r"the saved run trained .*'LoRA'.*carries .*'BitFit'"),
        (lambda: bits(low()), r"the saved run trained .*'low'.*carries .*'bits'"),
        (lambda: switch(bits(low()), "low"), r"the saved run trained .*'low'.*carries .*'learns': False"),
        (llama, r"the saved run trained .*'low'.*carries none"),
    ],
)
def test_a_run_with_other_methods_is_not_gone_on_with(make: Any, match: str, tmp_path: Path) -> None:
    fit(low(), NOT_CHANGED, steps=1, checkpoint=tmp_path)
    refuse(match, make(), steps=1, checkpoint=tmp_path, resume=True)


def test_a_run_on_another_base_is_not_gone_on_with(tmp_path: Path) -> None:
    fit(low(), NOT_CHANGED, steps=1, checkpoint=tmp_path)
    other = low()
    other.model.norm.weight.data.add_(0.5)
    refuse(
        r"another base model\. In this one model\.norm\.weight has other values",
        other,
        checkpoint=tmp_path,
        resume=True,
    )
    again = low()
    assert fit(again, NOT_CHANGED, steps=1, checkpoint=tmp_path, resume=True).steps == [1]


def test_a_run_above_other_frozen_adapters_is_not_gone_on_with(tmp_path: Path) -> None:
    def above(start: float) -> Any:
        model = low()
        dict(model.named_parameters())["model.layers.0.self_attn.q_proj.lora_B@low"].data.fill_(start)
        return switch(bits(model), "low", "bits", train=("bits",))

    fit(above(0.5), NOT_CHANGED, steps=1, checkpoint=tmp_path)
    refuse(
        r"other frozen values of the attached methods: model\.layers\.0\.self_attn\.q_proj\.lora_B.* has other values",
        above(0.25),
        steps=1,
        checkpoint=tmp_path,
        resume=True,
    )
    assert fit(above(0.5), NOT_CHANGED, steps=1, checkpoint=tmp_path, resume=True).steps == [1]


def test_what_is_merged_and_would_learn_is_not_trained() -> None:
    refuse(
        "'low' is merged into the weights, so that what trains has no effect: unmerge it first", merge(low())
    )
    model = bits(low())
    switch(merge(model, "low", "bits"), "low", "bits", train=())
    refuse("nothing trains", model)


def test_a_layer_that_was_replaced_after_attaching_is_missed() -> None:
    model = low()
    model.model.layers[0].self_attn.q_proj = nn.Linear(16, 16)
    refuse(
        r"this model has lost 'model\.layers\.0\.self_attn\.q_proj\.lora_A@low'|was a layer replaced", model
    )
