"""The checks of notebook 11 against what isn't ours, and on answers written in other ways (see test_mistakes)."""

import math

import pytest
import torch
from torch import nn

from pefttutor import check
from pefttutor.check import ex11
from tests.check.rejection import reason

# ---- written another way, or wrong in yet another


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, threshold):
        return (scores > threshold).float()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_right_answers_written_in_another_way_pass(capsys):
    def linear(x, weight, scores, threshold):
        return nn.functional.linear(x, weight * Step.apply(scores, threshold))

    def gate(alpha, u, left, right):
        s = torch.sigmoid(torch.logit(u) + alpha)
        z = torch.clamp(left + (right - left) * s, min=0.0, max=1.0)
        return [z, 1 / (1 + torch.exp(math.log(-left) - math.log(right) - alpha))]

    def ticket(start, first, second, k):
        moved = {name: (first[name] - w).abs() for name, w in start.items()}
        limit = torch.cat([m.flatten() for m in moved.values()]).topk(k).values[-1]
        zero = torch.zeros(())
        return {n: torch.where(moved[n] >= limit, second[n] - w, zero) for n, w in start.items()}

    def mask(gradients, curvature, k):
        gain = gradients.mean(0) ** 2 / (2 * curvature)
        return gain >= gain.topk(k).values[-1]

    answers = {check.ex11_1: linear, check.ex11_3: ticket, check.ex11_4: mask}
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    paired = lambda *args, **inputs: tuple(gate(*args, **inputs))  # noqa: E731
    assert check.ex11_2(paired) is paired
    assert capsys.readouterr().out.count("correct") == 4


def detached(x, weight, scores, threshold):
    mask = (scores > threshold).float()
    mask.requires_grad_()
    return x @ (weight * mask).T


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex11_1, detached, "scores"),
        (check.ex11_1, lambda **inputs: None, "None"),
        (check.ex11_2, lambda **inputs: ex11.hard_concrete(**inputs)[0], "tuple"),
        (check.ex11_3, lambda **inputs: list(ex11.lottery_difference(**inputs).values()), "list"),
        (check.ex11_3, lambda start, **others: start["d"], "KeyError"),
        (check.ex11_4, lambda **inputs: ex11.second_order_mask(**inputs).float(), "float32"),
        (
            check.ex11_4,
            lambda gradients, curvature, k: gradients.sum(0).topk(len(curvature) + 1),
            "RuntimeError",
        ),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
