"""Run a lesson in a fresh kernel, clean what it showed, and write it in its canonical form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from pefttutor.authoring.document import WIDGET_VIEW, Document, canonical, joined, name_of
from pefttutor.authoring.environment import kernel_environment
from pefttutor.saving.files import write_atomically

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_METADATA = ("tags", "jupyter", "jp-MarkdownHeadingCollapsed", "alt")
NOTEBOOK_METADATA = ("browser_check",)
FORMAT = (4, 5)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class NotStored(RuntimeError):
    """The notebook did not run, or showed what must not be stored; its file is as it was.

    >>> warning = nbformat.v4.new_output("stream", name="stderr", text="a warning")
    >>> notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("f()", id="call", outputs=[warning])])
    >>> cleaned(notebook, "12_lora.ipynb")
    Traceback (most recent call last):
    pefttutor.authoring.store.NotStored: 12_lora.ipynb [call] wrote to stderr: 'a warning'; silence its cause
    """


def store(path: Path | str, *, timeout_s: float = 300) -> bool:
    """Run the notebook and write what it showed; False when the file already said exactly that.

        store("notebooks/12_lora.ipynb")

    Raises: NotStored when a cell raises without the tag `raises-exception`, is too slow, kills the kernel, writes to
        stderr, or shows a widget without its picture; NotANotebook when the file can't be read.
    """
    path = Path(path)
    before = Document(path).text
    after = canonical(cleaned(run(path, timeout_s=timeout_s), path.name))
    if after == before:
        return False
    write_atomically(path, after)
    return True


def run(path: Path | str, *, real: bool = False, timeout_s: float = 300) -> Any:
    """Run the notebook in a fresh kernel, in its own folder, and return it with its outputs; nothing is written.

        run("notebooks/12_lora.ipynb").cells[3].outputs

    real: ask for the section on real models (PEFTTUTOR_REAL=1), which takes minutes.

    Raises: NotStored when a cell raises without the tag `raises-exception`, is too slow, or kills the kernel;
        NotANotebook when the file can't be read.
    """
    path = Path(path).resolve()
    notebook = prepared(Document(path))
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook,
        timeout=int(timeout_s),
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # the kernel's own advice is no business of the author's
    )
    started: list[Any] = []
    client.on_cell_start = lambda cell, cell_index: started.append(cell)
    try:
        client.execute(env=kernel_environment(real=real))
        return notebook
    except CellExecutionError as error:
        what = f"raised {error.ename}: {_COLOUR.sub('', error.evalue)}"
    except CellTimeoutError:
        what = f"ran longer than {timeout_s:g} s"
    except DeadKernelError:
        what = "killed the kernel (out of memory?)"
    raise NotStored(f"{path.name} [{name_of(started[-1], notebook.cells)}] {what}")


def prepared(document: Document) -> Any:
    """The notebook as it goes into the kernel: every cell with an id of its own, no outputs, no counts."""
    notebook = document.notebook
    notebook.nbformat, notebook.nbformat_minor = FORMAT
    taken: set[str] = set()
    for cell in document.cells:
        cell.id = _free_id(cell, taken)
        taken.add(cell.id)
        cell.metadata = nbformat.from_dict(
            {k: v for k, v in cell.get("metadata", {}).items() if k in CELL_METADATA}
        )
        cell.source = cell.source.rstrip()
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def _free_id(cell: Any, taken: set[str]) -> str:
    """The cell's own id where it has a good one; else text-1, code-2, …"""
    cell_id = cell.get("id") or ""
    if _ID.fullmatch(cell_id) and cell_id not in taken:
        return cell_id
    stem = "code" if cell.cell_type == "code" else "text"
    return next(f"{stem}-{n}" for n in range(1, 10_000) if f"{stem}-{n}" not in taken)


def cleaned(notebook: Any, name: str) -> Any:
    """The notebook that ran, without what only a live kernel can use and what only this machine would say.

    >>> notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("f()", execution_count=7)])
    >>> cleaned(notebook, "12_lora.ipynb").cells[0].execution_count
    1

    Raises: NotStored for text on stderr, or a widget without a picture.
    """
    code = [joined(cell) for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        where = f"{name} [{name_of(cell, notebook.cells)}]"
        cell.execution_count = count
        cell.outputs = [_clean_output(output, count, where) for output in _merged(cell.outputs)]
    metadata = {k: v for k, v in notebook.metadata.items() if k in NOTEBOOK_METADATA}
    header = {**metadata, "kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    notebook.metadata = nbformat.from_dict(header)
    return notebook


def _merged(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of one stream as one: where the kernel flushes is a matter of time."""
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def _clean_output(output: Any, count: int, where: str) -> Any:
    if output.output_type == "stream" and output.name == "stderr":
        raise NotStored(f"{where} wrote to stderr: {output.text.strip()[:200]!r}; silence its cause")
    if output.output_type == "execute_result":
        output.execution_count = count
    if output.output_type == "error":
        # Frames name files of this machine; nbval compares the name and the message.
        output.traceback = [f"{output.ename}: {output.evalue}"]
    if WIDGET_VIEW in output.get("data", {}):
        del output.data[WIDGET_VIEW]
        output.metadata.pop(WIDGET_VIEW, None)
        if "image/png" not in output.data:
            raise NotStored(
                f"{where} shows a widget without a picture: nothing would be left where no kernel runs. "
                "Show a pefttutor.widgets.Explorer, or call display() on a figure first"
            )
    return output
