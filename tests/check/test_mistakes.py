"""Every mistake that a check knows is rejected by its name; each exercise knows eight or more."""

import pytest

from pefttutor import check
from pefttutor.check import (
    ex02_answers,
    ex03_answers,
    ex03_votes,
    ex04_answers,
    ex04_prefix,
    ex05_answers,
    ex05_blocks,
    ex06_answers,
    ex07_answers,
    ex08_answers,
    ex09_answers,
    ex10_answers,
    ex10_pairs,
    ex11_answers,
    ex12_answers,
    ex13_answers,
    ex14_answers,
    ex15_answers,
    ex15_starts,
    ex16_answers,
    ex16_search,
    ex22_answers,
    ex22_intruders,
    ex22_steps,
    ex24_answers,
)
from tests.check.rejection import reason

MISTAKES = {
    check.ex02_1: ex02_answers.STATIC_MISTAKES,
    check.ex02_2: ex02_answers.FEED_FORWARD_MISTAKES,
    check.ex02_3: ex02_answers.CACHE_MISTAKES,
    check.ex03_1: ex03_answers.PROMPT_MISTAKES,
    check.ex03_2: ex03_answers.START_MISTAKES,
    check.ex03_3: ex03_answers.MIXED_MISTAKES,
    check.ex03_4: ex03_votes.VOTE_MISTAKES,
    check.ex04_1: ex04_answers.ATTENTION_MISTAKES,
    check.ex04_2: ex04_answers.SHARE_MISTAKES,
    check.ex04_3: ex04_prefix.PAIRS_MISTAKES,
    check.ex04_4: ex04_prefix.MLP_MISTAKES,
    check.ex05_1: ex05_answers.BOTTLENECK_MISTAKES,
    check.ex05_2: ex05_answers.SUBLAYER_MISTAKES,
    check.ex05_3: ex05_blocks.COUNT_MISTAKES,
    check.ex05_4: ex05_blocks.DROP_MISTAKES,
    check.ex06_1: ex06_answers.SHARES_MISTAKES,
    check.ex06_2: ex06_answers.SUBLAYER_MISTAKES,
    check.ex06_3: ex06_answers.START_MISTAKES,
    check.ex06_4: ex06_answers.PENALTY_MISTAKES,
    check.ex07_1: ex07_answers.STEERED_MISTAKES,
    check.ex07_2: ex07_answers.WRITE_MISTAKES,
    check.ex07_3: ex07_answers.TOP_MISTAKES,
    check.ex07_4: ex07_answers.TWO_ROW_MISTAKES,
    check.ex08_1: ex08_answers.NAMES_MISTAKES,
    check.ex08_2: ex08_answers.MASKS_MISTAKES,
    check.ex08_3: ex08_answers.STEP_MISTAKES,
    check.ex09_1: ex09_answers.TRUE_FISHER_MISTAKES,
    check.ex09_2: ex09_answers.SQUARED_MISTAKES,
    check.ex09_3: ex09_answers.MASKS_MISTAKES,
    check.ex10_1: ex10_answers.GRADIENTS_MISTAKES,
    check.ex10_2: ex10_answers.SHARE_MISTAKES,
    check.ex10_3: ex10_answers.ADAMW_MISTAKES,
    check.ex10_4: ex10_pairs.PAIRED_MISTAKES,
    check.ex11_1: ex11_answers.LINEAR_MISTAKES,
    check.ex11_2: ex11_answers.GATE_MISTAKES,
    check.ex11_3: ex11_answers.SECOND_ORDER_MISTAKES,
    check.ex11_4: ex11_answers.FALL_MISTAKES,
    check.ex12_1: ex12_answers.FORWARD_MISTAKES,
    check.ex12_2: ex12_answers.MERGE_MISTAKES,
    check.ex12_3: ex12_answers.COUNT_MISTAKES,
    check.ex12_4: ex12_answers.TRUNCATE_MISTAKES,
    check.ex13_1: ex13_answers.RESTART_MISTAKES,
    check.ex13_2: ex13_answers.MORA_MISTAKES,
    check.ex13_3: ex13_answers.MELORA_MISTAKES,
    check.ex13_4: ex13_answers.CUT_MISTAKES,
    check.ex14_1: ex14_answers.ORTHOGONALITY_MISTAKES,
    check.ex14_2: ex14_answers.IMPORTANCE_MISTAKES,
    check.ex14_3: ex14_answers.BUDGET_MISTAKES,
    check.ex14_4: ex14_answers.PROXIMAL_MISTAKES,
    check.ex15_1: ex15_answers.FORWARD_MISTAKES,
    check.ex15_2: ex15_starts.START_MISTAKES,
    check.ex15_3: ex15_answers.GRADIENT_MISTAKES,
    check.ex15_4: ex15_starts.NORM_MISTAKES,
    check.ex16_1: ex16_answers.FACTOR_MISTAKES,
    check.ex16_2: ex16_answers.BESIDE_MISTAKES,
    check.ex16_3: ex16_search.OBJECTIVE_MISTAKES,
    check.ex16_4: ex16_search.SEARCH_MISTAKES,
    check.ex22_1: ex22_answers.TUNED_MISTAKES,
    check.ex22_2: ex22_answers.BEST_MISTAKES,
    check.ex22_3: ex22_intruders.INTRUDERS_MISTAKES,
    check.ex22_4: ex22_intruders.SHRUNK_MISTAKES,
    check.ex22_5: ex22_intruders.BACK_MISTAKES,
    check.ex22_6: ex22_steps.STEP_MISTAKES,
    check.ex24_1: ex24_answers.LOTTERY_MISTAKES,
    check.ex24_2: ex24_answers.HARD_MISTAKES,
    check.ex24_3: ex24_answers.COMPOSED_MISTAKES,
}
ELSEWHERE = {"ex00_1", "ex00_2", "ex00_3"}  # their wrong answers are written out in test_ex00.py


@pytest.mark.parametrize(
    ("check_function", "name"), [(c, n) for c, known in MISTAKES.items() for n in known],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_every_known_mistake_is_rejected_by_its_name(check_function, name):
    said = " ".join(reason(check_function, MISTAKES[check_function][name]).split())
    assert f"likely {name}" in said


def test_every_exercise_is_here():
    assert {c.__name__ for c in MISTAKES} | ELSEWHERE == {n for n in dir(check)}


@pytest.mark.parametrize("check_function", MISTAKES)
def test_there_are_at_least_eight(check_function):
    assert len(MISTAKES[check_function]) >= 8
