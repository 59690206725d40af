"""Settings: what each check lets through, the one sentence of every refusal, and the methods that ask."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pefttutor import (
    LTSFT,
    PASTA,
    AutoFreeze,
    ChildTuningD,
    ChildTuningF,
    DiffPruning,
    FishDip,
    FishMask,
    LastLayers,
    LoRA,
    Masking,
    PaFi,
    SecondOrderMask,
    adapted,
)
from pefttutor.parts.settings import (
    check_choice,
    check_examples,
    check_fraction,
    check_names,
    check_number,
    check_whole,
)
from tests.tiny import class_examples, llama_classifier


def holding(value: object) -> SimpleNamespace:
    return SimpleNamespace(x=value)


@pytest.mark.parametrize(
    ("check", "right", "wrong", "says"),
    [
        (lambda m: check_whole(m, "x"), [1, 7], [0, -1, 2.0, True, "1", None, math.nan], "a whole number ≥ 1"),
        (lambda m: check_whole(m, "x", least=0), [0, 1], [-1, False], "a whole number ≥ 0"),
        (lambda m: check_number(m, "x", above=0), [0.1, 3], [0, -1.0, math.nan, math.inf, True, None], "a number > 0"),
        (lambda m: check_number(m, "x", least=0, below=1), [0, 0.5], [1, 1.5, -0.1], "a number ≥ 0 and < 1"),
        (lambda m: check_number(m, "x"), [-5, 0.0], [math.inf, -math.inf, math.nan], "a number"),
        (lambda m: check_number(m, "x", above=0, hint=" (usual: 1)"), [1], [0], r"a number > 0 \(usual: 1\)"),
        (lambda m: check_fraction(m, "x"), [1e-9, 1, 1.0], [0, 1.1, -1, True, "half", math.nan], r"in \(0, 1\]"),
        (lambda m: check_choice(m, "x", ("a", "b")), ["a", "b"], ["c", None], "one of 'a', 'b'"),
    ],
)  # fmt: skip
def test_a_check_lets_through_what_makes_sense_and_says_what_was_given_and_expected(
    check, right, wrong, says
):
    for value in right:
        check(holding(value))
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^x is .*; it must be {says}") as error:
            check(holding(value))
        assert repr(value) in str(error.value)


def test_names_become_a_tuple_and_a_string_or_nothing_stays():
    for given, kept in ((["a", "b"], ("a", "b")), (("a",), ("a",)), ("a.*", "a.*"), (None, None), ([], ())):
        method = holding(given)
        check_names(method, "x")
        assert method.x == kept
        assert type(method.x) is type(kept)
    for wrong in (5, [1, 2], ("a", None)):
        with pytest.raises(
            ValueError, match=r"x is .*; it must be names of modules, such as \('q_proj', 'v_proj'\)"
        ):
            check_names(holding(wrong), "x")
    with pytest.raises(ValueError, match=r"modules_to_save is a string; write \('head',\)"):
        check_names(SimpleNamespace(modules_to_save="head"), "modules_to_save")


def test_examples_are_asked_for_and_their_labels_where_the_choice_needs_them():
    examples = class_examples(2)
    without = [{"input_ids": torch.tensor([1, 2])}]
    assert check_examples(FishMask(), examples) is examples
    assert check_examples(FishMask(), without, labels=False) is without
    for nothing in (None, []):
        with pytest.raises(ValueError, match=r"FishMask chooses by data: attach\(model, examples\), encoded"):
            check_examples(FishMask(), nothing)
    with pytest.raises(
        ValueError, match=r"FishMask .*needs labels, and an example has only input_ids: add labels"
    ):
        check_examples(FishMask(), without)


# ---- the methods that ask


@pytest.mark.parametrize("method", [FishDip(), SecondOrderMask(), SecondOrderMask(damping=0.1)])
def test_a_chooser_without_labels_says_so(method):
    model = llama_classifier()
    without = [{k: v for k, v in e.items() if k != "labels"} for e in class_examples(4)]
    with pytest.raises(ValueError, match="needs labels, and an example has only input_ids"):
        method.attach(model, without)
    assert adapted(model) is None


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, "half", True, math.nan])
@pytest.mark.parametrize("cls", [PaFi, LastLayers, FishMask, FishDip, SecondOrderMask, LTSFT])
def test_a_fraction_outside_is_refused(cls, fraction):
    with pytest.raises(ValueError, match=r"fraction is .*\(0, 1\]"):
        cls(fraction=fraction)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FishDip(share=2), "share is 2"),
        (lambda: FishMask(samples=0), "samples is 0"),
        (lambda: SecondOrderMask(damping=0), "damping is 0; it must be a number > 0, or None for h = 1"),
        (lambda: Masking(init_sparsity=0), "init_sparsity is 0"),
        (lambda: Masking(threshold=-0.02), "threshold is -0.02; it must be a number > -0.02"),
        (lambda: DiffPruning(alpha_lr=0), "alpha_lr is 0"),
        (lambda: AutoFreeze(interval=0), "interval is 0"),
        (lambda: AutoFreeze(percentile=101), "percentile is 101"),
        (lambda: ChildTuningF(seed=-1), "seed is -1"),
        (lambda: ChildTuningD(p_D=0), "p_D is 0"),
        (lambda: LTSFT(l1_weight=-1), "l1_weight is -1"),
        (lambda: PASTA(num_special=0), "num_special is 0"),
        (lambda: PASTA().attach(llama_classifier()), "special_token_ids is empty"),
        (lambda: FishDip().attach(llama_classifier()), "FishDip chooses by data"),
        (lambda: SecondOrderMask().attach(llama_classifier()), "SecondOrderMask chooses by data"),
        (lambda: DiffPruning().project(llama_classifier(), fraction=0), "fraction is 0"),
        (lambda: Masking().attach(llama_classifier()), "target_modules: this model has no"),
        (lambda: LoRA(modules_to_save="score"), r"write \('score',\)"),
    ],
)
def test_settings_of_methods_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
