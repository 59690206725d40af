"""The references of notebook 22 against what they stand for, and wrong answers beyond those that the checks know."""

from itertools import combinations
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pefttutor import check
from pefttutor.authoring.evidence import paired
from pefttutor.authoring.tables import best, read, searched
from pefttutor.check import ex22
from pefttutor.check.ex22_intruders import INTRUDERS_MISTAKES
from pefttutor.check.values import draw
from tests.check.rejection import reason


@pytest.mark.parametrize("table", ["09/compare_masks.jsonl", "12/compare_ranks.jsonl"])
def test_the_search_chooses_the_rates_that_the_tables_chose(table):
    header, rows = read(table)
    seeds = header["search_seeds"]
    for case, chosen in best(header, rows).items():
        if rates := searched(header, rows)[case]:
            names = list(rows[0])[: len(case)]
            own = [row for row in rows if tuple(row[name] for name in names) == case]
            at_edge = chosen[0]["lr"] in (min(rates), max(rates))
            assert ex22.tuned(own, seeds) == (chosen[0]["lr"], at_edge)
            assert paired(chosen, chosen).mean == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_what_k_tries_reach_is_the_mean_over_all_their_sets(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert ex22.expected_best(scores, k) == pytest.approx(every_set_by_hand(scores, k))


def test_intruders_and_shrinking_are_hf_pefts():
    """Its function on a layer of its own: the same directions found, the same weight after shrinking."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 9)

        def forward(self, x):
            return self.up(x)

    theirs = get_peft_model(Model(), LoraConfig(r=6, lora_alpha=12, target_modules=["up"]))
    layer = theirs.base_model.model.up
    layer.get_base_layer().weight.data = draw(9, 6, seed=36)
    layer.lora_A["default"].weight.data = draw(6, 6, seed=1)
    layer.lora_B["default"].weight.data = draw(9, 6, seed=2)
    before, delta, said = layer.get_base_layer().weight.data, layer.get_delta_weight("default").detach(), []
    reduce_intruder_dimension(
        theirs, top_k=4, threshold_epsilon=0.7, mitigation_lambda=0.25, logging_sink=said.append
    )
    found = ex22.intruders(before, before + delta, 4, 0.7)
    assert found
    others = [wrong(before, before + delta, 4, 0.7) for wrong in INTRUDERS_MISTAKES.values()]
    assert found not in others, "theirs would agree with a mistake, too"
    assert f"Intruders: {len(found)}" in said[0]
    after = before + layer.get_delta_weight("intruder_reduced").detach()  # rank 6 holds the whole change
    torch.testing.assert_close(ex22.shrunk(before + delta, found, 0.25), after, rtol=1e-4, atol=1e-4)


def test_a_step_back_is_as_long_as_the_shrinking_and_ends_at_the_start():
    before, after = draw(7, 5, seed=3), draw(7, 5, seed=4)
    shorter = ex22.shrunk(after, [0, 2], 0.75)
    back = ex22.stepped_back(before, after, shorter)
    assert float((after - back).norm()) == pytest.approx(float((after - shorter).norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(
        (after - back).flatten(), (after - before).flatten(), dim=0
    )
    assert float(cosine) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(ex22.stepped_back(before, after, after + 100), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("s", [0.25, 4.0])
def test_the_first_step_is_the_one_that_adamw_takes(s):
    G, A = draw(5, 7, seed=1), torch.nn.Parameter(draw(3, 7, seed=2))
    B = torch.nn.Parameter(torch.zeros(5, 3))
    (G * (s * B @ A)).sum().backward()
    torch.optim.AdamW([A, B], lr=0.25, weight_decay=0, eps=1e-12).step()
    torch.testing.assert_close(ex22.first_step(G, draw(3, 7, seed=2), s, 0.25), (s * B @ A).detach())


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex22_1, lambda rows, search_seeds: None, "None"),
        (check.ex22_1, lambda rows, search_seeds: max(rows, key=lambda row: row["validation"]), "lr"),
        (check.ex22_2, lambda scores, k: None, "None"),
        (check.ex22_2, lambda scores, k: max(combinations(scores, k)), "expected"),
        (check.ex22_3, lambda before, after, top, epsilon: None, "None"),
        (check.ex22_3, lambda before, after, top, epsilon: before @ after, "RuntimeError"),
        (check.ex22_4, lambda after, which, keep: None, "None"),
        (check.ex22_4, lambda after, which, keep: torch.linalg.svd(after).U, "shape"),
        (check.ex22_5, lambda before, after, shorter: None, "None"),
        (
            check.ex22_5,
            lambda before, after, shorter: (
                after - (after - before) * ((after - shorter).norm() / (after - before).norm()).clamp(max=1)
            ),
            "nan",
        ),
        (check.ex22_6, lambda G, A, s, lr: None, "None"),
        (check.ex22_6, lambda G, A, s, lr: -s * lr * (G @ A).sign() @ A, "RuntimeError"),
        (check.ex22_6, lambda G, A, s, lr: -s * lr * A.T @ (A @ G.T).sign(), "shape"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)


def right_by_hand(before, after, shorter):
    change, step = (after - before).flatten(), (after - shorter).flatten()
    ratio = (step @ step).sqrt() / (change @ change).sqrt()
    return (
        after.clone() if not change.any() else (after.flatten() - change * ratio.clamp(max=1)).view_as(after)
    )


def subtracted_by_hand(after, which, keep):
    U, sigma, Vh = torch.linalg.svd(after, full_matrices=False)
    result = after.clone()
    for i in which:
        result -= (1 - keep) * sigma[i] * torch.outer(U[:, i], Vh[i])
    return result


def every_set_by_hand(scores, k):
    return fmean(max(tries) for tries in combinations(scores, k))


def step_by_autograd(G, A, s, lr):
    B = torch.zeros(len(G), len(A), requires_grad=True)
    (G * (s * B @ A)).sum().backward()
    return -s * lr * B.grad.div(B.grad.abs()) @ A


def test_other_right_answers_are_taken():
    assert check.ex22_6(step_by_autograd) is step_by_autograd
    assert check.ex22_2(every_set_by_hand) is every_set_by_hand
    assert check.ex22_5(right_by_hand) is right_by_hand
    assert check.ex22_4(subtracted_by_hand) is subtracted_by_hand
