"""What happened during `fit`: one row of numbers a step, and a picture of them."""

from dataclasses import asdict, dataclass, field
from typing import Any

# Okabe–Ito: blue, vermillion and bluish green stay apart for colour-blind readers.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"


@dataclass
class History:
    """The record of a training run.

    >>> history = History()
    >>> for loss in (2.0, 1.0): history.record(loss=loss, lr=0.1, step_s=0.5)
    >>> history.plot().alt
    'Training loss over 2 steps, from 2 to 1.'

    steps: number of each step, from 1. loss: mean over the step's labels, without a method's penalty.
    lr: learning rate of the first parameter group. step_s: seconds. validation: one dict an evaluation, with
    the step it stands at. interrupted: whether Ctrl-C ended the run.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    interrupted: bool = False

    def record(self, *, loss: float, lr: float, step_s: float) -> None:
        """Add one step."""
        self.steps.append(len(self.steps) + 1)
        self.loss.append(loss)
        self.lr.append(lr)
        self.step_s.append(step_s)

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain lists, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        ended = ", interrupted" if self.interrupted else ""
        return f"History({self._length()}{ended})"

    def _length(self) -> str:
        return f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"

    def plot(self) -> Any:
        """Draw loss and learning rate over the steps, and the validation's numbers where there are any.

        Returns a matplotlib Figure that pyplot doesn't know of; `.alt` says in words what it shows.
        Raises: ValueError when no step was recorded.
        """
        from matplotlib.figure import Figure

        if not self.steps:
            raise ValueError("this History has no steps to draw; run pefttutor.fit first")
        figure: Any = Figure(figsize=(7, 2.8), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        left.plot(self.steps, self.loss, color=BLUE, linewidth=1, label="training")
        at, losses = self._validated("loss")
        if at:
            left.plot(at, losses, "o-", color=VERMILLION, label="validation")
            left.legend(frameon=False)
        left.set(xlabel="step", ylabel="loss (nats)")
        at, accuracies = self._validated("accuracy")
        if at:
            right.plot(at, [100 * accuracy for accuracy in accuracies], "o-", color=GREEN)
            right.set(xlabel="step", ylabel="validation accuracy (%)")
        else:
            right.plot(self.steps, self.lr, color=GREEN)
            right.set(xlabel="step", ylabel="learning rate (per step)")
        figure.alt = self._alt()
        return figure

    def _validated(self, name: str) -> tuple[list[float], list[float]]:
        """At which steps a number was measured, and what it was."""
        entries = [entry for entry in self.validation if name in entry]
        return [entry["step"] for entry in entries], [entry[name] for entry in entries]

    def _alt(self) -> str:
        text = f"Training loss over {self._length()}, from {self.loss[0]:.3g} to {self.loss[-1]:.3g}"
        losses, accuracies = self._validated("loss")[1], self._validated("accuracy")[1]
        if losses:
            text += f"; validation loss {losses[-1]:.3g} at the end"
        if accuracies:
            text += f", validation accuracy {100 * accuracies[-1]:.0f} %"
        return text + "."
