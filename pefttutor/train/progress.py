"""A progress bar for a person, and silence for everything that compares or records output."""

import os
import sys
from typing import Any

# pytest sets PYTEST_VERSION, and the kernels that nbval starts inherit it; CI is set by every CI service.
_MACHINES = ("CI", "PYTEST_VERSION")
# Set for kernels by Jupyter's server (Lab, Notebook), VS Code and Colab; nbclient and nbconvert set none.
_PEOPLE = ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG")


def for_a_person() -> bool:
    """Whether somebody is watching: a terminal or a notebook's front end, not a test, CI or a stored run.

    PEFTTUTOR_PROGRESS=0 or =1 decides for all that follows.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, PEFTTUTOR_PROGRESS="1"):
    ...     for_a_person()
    True
    """
    chosen = os.environ.get("PEFTTUTOR_PROGRESS")
    if chosen in ("0", "1"):
        return chosen == "1"
    if any(os.environ.get(name) for name in _MACHINES):
        return False
    if "ipykernel" in sys.modules:
        return any(os.environ.get(name) for name in _PEOPLE)
    return sys.stderr is not None and sys.stderr.isatty()


def bar(total: int, *, done: int = 0, show: bool | None = None) -> Any:
    """A tqdm bar over `total` steps, `done` of them behind it; show=None asks `for_a_person`.

    It stays when it is done: a notebook would keep an empty place for one that vanishes.

    >>> bar(10, done=3, show=False).n
    3
    """
    from tqdm.auto import tqdm

    hidden = not (for_a_person() if show is None else show)
    return tqdm(total=total, initial=done, disable=hidden, unit="step")
