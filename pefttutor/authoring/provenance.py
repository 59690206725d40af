"""What a table stands on: its script, the model's weights, the tasks and the versions, as its header names them."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pefttutor.models.carriers import root

__all__ = ["digests", "provenance"]

DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def provenance(script: Path, *, model: str, tasks: Sequence[str], **settings: Any) -> dict[str, Any]:
    """The header of the table that `script`, in its lesson's folder of data/lessons, makes with an embedded model.

    >>> script = root() / "lessons" / "09" / "compare_masks.py"
    >>> provenance(script, model="campus-nano", tasks=("sentiment",), steps=200)["command"]
    'python data/lessons/09/compare_masks.py'
    """
    found = digests(script, model, tasks)
    return {
        "command": f"python data/lessons/{script.parent.name}/{script.name}",
        "script_sha256": found["script_sha256"],
        "model": model,
        "model_sha256": found["model_sha256"],
        "tasks": found["tasks"],
        **settings,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "pefttutor")},
    }


def digests(script: Path, model: str, tasks: Iterable[str]) -> dict[str, Any]:
    """sha256 of what the script says and of the model's weights, and the fingerprint of each task.

    What isn't there is "missing". A script's comments, docstrings and line breaks compute nothing, and aren't counted.
    """
    weights = root() / "models" / model / "model.safetensors"
    about = {task: root() / "tasks" / task / "task.json" for task in tasks}
    return {
        "script_sha256": _sha256(_said(script.read_text()).encode()) if script.exists() else "missing",
        "model_sha256": _sha256(weights.read_bytes()) if weights.exists() else "missing",
        "tasks": {
            task: json.loads(path.read_text())["fingerprint"] if path.exists() else "missing"
            for task, path in about.items()
        },
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _said(source: str) -> str:
    """The syntax tree without docstrings, places and empty fields, which differ between Python's versions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return repr(_plain(tree))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, ast.AST):
        return value
    fields = [
        (name, _plain(item)) for name, item in ast.iter_fields(value) if item is not None and item != []
    ]
    return type(value).__name__, fields
