"""What `pytest --nbval` needs to be right without further options, from any folder of the repository."""

import os

from pefttutor.authoring.environment import kernel_environment

# Before any test imports torch; the kernels that nbval starts inherit it.
os.environ.update(kernel_environment())
os.environ.pop("MPLBACKEND", None)

CELL_TIMEOUT_S = 300  # nbval's own 2,000 s would also be how long a dead kernel is waited for
NBVAL_DEFAULT_TIMEOUT_S = 2000


def pytest_configure(config):
    """Notebooks run in the environment of this pytest, each cell with a limit; strictness is nbval's default."""
    if hasattr(config.option, "nbval_current_env") and config.option.nbval_kernel_name is None:
        config.option.nbval_current_env = True
    if getattr(config.option, "nbval", False):
        os.environ.pop(
            "PEFTTUTOR_REAL", None
        )  # what is stored, and compared, is a lesson without real models
    if getattr(config.option, "nbval_cell_timeout", None) == NBVAL_DEFAULT_TIMEOUT_S:
        config.option.nbval_cell_timeout = CELL_TIMEOUT_S
    _make_hypothesis_repeatable()


def _make_hypothesis_repeatable() -> None:
    """The same examples every time, no deadline on a busy machine, and no database in the checkout."""
    try:
        from hypothesis import settings
    except ModuleNotFoundError:
        return
    settings.register_profile("pefttutor", derandomize=True, deadline=None, database=None)
    settings.load_profile("pefttutor")
