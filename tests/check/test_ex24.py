"""The checks of notebook 24 against answers written in other ways, and wrong in yet others (see test_mistakes)."""

import pytest
import torch

from pefttutor import check
from pefttutor.check import ex24
from pefttutor.parts.ranking import largest
from pefttutor.selective.lt_sft import add_differences
from tests.check.rejection import reason


def test_right_answers_written_in_another_way_pass(capsys):
    def ticket(start, first, second, k):
        moved = {name: (first[name] - w).abs() for name, w in start.items()}
        limit = torch.cat([m.flatten() for m in moved.values()]).topk(k).values[-1]
        zero = torch.zeros(())
        return {n: torch.where(moved[n] >= limit, second[n] - w, zero) for n, w in start.items()}

    def hard(losses, gradients, share, most):
        count = max(3, min(most, int(len(losses) * share)))
        chosen = [gradients[int(i)] for i in losses.topk(count).indices]
        return {name: sum(g[name] ** 2 for g in chosen) for name in chosen[0]}

    def together(start, differences):
        model = torch.nn.ParameterDict({name: w.clone() for name, w in start.items()})
        return dict(add_differences(model, *differences))  # the package's own

    answers = {check.ex24_1: ticket, check.ex24_2: hard, check.ex24_3: together}
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 3


def test_the_package_chooses_a_ticket_as_the_reference_does():
    """Entry by entry: `largest`, which LTSFT ranks by, and the places that the reference's difference has."""
    generator = torch.Generator().manual_seed(0)
    start, first = ({n: torch.randn(4, 5, generator=generator) for n in "ab"} for _ in range(2))
    phi = ex24.lottery_difference(start, first, first, 7)
    masks = largest({n: (first[n] - start[n]).abs() for n in start}, 7)
    assert all(torch.equal(phi[n] != 0, masks[n]) for n in start)


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex24_1, lambda **inputs: list(ex24.lottery_difference(**inputs).values()), "list"),
        (check.ex24_1, lambda start, **others: start["d"], "KeyError"),
        (check.ex24_2, lambda **inputs: None, "None"),
        (check.ex24_2, lambda **inputs: ex24.hard_fisher(**inputs)["a"], "float32 (2, 3)"),
        (
            check.ex24_1,
            lambda **inputs: {n: d for n, d in ex24.lottery_difference(**inputs).items() if d.any()},
            "a tensor in which nothing is chosen is missing",
        ),
        (check.ex24_3, lambda start, differences: start, "changed by the rule|numbers"),
        (
            check.ex24_3,
            lambda start, differences: {
                n: w + sum(phi[n][1].sum() for phi in differences) for n, w in start.items()
            },
            "ask whether the name is in it",
        ),
        (check.ex24_3, lambda start, differences: start["a"][differences[0]["a"][0]], "IndexError"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert any(word in reason(check_function, attempt) for word in says.split("|"))
