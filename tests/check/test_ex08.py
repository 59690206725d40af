"""The checks of notebook 08 against what isn't ours, and on answers written in other ways (see test_mistakes)."""

import pytest
import torch

from pefttutor import check
from pefttutor.check import ex08
from tests.check.rejection import reason

# ---- written another way, or wrong in yet another


def test_right_answers_written_in_another_way_pass(capsys):
    def names(model):
        return [n for n, p in model.named_parameters() if n.endswith(".bias")]

    def masks(weights, fraction):
        values = torch.cat([w.abs().reshape(-1) for w in weights.values()])
        last_of_equals = values.flip(0).topk(int(fraction * values.numel()), largest=False).indices
        chosen = torch.zeros(len(values), dtype=torch.bool).index_fill(
            0, len(values) - 1 - last_of_equals, True
        )
        parts = chosen.split([w.numel() for w in weights.values()])
        return {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)}

    def step(weight, grad, velocity, mask, lr, momentum, decay):
        weight, velocity = weight.clone(), velocity.clone()
        velocity[mask] = momentum * velocity[mask] + grad[mask] + decay * weight[mask]
        weight[mask] -= lr * velocity[mask]
        return weight, velocity

    for check_function, answer in ((check.ex08_1, names), (check.ex08_2, masks), (check.ex08_3, step)):
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 3


def in_place(weight, grad, velocity, mask, lr, momentum, decay):
    velocity[mask] = momentum * velocity[mask] + grad[mask] + decay * weight[mask]
    weight[mask] -= lr * velocity[mask]
    return weight, velocity


def numbers(weights, fraction):
    return {name: mask.float() for name, mask in ex08.smallest_masks(weights, fraction).items()}


def rounded(weights, fraction):
    """To the nearest number of entries, which is the right one for 0.25 · 48 and for 0.3 · 48."""
    n = sum(w.numel() for w in weights.values())
    return ex08.smallest_masks(weights, round(fraction * n) / n + 1e-9)


def no_limit(weights, fraction):
    """The k-th smallest is the limit, and there is none for k = 0."""
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    limit = flat.kthvalue(int(fraction * len(flat))).values
    return {name: w.abs() <= limit for name, w in weights.items()}


def only_smaller(weights, fraction):
    """Right but for equal values, of which it takes none."""
    flat = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values
    limit = torch.cat([flat, torch.tensor([torch.inf])])[int(fraction * len(flat))]
    return {name: w.abs() < limit for name, w in weights.items()}


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex08_1, lambda model: ex08.bias_names(model)[:-1], "'score.bias'"),
        (check.ex08_1, lambda model: [*ex08.bias_names(model), "unbias"], "'unbias'"),
        (check.ex08_2, no_limit, "fraction 0.01"),
        (check.ex08_2, only_smaller, "['entries chosen']: 1"),
        (check.ex08_3, in_place, "weight"),
        (check.ex08_3, lambda **inputs: ex08.masked_step(**inputs)[0], "tuple"),
        (check.ex08_2, numbers, "float32"),
        (check.ex08_2, rounded, "rounds down"),
        (check.ex08_1, lambda model: None, "None"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
