"""The command line: `python -m pefttutor.notebooks store|run|lint NB…`; exit status 1 when anything is wrong."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pefttutor.notebooks", description=__doc__)
    parser.add_argument(
        "command", choices=("store", "run", "lint"), help="store: run and write; run: don't write"
    )
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NB")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds per cell (default: 300)"
    )
    given = parser.parse_args(arguments)
    commands = {"store": _store, "run": _run, "lint": _lint}
    failures = sum([not commands[given.command](path, given.timeout) for path in given.notebooks])
    return 1 if failures else 0


def _store(path: Path, timeout_s: float) -> bool:
    from pefttutor.notebooks.store import NotStored, store

    start = time.perf_counter()
    try:
        changed = store(path, timeout_s=timeout_s)
    except NotStored as error:
        print(f"not stored: {error}", file=sys.stderr)
        return False
    print(f"{path}: {'stored' if changed else 'unchanged'} ({time.perf_counter() - start:.0f} s)")
    return True


def _run(path: Path, timeout_s: float) -> bool:
    """Run with what is asked for in PEFTTUTOR_REAL, and show what the cells printed."""
    from pefttutor.notebooks.store import NotStored, run

    try:
        notebook = run(path, real=os.environ.get("PEFTTUTOR_REAL") == "1", timeout_s=timeout_s)
    except NotStored as error:
        print(f"failed: {error}", file=sys.stderr)
        return False
    for cell in notebook.cells:
        printed = "".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream")
        if printed:
            print(f"[{cell.id}] {printed.rstrip()}")
    return True


def _lint(path: Path, timeout_s: float) -> bool:
    from pefttutor.notebooks.lint import lint

    problems = lint(path)
    print("\n".join(map(str, problems)) if problems else f"{path.name}: nothing to mend")
    return not problems


if __name__ == "__main__":
    raise SystemExit(main())
