"""The checks of notebook 14 against what isn't ours, and on answers written in other ways (see test_mistakes)."""

import numpy
import pytest
import torch
from torch.nn import functional as F

from pefttutor import AdaLoRA, check
from pefttutor.check import ex14
from pefttutor.lowrank.sora import soft_threshold
from tests.check.rejection import reason


def test_the_references_are_the_papers_formulas():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, generator=generator)
    wanted = numpy.linalg.norm(rows.double().numpy() @ rows.double().numpy().T - numpy.eye(2), "fro") ** 2
    assert ex14.orthogonality(rows).item() == pytest.approx(wanted, rel=1e-5)
    orthonormal = torch.linalg.qr(torch.randn(6, 2, generator=generator))[0].T
    assert ex14.orthogonality(orthonormal).item() == pytest.approx(0, abs=1e-10)
    method = AdaLoRA(init_r=12, target_r=8, total_step=120, tinit=20, tfinal=40)
    steps = range(119)
    assert [ex14.budget(t, 96, 64, 20, 40, 120) for t in steps] == [method.budget(t, 8) for t in steps]
    gate = torch.linspace(-2, 2, 41)
    assert torch.allclose(ex14.proximal(gate, 0.35), soft_threshold(gate, 0.35))


def test_right_answers_written_in_another_way_pass(capsys):
    def orthogonality(rows):
        return torch.linalg.matrix_norm(torch.einsum("ik,jk->ij", rows, rows) - torch.eye(rows.shape[0])) ** 2

    def importance(weight, grad, mean, spread, beta1, beta2):
        now = weight.abs() * grad.abs()
        new = torch.lerp(mean, now, 1 - beta1)
        wide = torch.lerp(spread, torch.abs(now - new), 1 - beta2)
        return [new, wide, wide * new]

    def budget(step, first, last, tinit, tfinal, total):
        if step < tinit:
            return first
        if step >= total - tfinal:
            return last
        left = 1 - (step - tinit) / (total - tfinal - tinit)
        return last + int((first - last) * left**3)

    def proximal(gate, by):
        return F.relu(gate - by) - F.relu(-gate - by)

    paired = lambda *args, **inputs: tuple(importance(*args, **inputs))  # noqa: E731
    answers = {
        check.ex14_1: orthogonality,
        check.ex14_2: paired,
        check.ex14_3: budget,
        check.ex14_4: proximal,
    }
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert check.ex14_2(importance) is importance
    assert capsys.readouterr().out.count("correct") == 5


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex14_1, lambda rows: rows @ rows.T - torch.eye(3), "shape (3, 3)"),
        (check.ex14_1, lambda rows: ex14.orthogonality(rows).item(), "float"),
        (check.ex14_1, lambda rows: (rows @ rows - torch.eye(3)).norm(), "RuntimeError"),
        (check.ex14_2, lambda **inputs: ex14.importance(**inputs)[2], "tuple of"),
        (check.ex14_2, lambda **inputs: None, "None"),
        (check.ex14_2, lambda **inputs: tuple(t.sum() for t in ex14.importance(**inputs)), "shape ()"),
        (check.ex14_3, lambda **settings: None, "None"),
        (check.ex14_3, lambda **settings: settings["last"], "came      result['step 0']: 64"),
        (check.ex14_4, lambda gate, by: gate[gate.abs() > by], "shape"),
        (check.ex14_4, lambda gate, by: torch.maximum(gate.abs() - by, 0), "TypeError"),
    ],
)
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
