"""`python -m pefttutor.authoring`: what it stores, what it refuses, and that every rule of lint fires."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from pefttutor.authoring import lesson as lesson_rules
from pefttutor.authoring.__main__ import main
from pefttutor.authoring.document import Document, canonical
from pefttutor.authoring.environment import kernel_environment
from pefttutor.authoring.lint import RULES, lint
from pefttutor.authoring.store import KERNELSPEC, NotStored, cleaned, run, store

SETUP = 'import sys\n\nif "google.colab" in sys.modules:\n    %pip install -q pefttutor'
BOX = """<div class="alert alert-info">

You will be able to write LoRA. Come here after lesson 00; do that first. 40 minutes to read, 60 seconds to run,
0 bytes downloaded. Paper: Hu et al. 2021, section 4.1, eq. 3.

</div>"""
HELP = """<details><summary>Hint</summary>

Shapes.

</details>
<details><summary>Second hint</summary>

More shapes.

</details>
<details><summary>Solution</summary>

B @ A

</details>"""
ANSWERS = "\n\n".join(f"{n}. Why?\n\n<details><summary>Answer</summary>\n\nSo.\n\n</details>" for n in "123")
PNG = "iVBORw0KGgo="


def text(source, cell_id):
    return nbformat.v4.new_markdown_cell(source, id=cell_id)


def code(source, cell_id, *outputs, tags=(), **metadata):
    if tags:
        metadata["tags"] = list(tags)
    return nbformat.v4.new_code_cell(source, id=cell_id, outputs=list(outputs), metadata=metadata)


def printed(words, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=words)


def value(words):
    return nbformat.v4.new_output("execute_result", data={"text/plain": words})


def figure(alt="bars that fall from left to right"):
    data = {"text/plain": "<Figure size 300x200 with 1 Axes>", "image/png": PNG}
    return nbformat.v4.new_output("display_data", data=data, metadata={"image/png": {"alt": alt}})


def error(name="ValueError", words="no"):
    return nbformat.v4.new_output("error", ename=name, evalue=words, traceback=[f"{name}: {words}"])


def exercise(nth):
    stub = f'def f{nth}(x):\n    raise NotImplementedError("exercise 12.{nth}")'
    return [
        text(f"### Exercise 12.{nth} (easy, 5 minutes)\n\nWrite it.", f"exercise-{nth}"),
        code(stub, f"stub-{nth}"),
        code(f"f{nth} = check.ex12_{nth}(f{nth})", f"check-{nth}", printed("not attempted yet\n")),
        text(HELP, f"help-{nth}"),
    ]


def lesson():
    """A lesson in which lint finds nothing."""
    steps = []
    for n in range(9):
        steps += [
            text(f"## Step {n}\n\n" + "word " * 120, f"step-{n}"),
            code(f"print({n})", f"print-{n}", printed(f"{n}\n")),
        ]
    cells = [
        text("# 12 · LoRA\n\nA promise.", "title"),
        text(BOX, "box"),
        code(SETUP, "setup"),
        text(
            "## Notation\n\n| symbol | code | shape |\n|---|---|---|\n| A | `lora_A` | (r, in) |", "notation"
        ),
        text("## Predict\n\nHow many?", "predict"),
        *steps,
        text("## Is it the real thing?", "real-thing"),
        text("## Paper, official code, library", "library"),
        text("## Look inside", "look"),
        code("figure", "figure", figure()),
        text("## What it costs", "cost"),
        code(
            "seconds = measure()\nassert seconds < 9",
            "timing",
            printed("0.123456 s\n"),
            tags=["nbval-ignore-output"],
        ),
        text("## Exercises", "exercises"),
        *exercise(1),
        *exercise(2),
        text("## Summary\n\nDone.\n\n" + ANSWERS, "summary"),
        text("Next: [13](13_next.ipynb)", "next"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    for count, cell in enumerate([cell for cell in cells if cell.cell_type == "code"], start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    return notebook


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "13_next.ipynb").write_text('{"cells": []}')
    return tmp_path


def written(folder, notebook, name="12_lora.ipynb"):
    path = folder / name
    path.write_text(canonical(notebook), encoding="utf-8")
    return path


def at(notebook, cell_id):
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def put(cell_id, source=None, *, outputs=None, tags=None):
    """A change: another source, other outputs, other tags for one cell."""

    def change(notebook):
        cell = at(notebook, cell_id)
        if source is not None:
            cell.source = source
        if outputs is not None:
            cell.outputs = outputs
        if tags is not None:
            cell.metadata["tags"] = tags

    return change


def add(cell_id, words):
    return lambda notebook: at(notebook, cell_id).update(source=at(notebook, cell_id).source + words)


def drop(*cell_ids):
    def change(notebook):
        notebook.cells = [cell for cell in notebook.cells if cell.id not in cell_ids]

    return change


def top(**metadata):
    return lambda notebook: notebook.metadata.update(nbformat.from_dict(metadata))


def ignore_nearly_all(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.id.startswith("check"):
            cell.source, cell.metadata["tags"] = "assert True", ["nbval-ignore-output"]


def test_a_good_lesson_has_nothing_to_mend(folder):
    assert lint(written(folder, lesson())) == []


LONG = "\n".join(f"x = {n}" for n in range(30))
SVG = nbformat.v4.new_output("display_data", data={"image/svg+xml": "<svg/>", "text/plain": "a"})
VIEW = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "a"}
BAD = [
    # the stored form
    ("kernel", top(kernelspec={"name": "julia"})),
    ("widget-state", top(widgets={"state": {}})),
    ("widget-state", put("print-1", outputs=[nbformat.v4.new_output("display_data", data=VIEW)])),
    ("size", put("print-1", outputs=[printed("x" * 500_000)])),
    ("execution-counts", lambda notebook: at(notebook, "print-1").update(execution_count=None)),
    ("execution-counts", lambda notebook: at(notebook, "print-1").update(execution_count=40)),
    ("empty-cell", put("print-1", "")),
    ("cell-ids", lambda notebook: at(notebook, "print-1").update(id="print-2")),
    ("cell-ids", lambda notebook: at(notebook, "print-1").update(id="two words")),
    # outputs
    ("stderr", put("print-1", outputs=[printed("a warning\n", "stderr")])),
    ("path", put("print-1", outputs=[printed("saved to /home/anna/model\n")])),
    ("path", put("print-1", outputs=[printed("saved to C:\\Users\\anna\n")])),
    ("address", put("print-1", outputs=[value("<function f at 0x7fa39deb04a0>")])),
    ("progress", put("print-1", outputs=[printed(" 40%|####      | 2/5 [00:01, 2.0it/s]\n")])),
    ("error", put("print-1", outputs=[error()])),
    ("error", put("print-1", tags=["raises-exception"])),
    ("error", put("print-1", outputs=[error()], tags=["nbval-raises-exception"])),
    ("picture", put("print-1", outputs=[SVG])),
    ("alt", put("figure", outputs=[figure(alt="")])),
    ("alt", put("figure", outputs=[figure(alt="a figure")])),
    # comparable
    ("compared", ignore_nearly_all),
    ("compared", put("print-1", tags=["nbval-skip"])),
    ("compared", put("print-1", "# NBVAL_SKIP\nprint(1)")),
    ("asserts", put("timing", "seconds = measure()")),
    ("bare-value", put("print-1", outputs=[value("0.25")])),
    ("bare-value", put("print-1", outputs=[value("tensor([1.])")])),
    ("digits", put("print-1", outputs=[printed("loss 0.123456\n")])),
    # code
    ("semicolon", put("print-1", "plot();")),
    ("shell", put("print-1", "!ls")),
    ("syntax", put("print-1", "print(1")),
    ("output-widget", put("print-1", "from ipywidgets import interact\ninteract(f, x=3)")),
    ("output-widget", put("print-1", "import ipywidgets as widgets\nout = widgets.Output()")),
    # anatomy
    ("title", add("step-1", "\n\n# Another title")),
    ("title", put("title", "## LoRA")),
    ("title", put("title", "# 13 · LoRA")),
    ("title", lambda notebook: notebook.cells.insert(0, notebook.cells.pop(1))),
    ("box", put("box", "No box.")),
    ("box", put("box", BOX.replace("0 bytes downloaded", ""))),
    ("box", put("box", BOX.replace("40 minutes to read, ", ""))),
    ("setup", put("setup", "import torch")),
    ("setup", put("setup", SETUP + " torch")),
    ("notation", put("notation", "## Symbols")),
    ("notation", put("notation", "## Notation\n\nA is `lora_A`.")),
    ("prediction", put("predict", "## A question")),
    ("real-thing", put("real-thing", "## Compared")),
    ("paper-library", put("library", "## Elsewhere")),
    ("look-inside", put("look", "## A figure")),
    ("cost", put("cost", "## Numbers")),
    (
        "exercises",
        lambda notebook: [c.update(source=c.source.replace("Exercise", "Task")) for c in notebook.cells],
    ),
    ("summary", put("summary", "## The end\n\n" + ANSWERS)),
    # links, pictures, budget
    ("link", add("step-1", " [lesson](99_none.ipynb)")),
    ("link", add("step-1", " ![a picture of four words](images/none.png)")),
    ("remote", add("step-1", " ![a picture of four words](https://example.org/a.png)")),
    ("alt", add("step-1", " ![](13_next.ipynb)")),
    ("alt", add("step-1", ' <img src="13_next.ipynb">')),
    ("next", put("next", "The end.")),
    ("budget", drop(*(f"{kind}-{n}" for n in range(3) for kind in ("step", "print")))),
    ("budget", add("step-1", " word" * 2000)),
    ("budget", put("print-1", LONG)),
    # exercises
    ("exercises", drop("exercise-2", "stub-2", "check-2", "help-2")),
    ("exercise-check", put("check-1", "f1 = check.ex12_2(f1)")),
    ("exercise-check", put("check-1", "check.ex12_1(f1)")),
    ("exercise-check", put("check-1", "g = check.ex12_1(f1)")),
    ("exercise-stub", put("stub-1", "def f1(x):\n    return x")),
    ("exercise-stub", put("stub-1", 'def g(x):\n    raise NotImplementedError("exercise 12.1")')),
    ("exercise-text", put("exercise-1", "### Exercise 12.1\n\nWrite it.")),
    ("exercise-help", drop("help-1")),
    ("exercise-help", put("help-1", HELP.replace("Second hint", "Aside"))),
    ("exercise-help", put("help-1", HELP.replace("Solution", "Result"))),
    ("details", put("help-1", HELP.replace("<details><summary>Solution", "<details open><summary>Solution"))),
    ("details", put("help-1", HELP + "\n<details>")),
    ("details", add("step-1", "\n\n### Solution of 12.1\n\nB @ A")),
    ("self-check", put("summary", "## Summary\n\nDone.")),
]


@pytest.mark.parametrize(("rule", "change"), BAD, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(BAD)])
def test_each_rule_fires(rule, change, folder):
    notebook = lesson()
    change(notebook)
    problems = lint(written(folder, notebook))
    assert rule in {problem.rule for problem in problems}, problems


def test_every_rule_has_a_bad_lesson():
    """All names that the rules can give, read from their code, are in the table above."""
    sources = "".join(inspect.getsource(sys.modules[rule.__module__]) for rule in RULES)
    named = set(
        re.findall(r'\.problem\(\s*[^"\n]*?(?:"file"(?: if \w+ else "file")?)?, "([a-z-]+)",', sources)
    )
    named |= set(re.findall(r'yield "([a-z-]+)", "', sources)) | {part[0] for part in lesson_rules.PARTS}
    assert len(named) > 30
    assert named - {rule for rule, _ in BAD} == {"canonical", "name"}  # these two are about the file: below


def test_a_problem_says_where_and_what(folder):
    notebook = lesson()
    put("print-1", "plot();")(notebook)
    (problem,) = lint(written(folder, notebook))
    assert str(problem).startswith("12_lora.ipynb [print-1] semicolon: ")


def test_a_hand_stored_file_is_not_canonical(folder):
    path = written(folder, lesson())
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert {problem.rule for problem in lint(path)} == {"canonical"}


def test_a_file_name_without_a_number_is_a_problem(folder):
    assert "name" in {problem.rule for problem in lint(written(folder, lesson(), "lora.ipynb"))}


def test_an_appendix_may_leave_out_parts_of_the_anatomy_and_keeps_the_form(folder):
    notebook = lesson()
    notebook.cells = [cell for cell in notebook.cells if not cell.id.startswith(("stub", "check", "help"))][
        :6
    ]
    for count, cell in enumerate([cell for cell in notebook.cells if cell.cell_type == "code"], start=1):
        cell.execution_count = count
    first = notebook.cells[0]
    title = first.source.replace("# 12 ", "# 12b ", 1)
    assert title != first.source
    wrong = {problem.rule for problem in lint(written(folder, notebook, "12b_more.ipynb"))}
    first.source = title
    assert "title" in wrong
    assert lint(written(folder, notebook, "12b_more.ipynb")) == []
    assert "exercises" in {problem.rule for problem in lint(written(folder, notebook, "12_more.ipynb"))}


def appendix(letter, nth, folder):
    title = text(f"# 12{letter} More\n\n{BOX}", "title")
    cells = [title, code(SETUP, "setup"), *exercise(nth)]
    for count, cell in enumerate([cell for cell in cells if cell.cell_type == "code"], start=1):
        cell.execution_count = count
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=lesson().metadata)
    return written(folder, notebook, f"12{letter}_more.ipynb")


@pytest.mark.parametrize(("nth", "rules"), [(3, set()), (1, {"exercise-check"})])
def test_an_appendix_s_exercises_go_on_from_its_lesson_s(nth, rules, folder):
    written(folder, lesson(), "12_lora.ipynb")
    assert {problem.rule for problem in lint(appendix("b", nth, folder))} == rules


@pytest.mark.parametrize(("nth", "rules"), [(4, set()), (3, {"exercise-check"})])
def test_a_second_appendix_s_exercises_go_on_from_the_first_one_s(nth, rules, folder):
    written(folder, lesson(), "12_lora.ipynb")
    first, second = appendix("b", 3, folder), appendix("c", nth, folder)
    assert lint(first) == [], "what comes later doesn't count"
    assert {problem.rule for problem in lint(second)} == rules


def test_a_broken_file_is_one_problem(tmp_path):
    path = tmp_path / "12_lora.ipynb"
    path.write_text("{")
    assert [problem.rule for problem in lint(path)] == ["notebook"]


# store: each of these starts a kernel


def notebook_of(*cells, folder, name="01_a.ipynb"):
    return written(folder, nbformat.v4.new_notebook(cells=list(cells)), name)


def test_store_writes_one_canonical_form_and_then_leaves_it(folder):
    figure_cell = (
        "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])\nplt.show()\n"
        "class Shown:\n    def _repr_mimebundle_(self, **_):\n        return "
        '{"text/plain": "a slider", "image/png": "iVBORw0KGgo=", '
        '"application/vnd.jupyter.widget-view+json": {"model_id": "7"}}\nShown()'
    )
    path = notebook_of(
        text("# 01", "title"),
        code("import os, sys\nprint('a', flush=True)\nprint('b')\nos.path.basename(os.getcwd())", "own-id"),
        code("print(os.environ['PYTHONHASHSEED'], os.environ.get('PEFTTUTOR_REAL'))", "twin"),
        code(figure_cell, "figure", collapsed=True, tags=["keep"]),
        code("raise ValueError('as it should')", "raises", tags=["raises-exception"]),
        code("1 + 1", "sum"),
        folder=folder,
    )
    path.write_text(path.read_text().replace('"twin"', '"own-id"'))
    assert store(path) is True
    first = path.read_bytes()
    notebook = Document(path).notebook
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code_cells] == [1, 2, 3, 4, 5]
    assert [cell.id for cell in notebook.cells] == ["title", "own-id", "code-1", "figure", "raises", "sum"]
    assert "".join(code_cells[0].outputs[0].text) == "a\nb\n"
    assert code_cells[0].outputs[1].data["text/plain"] == [repr(folder.name)]
    assert code_cells[1].outputs[0].text == ["0 None\n"]
    assert code_cells[2].metadata == {"tags": ["keep"]}
    assert sorted(code_cells[2].outputs[1].data) == ["image/png", "text/plain"]
    assert code_cells[3].outputs[0].traceback == ["ValueError: as it should"]
    assert sorted(notebook.metadata) == ["kernelspec", "language_info"]
    assert store(path) is False
    assert path.read_bytes() == first
    assert [entry.name for entry in folder.iterdir() if "tmp" in entry.name] == []


@pytest.mark.parametrize(
    ("source", "timeout_s", "words"),
    [
        (
            "import os\nraise ValueError(os.environ['PEFTTUTOR_REAL'])",
            60,
            r"01_a.ipynb \[bad\] raised ValueError: 1",
        ),
        ("import time\ntime.sleep(60)", 2, r"\[bad\] ran longer than 2 s"),
        ("import os\nos._exit(1)", 60, r"\[bad\] killed the kernel"),
    ],
)
def test_a_run_that_fails_names_the_cell_and_leaves_the_file(source, timeout_s, words, folder):
    path = notebook_of(text("# 01", "title"), code("1", "good"), code(source, "bad"), folder=folder)
    before = path.read_bytes()
    with pytest.raises(NotStored, match=words):
        run(path, real=True, timeout_s=timeout_s)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (printed("a warning", "stderr"), r"01_a.ipynb \[bad\] wrote to stderr: 'a warning'"),
        (nbformat.v4.new_output("display_data", data=VIEW), r"\[bad\] shows a widget without a picture"),
    ],
)
def test_what_must_not_be_stored_is_refused(output, words):
    with pytest.raises(NotStored, match=words):
        cleaned(nbformat.v4.new_notebook(cells=[code("f()", "bad", output)]), "01_a.ipynb")


def test_a_failing_store_leaves_the_file(folder, capsys):
    path = notebook_of(code("1 / 0", "bad"), folder=folder)
    before = path.read_bytes()
    assert main(["store", str(path)]) == 1
    assert (
        capsys.readouterr().err == "not stored: 01_a.ipynb [bad] raised ZeroDivisionError: division by zero\n"
    )
    assert path.read_bytes() == before


def test_a_kernel_gets_our_environment_and_our_package(monkeypatch):
    monkeypatch.setenv("PEFTTUTOR_REAL", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = kernel_environment()
    assert "PEFTTUTOR_REAL" not in environment
    assert environment["OMP_NUM_THREADS"] == "1"
    first, second = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "pefttutor" / "authoring").is_dir()
    assert second == os.path.abspath("elsewhere")


def test_the_command_line_counts_what_failed(folder, capsys):
    good = written(folder, lesson())
    assert main(["lint", str(good)]) == 0
    assert capsys.readouterr().out == "12_lora.ipynb: nothing to mend\n"
    assert main(["lint", str(good), str(folder / "13_next.ipynb")]) == 1
    assert "13_next.ipynb [file] title: 0 first-level headings" in capsys.readouterr().out


def test_the_command_line_refuses_what_is_no_notebook(folder, capsys):
    (folder / "14_broken.ipynb").write_text("{")
    assert main(["store", str(folder / "14_broken.ipynb"), str(folder / "15_absent.ipynb")]) == 1
    said = capsys.readouterr().err
    assert "14_broken.ipynb" in said
    assert "15_absent.ipynb" in said


# nbval, as the plain command runs it


def test_no_cell_of_a_notebook_can_hang_the_check(pytestconfig):
    assert pytestconfig.option.nbval_cell_timeout <= 300
    assert pytestconfig.option.nbval_current_env


def test_pytest_nbval_is_strict_from_any_folder(tmp_path):
    """The root conftest.py in a project of its own, from a folder below: right passes, a different output fails."""
    root = Path(__file__).resolve().parents[2]
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    deep = tmp_path / "notebooks" / "deep"
    deep.mkdir(parents=True)
    shown = code("import os\nprint(os.environ['OMP_NUM_THREADS'])", "a", printed("1\n"))
    wrong = code("print(2)", "b", printed("3\n"))
    for count, cell in enumerate((shown, wrong), start=1):
        cell.execution_count = count
    written(deep, nbformat.v4.new_notebook(cells=[shown, wrong]), "01_a.ipynb")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # only nbval's: quicker
    environment.pop("PYTEST_ADDOPTS", None)  # such as another plugin's
    command = [sys.executable, "-m", "pytest", "-p", "nbval.plugin", "--nbval", "-q"]
    done = subprocess.run(command, cwd=deep, env=environment, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed" in done.stdout
    assert "mismatch 'stdout'" in done.stdout
