"""What a check says of a wrong answer."""

from __future__ import annotations

from typing import Any

import pytest


def reason(check_function: Any, attempt: Any) -> str:
    """The message with which a wrong answer is rejected."""
    with pytest.raises(AssertionError) as caught:
        check_function(attempt)
    return str(caught.value)
