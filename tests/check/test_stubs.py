"""Every exercise as its notebook poses it: an untouched stub gets the reference, and the reference is right."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pefttutor import check
from pefttutor.check.core import CORRECT, NOT_ATTEMPTED

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
REFERENCES = {
    "00": ("count_parameters", "train_only", "token_accuracy"),
    "02": ("static_bytes", "feed_forward_bytes", "kv_cache_bytes"),
    "03": ("with_prompt", "label_start", "mixed_batch", "vote"),
    "04": ("prefix_attention", "prefix_share", "layer_pairs", "MadeByMLP"),
    "05": ("Bottleneck", "adapted_sublayer", "adapter_count", "for_all_tasks"),
    "06": ("shares", "fused_sublayer", "fusion_start", "penalty"),
    "07": ("steered", "write_steered", "steered_top", "two_row_linear"),
    "08": ("bias_names", "smallest_masks", "masked_step"),
    "09": ("true_fisher", "squared_gradients", "fish_masks"),
    "10": ("masked_gradients", "share_outside", "masked_adamw", "paired"),
    "11": ("masked_linear", "hard_concrete", "second_order_mask", "best_fall"),
    "12": ("lora_forward", "merged_weight", "count_lora", "truncate"),
    "13": ("restarted", "mora_branch", "melora_branch", "cut_moment"),
    "14": ("orthogonality", "importance", "budget", "proximal"),
    "15": ("dora_forward", "singular_start", "direction_gradient", "row_norms"),
    "22": ("tuned", "expected_best", "intruders", "shrunk", "stepped_back", "first_step"),
    "24": ("lottery_difference", "hard_fisher", "composed"),
}
EXERCISES = {
    f"{lesson}.{i}": name for lesson, names in REFERENCES.items() for i, name in enumerate(names, start=1)
}
every_exercise = pytest.mark.parametrize("number", EXERCISES)


def checked(number: str) -> Callable[[Any], Any]:
    return getattr(check, f"ex{number.replace('.', '_')}")


@cache
def posed(number: str) -> Callable[..., Any]:
    """The stub as it stands in the notebook."""
    lessons = sorted(NOTEBOOKS.glob(f"{number[:2]}*_*.ipynb"))  # and its appendix
    cells = [cell for path in lessons for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or f'NotImplementedError("exercise {number}")' not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == EXERCISES[number]:
                there: dict[str, Any] = {"nn": nn}  # what a class is made of
                exec(f"from __future__ import annotations\n{ast.unparse(node)}", there)
                return there[node.name]
    names = ", ".join(path.name for path in lessons)
    raise AssertionError(f"no stub {EXERCISES[number]} that raises for exercise {number} in {names}")


@every_exercise
def test_an_untouched_stub_is_told_and_gets_the_reference(number, capsys):
    reference = checked(number)(posed(number))
    assert reference.__name__ == EXERCISES[number]
    assert reference.__module__.startswith("pefttutor.check.")
    assert capsys.readouterr().out == NOT_ATTEMPTED.format(number) + "\n"


@every_exercise
def test_the_reference_is_right_and_comes_back_itself(number, capsys):
    reference = checked(number)(posed(number))
    capsys.readouterr()
    assert checked(number)(reference) is reference
    assert capsys.readouterr().out == CORRECT.format(number) + "\n"


@every_exercise
def test_the_stub_takes_what_the_reference_takes(number):
    reference = checked(number)(posed(number))
    assert list(inspect.signature(posed(number)).parameters) == list(inspect.signature(reference).parameters)
