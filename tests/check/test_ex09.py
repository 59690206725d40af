"""The checks of notebook 09 against what isn't ours, and on answers written in other ways (see test_mistakes)."""

import pytest
import torch
from torch.func import grad, vmap

from pefttutor import check
from pefttutor.check import ex09
from tests.check.rejection import reason

# ---- the references against torch.func


def test_the_closed_formula_is_the_expectation_over_labels():
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(6, 4, generator=generator).double(),
        torch.randn(3, 4, generator=generator).double(),
    )

    def log_p(weight, x, y):
        return (weight @ x).log_softmax(-1)[y]

    p = (x @ weight.T).softmax(-1)
    expected = torch.zeros_like(weight)
    for y in range(3):
        scores = vmap(grad(log_p), in_dims=(None, 0, None))(weight, x, y)
        expected += (p[:, y, None, None] * scores.square()).mean(0)
    torch.testing.assert_close(ex09.true_fisher(x, weight), expected)


def test_the_squares_are_those_of_each_samples_own_gradient():
    generator = torch.Generator().manual_seed(1)
    a, weight = (
        torch.randn(5, 3, 4, generator=generator).double(),
        torch.randn(2, 4, generator=generator).double(),
    )

    def value(weight, a):
        return (a @ weight.T).tanh().sum()

    grads = vmap(grad(value), in_dims=(None, 0))(weight, a)
    delta = 1 - (a @ weight.T).tanh().square()
    torch.testing.assert_close(ex09.squared_gradients(a, delta), grads.square().sum(0))


# ---- written another way, or wrong in yet another


def test_right_answers_written_in_another_way_pass(capsys):
    def fisher(x, weight):
        p = torch.softmax(x @ weight.T, dim=1)
        total = torch.zeros_like(weight)
        for s in range(len(x)):
            for y in range(len(weight)):
                score = torch.outer(torch.eye(len(weight))[y] - p[s], x[s])
                total = total + p[s, y] * score**2 / len(x)
        return total

    def squares(a, delta):
        return sum((d.T @ x) ** 2 for x, d in zip(a, delta, strict=True))

    def masks(fisher, fraction, head):
        free = [(v, n, i) for n, t in fisher.items() if n.split(".")[0] != head
                for i, v in enumerate(t.flatten().tolist())]  # fmt: skip
        everything = sum(t.numel() for t in fisher.values())
        k = int(fraction * everything) - (everything - len(free))
        chosen = {(n, i) for _, n, i in sorted(free, reverse=True)[:k]}
        return {
            n: torch.tensor([n.split(".")[0] == head or (n, i) in chosen for i in range(t.numel())]).view(
                t.shape
            )
            for n, t in fisher.items()
        }

    for check_function, answer in ((check.ex09_1, fisher), (check.ex09_2, squares), (check.ex09_3, masks)):
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 3


def numbers(fisher, fraction, head):
    return {name: mask.float() for name, mask in ex09.fish_masks(fisher, fraction, head).items()}


def only_all(fisher, fraction, head):
    """Right for distinct scores, and empty-handed where many are 0."""
    found = ex09.fish_masks(fisher, fraction, head)
    return {name: mask & ((fisher[name] > 0) | name.startswith("score.")) for name, mask in found.items()}


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex09_1, lambda x, weight: ex09.true_fisher(x.double(), weight.double()), "float64"),
        (check.ex09_2, lambda a, delta: torch.einsum("bto,bti->oi", delta, a[0]), "einsum"),
        (check.ex09_3, numbers, "float32"),
        (check.ex09_3, only_all, "64 entries"),
        (check.ex09_3, lambda fisher, fraction, head: None, "None"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
