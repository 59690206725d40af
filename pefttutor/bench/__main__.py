"""`python -m pefttutor.bench [names…] [--device cuda] [--rounds N] [--json FILE] [--list]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from pefttutor.bench.report import table, to_json
from pefttutor.bench.row import discover
from pefttutor.bench.run import run


def main(arguments: list[str] | None = None) -> int:
    """Measure the rows whose names are given or begin with what is given; all of them without names."""
    parser = argparse.ArgumentParser(
        prog="python -m pefttutor.bench", description="Side-by-side measurements."
    )
    parser.add_argument("names", nargs="*", help="rows, or the beginning of their names (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--rounds", type=int, help="rounds per row (default: the row's own number)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--list", action="store_true", help="print the rows and their goals, measure nothing")
    options = parser.parse_args(arguments)
    rows = discover()
    unknown = [name for name in options.names if not any(known.startswith(name) for known in rows)]
    if unknown:
        parser.error(f"no row begins with {', '.join(unknown)}; there are: {', '.join(rows)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device is cuda, and torch {torch.__version__} finds no CUDA device here; leave --device out to measure "
            "on the CPU, or install a torch built for CUDA on a machine that has such a device"
        )
    results = []
    for name, row in rows.items():
        if options.names and not name.startswith(tuple(options.names)):
            continue
        if options.list:
            goals = (
                ", ".join(f"{kind} ≤ {goal:g}" for kind, goal in row.goals_on(options.device).items())
                or "no goal"
            )
            print(f"{name}: {row.work}; peer: {row.peer}; {goals}")
            continue
        results.append(run(row, rounds=options.rounds, seed=options.seed, device=options.device))
        print(table(results[-1]), flush=True)
        if options.json:  # after every row, so that an interrupted run leaves what it has
            options.json.write_text(to_json(results, options.seed, options.device))
    return 1 if any(result.verdict.startswith("not") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
