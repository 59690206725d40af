"""The three outcomes of an exercise, and the call of a learner's code that explains what went wrong in it.

A lesson's module (ex12.py) is written with this file and with `same_result` from compare.py:

@exercise("12.1", reference=lora_delta)
def ex12_1(attempt):
    for inputs in CASES:
        same_result(attempt, lora_delta, inputs, gradients=("lora_A", "lora_B"), mistakes=MISTAKES)
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pefttutor.check.values import describe

NOT_ATTEMPTED = "Exercise {}: not attempted yet. What follows uses the reference solution."
CORRECT = "Exercise {}: correct. What follows uses yours."


class NotYet(AssertionError):
    """A wrong answer. A notebook shows its message alone: the frames of the check would teach nothing."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class NotAttempted(Exception):
    """The learner's code is still the stub. Never leaves this package."""


def exercise(number: str, *, reference: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], Any]]:
    """Make a function that raises on a wrong answer into a check with three outcomes.

    number: "12.1", as in the stub's `raise NotImplementedError("exercise 12.1")`.
    reference: what the check returns while the exercise isn't attempted; a function or a class, as the stub is.
    Raises: AssertionError, by the check, when the answer is wrong.
    """

    def decorate(body: Callable[[Any], None]) -> Callable[[Any], Any]:
        @functools.wraps(body)
        def check(attempt: Any) -> Any:
            __tracebackhide__ = True
            try:
                if not callable(attempt):
                    kind = "class" if isinstance(reference, type) else "function"
                    raise wrong(
                        expected=f"the {kind} itself: check.{body.__name__}({reference.__name__})",
                        came=f"{describe(attempt)}, which can't be called",
                    )
                body(attempt)
            except NotAttempted:
                print(NOT_ATTEMPTED.format(number))
                return reference
            except AssertionError as error:
                raise NotYet(f"Exercise {number}: not yet.\n{error}") from None
            print(CORRECT.format(number))
            return attempt

        return check

    return decorate


def wrong(**lines: str | None) -> AssertionError:
    """The error of a wrong answer: one line per keyword, in order; a line without text is left out.

    raise wrong(input="B (6, 2)", expected="(6, 4)", came="(4, 6)", likely="A and B are swapped")
    """
    width = max(len(name) for name in lines)
    shown = [(name, text.splitlines()) for name, text in lines.items() if text]
    indent = " " * (width + 4)
    return AssertionError(
        "\n".join(f"  {name:<{width}}  " + f"\n{indent}".join(rows or [""]) for name, rows in shown)
    )


def call(attempt: Callable[..., Any], /, *args: Any, **inputs: Any) -> Any:
    """Call a learner's function; an exception in it becomes a wrong answer that shows the learner's own line.

    Raises: NotAttempted when the stub's NotImplementedError comes; AssertionError for any other exception.
    """
    try:
        return attempt(*args, **inputs)
    except Exception as error:
        if is_stub(error):
            raise NotAttempted from None
        raise explained(error, inputs, args) from error


def is_stub(error: Exception) -> bool:
    """Whether this is what an untouched stub raises."""
    return isinstance(error, NotImplementedError) and str(error).startswith("exercise")


def explained(
    error: Exception, inputs: Mapping[str, Any], args: tuple[Any, ...] = (), *, likely: str | None = None
) -> AssertionError:
    """An exception in the learner's code as a wrong answer."""
    came = f"{type(error).__name__}: {error}\n{_own_line(error)}".rstrip()
    return wrong(input=describe_inputs(inputs, args), expected="a result", came=came, likely=likely)


def _own_line(error: Exception) -> str:
    """The innermost line that the learner wrote: neither a library's nor ours."""
    libraries = ("site-packages", str(Path(__file__).parent))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.line and not any(library in frame.filename for library in libraries)
    ]
    return f"in your line {frames[-1].lineno}: {frames[-1].line}" if frames else ""


def describe_inputs(inputs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> str:
    """All inputs on one line: `lora_A float32 (2, 4), scaling 8.0`."""
    return ", ".join([*map(describe, args), *(f"{name} {describe(value)}" for name, value in inputs.items())])
