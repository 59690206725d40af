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

    def mask(gradients, curvature, k):
        gain = gradients.mean(0) ** 2 / (2 * curvature)
        return gain >= gain.topk(k).values[-1]

    def fall(g, H, chosen):  # the others held in place by a wall
        wall = torch.diag(torch.where(chosen, 0.0, 1e12))
        delta = -torch.linalg.solve((H + wall).double(), g.double()) * chosen
        return -(g.double() @ delta + 0.5 * delta @ H.double() @ delta).float()

    answers = {check.ex11_1: linear, check.ex11_3: mask, check.ex11_4: fall}
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
        (check.ex11_3, lambda **inputs: ex11.second_order_mask(**inputs).float(), "float32"),
        (check.ex11_4, lambda g, H, chosen: torch.linalg.solve(H[chosen], g), "Error"),
        (check.ex11_4, lambda **inputs: float(ex11.best_fall(**inputs)), "float"),
        (
            check.ex11_3,
            lambda gradients, curvature, k: gradients.sum(0).topk(len(curvature) + 1),
            "RuntimeError",
        ),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
