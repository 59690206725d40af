"""The package's face: lazy names, and what importing it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pefttutor


def in_a_new_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_importing_the_package_loads_nothing_else():
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib', 'ipywidgets'}"
    assert in_a_new_python(f"import sys, pefttutor; print(sorted({heavy} & set(sys.modules)))") == "[]"
    heavy = "{'transformers', 'datasets', 'matplotlib', 'ipywidgets'}"
    code = f"import sys, pefttutor; pefttutor.LoRA, pefttutor.save; print(sorted({heavy} & set(sys.modules)))"
    assert in_a_new_python(code) == "[]"


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({}, "PASSIVE 1000"),
        ({"OMP_WAIT_POLICY": "passive"}, "passive 1000"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ],
)
def test_idle_threads_soon_sleep_unless_someone_chose_otherwise(chosen, says):
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    code = (
        f"import os; [os.environ.pop(name, None) for name in {names}]; os.environ.update({chosen}); "
        f"import pefttutor; print(*(os.environ.get(name) for name in {names}))"
    )
    assert in_a_new_python(code) == says


def test_every_name_that_the_package_lists_exists():
    assert {"LoRA", "fit", "save", "load", "freeze", "models"} <= set(dir(pefttutor))
    for name in pefttutor._FUNCTIONS | pefttutor.methods():
        assert callable(getattr(pefttutor, name))


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(AttributeError, match=r"pefttutor has no 'Lora'; it has .*LoRA"):
        pefttutor.Lora  # noqa: B018
    assert not hasattr(pefttutor, "__wrapped__")
