"""The checks of notebook 13 against what isn't ours, and on answers written in other ways (see test_mistakes)."""

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor import MELoRA, MoRA, check
from pefttutor.check import ex13
from pefttutor.check.values import draw
from pefttutor.parts.restarting import cut_smallest
from tests.check.rejection import reason


def test_a_restart_keeps_the_function():
    x, weight, A, B = draw(3, 7, seed=1), draw(5, 7, seed=2), draw(2, 7, seed=3), draw(5, 2, seed=4)
    before = x @ weight.T + 1.5 * x @ A.T @ B.T
    new_weight, new_A, new_B = ex13.restarted(weight, A, B, 1.5, draw(2, 7, seed=5))
    torch.testing.assert_close(x @ new_weight.T + 1.5 * x @ new_A.T @ new_B.T, before)


@pytest.mark.parametrize("share", [0.0, 0.35, 0.9, 1.0])
def test_what_is_cut_is_below_what_is_kept(share):
    moment = draw(6, 10, seed=6)
    kept = ex13.cut_moment(moment, share)
    cut_smallest(wanted := moment.clone(), share)
    assert torch.equal(kept, wanted)
    threshold = numpy.quantile(moment.abs().numpy(), share) if share < 1 else numpy.inf
    assert torch.equal(kept != 0, moment.abs() >= threshold)


def test_moras_change_is_the_dense_matrix_made_entry_by_entry():
    x, M = draw(4, 11, seed=7), draw(4, 4, seed=8)
    dense = torch.zeros(9, 11)
    for column in range(12):  # group and place of the filled x, of which column 11 is x's first feature again
        for row in range(9):
            dense[row, column % 11] += M[row % 4, column % 4]
    torch.testing.assert_close(ex13.mora_branch(x, M, 9), x @ dense.T)
    layer = nn.ModuleDict({"q_proj": nn.Linear(11, 9)})
    model = MoRA(r=1, mora_type=1, target_modules=("q_proj",)).attach(layer)
    before = F.linear(x, model["q_proj"].weight, model["q_proj"].bias)
    model["q_proj"].mora_M.data.copy_(M)
    torch.testing.assert_close(model["q_proj"](x) - before, ex13.mora_branch(x, M, 9), rtol=1e-5, atol=1e-5)


def test_meloras_change_is_block_diagonal():
    x, A, B = draw(4, 12, seed=9), draw(3, 2, 4, seed=10), draw(3, 2, 2, seed=11)
    dense = 2.5 * torch.block_diag(*(B @ A))
    torch.testing.assert_close(ex13.melora_branch(x, A, B, 2.5), x @ dense.T)
    assert torch.linalg.matrix_rank(dense) == 6
    assert MELoRA(r=2, n=3, target_modules=("l",)).count(nn.ModuleDict({"l": nn.Linear(12, 6)})) == 36


def test_right_answers_written_in_another_way_pass(capsys):
    def restarted(weight, lora_A, lora_B, s, new_A):
        return [torch.addmm(weight, lora_B, lora_A, alpha=s), new_A, 0 * lora_B]

    def cut_moment(moment, share):
        count = round(share * moment.numel())
        if not count:
            return moment
        threshold = moment.abs().flatten().kthvalue(count).values
        return moment * (moment.abs() > threshold)

    def mora_branch(x, M, n_out):
        width, n_in = len(M), x.shape[-1]
        places = torch.arange(-(-n_in // width) * width) % n_in
        h = x[..., places].reshape(*x.shape[:-1], -1, width).sum(-2)
        return torch.einsum("ij,...j->...i", M, h)[..., torch.arange(n_out) % width]

    def melora_branch(x, A, B, s):
        narrow = torch.einsum("...ni,nri->...nr", x.unflatten(-1, (len(A), -1)), A)
        return s * torch.einsum("...nr,nor->...no", narrow, B).flatten(-2)

    paired = lambda **inputs: tuple(restarted(**inputs))  # noqa: E731
    answers = {
        check.ex13_1: paired,
        check.ex13_2: mora_branch,
        check.ex13_3: melora_branch,
        check.ex13_4: cut_moment,
    }
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 4


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex13_1, lambda **inputs: None, "None"),
        (check.ex13_1, lambda **inputs: ex13.restarted(**inputs)[0], "tuple"),
        (check.ex13_2, lambda x, M, n_out: x @ M.T, "RuntimeError"),
        (check.ex13_3, lambda x, A, B, s: s * x @ torch.block_diag(*(A @ B)).T, "RuntimeError"),
        (check.ex13_4, lambda **inputs: ex13.cut_moment(**inputs).flatten(), "(20,)"),
        (check.ex13_4, lambda moment, share: moment.quantile(share), "float32"),
    ],
)
def test_the_message_says_what_came(check_function, attempt, says):
    assert says in reason(check_function, attempt)
