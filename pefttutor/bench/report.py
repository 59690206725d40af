"""The table that a person reads and the JSON that a script reads."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pefttutor.bench.protocol import DISTURBED
from pefttutor.bench.run import Result

__all__ = ["environment", "table", "to_json"]

FORMAT = 1
PACKAGES = ("pefttutor", "torch", "transformers", "peft")


def environment(seed: int, device: str = "cpu") -> dict[str, Any]:
    """Versions, seed and the kind of machine; neither its name nor any path.

    >>> list(environment(seed=0)["versions"])
    ['pefttutor', 'torch', 'transformers', 'peft', 'python']
    """
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions | {"python": platform.python_version()},
        "seed": seed,
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        },
    }


def table(result: Result) -> str:
    """One row of the report: ratios, spread, disturbed rounds, bound, goals, difference, verdict.

    >>> result = Result(name="toy", work="ones", peer="numpy", bound=None, goals={}, tolerance=1e-4, verdict="no goal")
    >>> print(table(result))
    toy: ones; peer: numpy; on: cpu
      → no goal
    """
    threads = "" if result.threads is None else f"; threads: {result.threads}"
    lines = [f"{result.name}: {result.work}; peer: {result.peer}; on: {result.device}{threads}"]
    if result.time is not None:
        spread = f"quartiles {result.time.low:.3f} – {result.time.high:.3f}"
        disturbed = f"{result.disturbed} of {result.rounds} rounds disturbed"
        lines.append(
            f"  time       {result.time.median:.3f}   {_goal(result, 'time')}   {spread}, {disturbed}"
        )
    if result.bound_time is not None:
        lines.append(f"  bound      {result.bound_time.median:.3f}   {result.bound}")
    for kind, sides in result.bytes.items():
        ratio = result.ratio(kind)
        shown = "  –  " if ratio is None else f"{ratio:.3f}"
        megabytes = ", ".join(f"{side} {size / 1e6:.2f} MB" for side, size in sides.items())
        lines.append(f"  {kind:<10} {shown}   {_goal(result, kind)}   {megabytes}")
    if result.difference is not None:
        lines.append(f"  difference {result.difference:.1e} ({result.differs_in})")
    return "\n".join([*lines, f"  → {result.verdict}"])


def to_json(results: list[Result], seed: int, device: str = "cpu") -> str:
    """All figures, with the definition of a disturbed round and every single time.

    >>> json.loads(to_json([], seed=3))["disturbed_means"]
    'a side took over 1.25 times its own median'
    """
    data = {
        "format": FORMAT,
        **environment(seed, device),
        "disturbed_means": f"a side took over {DISTURBED} times its own median",
        "rows": [
            asdict(result) | {"ratios": {k: result.ratio(k) for k in result.goals}} for result in results
        ],
    }
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _goal(result: Result, kind: str) -> str:
    goal = result.goals.get(kind)
    return "no goal     " if goal is None else f"goal ≤ {goal:<5g}"


def _finite(value: Any) -> Any:
    """JSON knows no infinity: it becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
