"""A section of a lesson, and what it needs of the rest."""

import nbformat
import pytest

from pefttutor.authoring.slices import needed, real_section
from pefttutor.authoring.store import NotStored, run


@pytest.mark.parametrize(
    ("sources", "kept"),
    [
        (["a = 1", "b = 2", "print(a)"], [0, 2]),
        (["a = 1", "a = 2", "print(a)"], [1, 2]),  # the last one before it
        (["a = 1", "print(a)", "a = 2"], [0, 1]),  # what comes after is none of it
        (["a = 1", "a += 1", "print(a)"], [0, 1, 2]),  # changed, so read
        (["n = 1", "for n in range(3):\n    pass", "for n in range(2):\n    print(n)"], [2]),
        (["k = 1", "def f(x, k=2):\n    return x + k", "print(f(1))"], [1, 2]),  # a name of its own
        (["k = 1", "def f(x):\n    return x + k", "print(f(1))"], [0, 1, 2]),
        (
            ["k = 1", "class A:\n    def f(self):\n        return [k for _ in 'ab']", "print(A().f())"],
            [0, 1, 2],
        ),
        (["%pip install x\nimport os.path as p", "!ls", "p.join()"], [0, 2]),
        (["from os import path", "with open('x') as f:\n    path = f", "print(path)"], [1, 2]),
        (["a = 1", "a = 2\nprint(a)"], [1]),
        (["a = 1", "if True:\n    a = 2\n    print(a)"], [1]),
        (["a = 1", "if True:\n    a = a + 2\n    print(a)"], [0, 1]),
        (["a = 1", "while a:\n    try:\n        print(a)\n    except ValueError:\n        pass"], [0, 1]),
        (
            ["def f():\n    found = 0\n    found += 1", "found = 2", "def g():\n    found = 1\nprint(g())"],
            [2],
        ),
    ],
)
def test_what_a_cell_needs(sources, kept):
    place = max(i for i, source in enumerate(sources) if "print(" in source or "p.join" in source)
    assert needed(sources, [place]) == kept


def lesson(tmp_path, last):
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    asks = "import os\nREAL = os.environ.get('PEFTTUTOR_REAL') == '1'"
    cells = [
        text("# A lesson"), code("a = 1"), code("raise RuntimeError('no need')"), text("## Exercises"), code("b = 3"),
        text("## The same on a real model"), code(asks), code(last), text("## Sources"), code("1 / 0"),
    ]  # fmt: skip
    path = tmp_path / "13_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path, cells


def test_the_section_on_real_models_runs_alone(tmp_path):
    path, cells = lesson(tmp_path, "print(REAL, a + b)")
    assert real_section(cells) == [6, 7]
    assert real_section(cells[:5]) == []
    ran = run(path, real=True, alone=True).cells
    assert [cell.source for cell in ran] == ["a = 1", "b = 3", cells[6].source, "print(REAL, a + b)"]
    assert ran[-1].outputs[0].text == "True 4\n"


def test_an_error_in_it_is_one(tmp_path):
    path, _ = lesson(tmp_path, "assert a > b, 'too small'")
    with pytest.raises(NotStored, match="AssertionError: too small"):
        run(path, real=True, alone=True)
