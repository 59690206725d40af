"""The command line: `python -m pefttutor.authoring store|run|lint NB…`; exit status 1 when anything is wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from pefttutor.authoring.document import NotANotebook
from pefttutor.authoring.lint import lint
from pefttutor.authoring.store import NotStored, run, store


def main(arguments: list[str] | None = None) -> int:
    """Carry out one command on every notebook; return 0 if all is well, and 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m pefttutor.authoring", description=__doc__)
    parser.add_argument(
        "command", choices=("store", "run", "lint"), help="store: run and write; run: don't write"
    )
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NB")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds per cell (default: 300)"
    )
    options = parser.parse_args(arguments)
    command = {"store": _store, "run": _run, "lint": _lint}[options.command]
    return 1 if [path for path in options.notebooks if not command(path, options.timeout)] else 0


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
