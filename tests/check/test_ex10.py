"""The checks of notebook 10 against what isn't ours, and on answers written in other ways (see test_mistakes)."""

import statistics

import pytest
import torch

from pefttutor import check
from pefttutor.check import ex10
from tests.check.rejection import reason

CHECKS = (check.ex10_1, check.ex10_2, check.ex10_3, check.ex10_4)

# ---- the references, against something that isn't ours


def test_the_reference_of_the_step_is_torchs_adamw_inside_the_mask():
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.01}
    generator = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator) < 0.5
    theirs = weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], weight_decay=0.2, **settings)
    ours, m, v = weight, torch.zeros(3, 5), torch.zeros(3, 5)
    for t in range(1, 6):
        theirs.grad = torch.randn(3, 5, generator=generator)
        optimizer.step()
        ours, m, v = ex10.masked_adamw(ours, theirs.grad, mask, m, v, t, decay=0.2, **settings)
    torch.testing.assert_close(ours[mask], theirs.detach()[mask])
    assert torch.equal(ours[~mask], weight[~mask])
    for moment in (m, v):
        assert not moment[~mask].any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_share_is_what_torchs_sgd_does(momentum, decay):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40_000, generator=generator).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=momentum, weight_decay=decay)
    for t in range(1, 6):
        mask, before = torch.rand(40_000, generator=generator) < 0.2, weight.detach().clone()
        weight.grad = torch.randn(40_000, generator=generator) * mask
        optimizer.step()
        moved = float((weight.detach() != before)[~mask].float().mean())
        assert abs(moved - ex10.share_outside(0.2, t, bool(momentum), bool(decay))) < 0.015


def test_the_reference_of_the_pairs_is_that_of_statistics():
    one, other = [3.0, 5.0, 4.5, 7.0], [2.0, 5.5, 3.0, 4.0]
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    expected = statistics.mean(gaps), statistics.stdev(gaps) / 2
    assert ex10.paired(one, other) == pytest.approx(expected)


# ---- written another way, or wrong in yet another


def test_right_answers_written_in_another_way_pass(capsys):
    def gradients(grads, draws, p):
        found = {}
        for name, grad in grads.items():
            found[name] = grad
            if grad is not None:
                found[name] = torch.where(draws[name] < p, grad / p, torch.zeros_like(grad))
        return found

    def share(p, t, momentum, decay):
        missed = 1.0
        for _ in range(t - 1):
            missed *= 1 - p
        return 1.0 if decay else (1 - missed) * momentum

    def step(weight, grad, mask, exp_avg, exp_avg_sq, t, lr, betas, eps, decay):
        weight, m, v = weight.clone(), exp_avg.clone(), exp_avg_sq.clone()
        m[mask] = m[mask].lerp(grad[mask], 1 - betas[0])
        v[mask] = betas[1] * v[mask] + (1 - betas[1]) * grad[mask] ** 2
        weight[mask] *= 1 - lr * decay
        scale = (v[mask] / (1 - betas[1] ** t)) ** 0.5 + eps
        weight[mask] -= lr / (1 - betas[0] ** t) * m[mask] / scale
        return weight, m, v

    def pairs(one, other):
        gaps = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
        return gaps.mean().item(), gaps.std().item() / len(gaps) ** 0.5

    answers = (gradients, share, step, pairs)
    for check_function, answer in zip(CHECKS, answers, strict=True):
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 4


def in_place(weight, grad, mask, exp_avg, exp_avg_sq, t, lr, betas, eps, decay):
    found = ex10.masked_adamw(weight, grad, mask, exp_avg, exp_avg_sq, t, lr, betas, eps, decay)
    return weight.copy_(found[0]), found[1], found[2]


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex10_3, in_place, "weight"),
        (check.ex10_1, lambda grads, draws, p: None, "None"),
        (check.ex10_2, lambda p, t, momentum, decay: None, "None"),
        (check.ex10_4, lambda one, other: one - other, "TypeError"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
