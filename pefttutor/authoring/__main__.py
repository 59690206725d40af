"""The command line: `python -m pefttutor.authoring store|run|lint NB…`, or `… tables [--train] [NAME…]`.

The exit status is 1 when anything is wrong, or when a table is out of date and wasn't trained.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from pefttutor.authoring.document import NotANotebook
from pefttutor.authoring.lint import lint
from pefttutor.authoring.retraining import scripts, state, train
from pefttutor.authoring.store import NotStored, run, store


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command on every notebook; return 0 if all is well, and 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m pefttutor.authoring", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="store|run|lint|tables")
    for name, what in (
        ("store", "run and write"),
        ("run", "run, and don't write"),
        ("lint", "read as documents"),
    ):
        notebooks = commands.add_parser(name, help=f"{what}: notebooks")
        notebooks.add_argument("notebooks", nargs="+", type=Path, metavar="NB")
        notebooks.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a cell (300)")
    tables = commands.add_parser(
        "tables", help="say which tables of data/lessons are out of date, and train them"
    )
    tables.add_argument(
        "names", nargs="*", metavar="NAME", help="such as 09/compare_masks or 09 (default: all)"
    )
    tables.add_argument(
        "--train", action="store_true", help="train those that are out of date, two runs at a time"
    )
    options = parser.parse_args(arguments)
    if options.command == "tables":
        return _tables(options.names, training=options.train)
    command = {"store": _store, "run": _run, "lint": _lint}[options.command]
    return 1 if [path for path in options.notebooks if not command(path, options.timeout)] else 0


def _tables(names: list[str], *, training: bool) -> int:
    try:
        found = [(script, state(script)) for script in scripts(names)]
        for _, known in found:
            print(known, flush=True)
        left = [script for script, known in found if known.why]
        if left and not training:
            print(f"{len(left)} of {len(found)} to train: python -m pefttutor.authoring tables --train")
            return 1
        for script in left:
            print(
                f"{script.parent.name}/{script.stem}: trained in {train(script) / 60:.0f} minutes", flush=True
            )
    except (ValueError, RuntimeError) as error:
        print(f"not trained: {error}", file=sys.stderr)
        return 1
    return 0


def _store(path: Path, timeout_s: float) -> bool:
    start = time.perf_counter()
    try:
        changed = store(path, timeout_s=timeout_s)
    except (NotStored, NotANotebook) as error:
        print(f"not stored: {error}", file=sys.stderr)
        return False
    print(f"{path}: {'stored' if changed else 'unchanged'} ({time.perf_counter() - start:.0f} s)")
    return True


def _run(path: Path, timeout_s: float) -> bool:
    """Run with what is asked for in PEFTTUTOR_REAL, and show what the cells printed."""
    try:
        notebook = run(path, real=os.environ.get("PEFTTUTOR_REAL") == "1", timeout_s=timeout_s)
    except (NotStored, NotANotebook) as error:
        print(f"failed: {error}", file=sys.stderr)
        return False
    for cell in notebook.cells:
        shown = "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")
        if shown:
            print(f"[{cell.id}] {shown.rstrip()}")
    return True


def _lint(path: Path, _timeout_s: float) -> bool:
    problems = lint(path)
    print("\n".join(map(str, problems)) if problems else f"{path.name}: nothing to mend")
    return not problems


if __name__ == "__main__":
    raise SystemExit(main())
