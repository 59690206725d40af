"""The environment that a lesson's kernel gets, from `store` and from the root conftest.py alike."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = {
    # One thread: the last bits of a sum depend on how it is split, and two busy cores gain nothing at these sizes.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # The order of a set of strings, as it is printed.
    "PYTHONHASHSEED": "0",
    # A lesson downloads nothing, and must not hang where there is no network.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Progress is for a person. (The `datasets` library reads HF_DATASETS_…, the hub client HF_HUB_….)
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # What `fit()` asks before it shows its bar.
    "PEFTTUTOR_PROGRESS": "0",
}


def kernel_environment(*, real: bool = False) -> dict[str, str]:
    """This process's environment with ours on top; `real` asks for a lesson's section on real models.

    >>> kernel_environment()["OMP_NUM_THREADS"], kernel_environment(real=True)["PEFTTUTOR_REAL"]
    ('1', '1')
    """
    environment = {**os.environ, **ENVIRONMENT}
    # The kernel imports the package that this tool belongs to, installed or not; its folder is the notebook's.
    here = str(Path(__file__).resolve().parents[2])
    others = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join([here, *(path for path in others if path != here)])
    # The kernel chooses its own backend for figures.
    for name in ("PEFTTUTOR_REAL", "MPLBACKEND"):
        environment.pop(name, None)
    return {**environment, "PEFTTUTOR_REAL": "1"} if real else environment
