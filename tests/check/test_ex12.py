"""The checks of notebook 12 must reject what learners really write, and say which mistake it is."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor import check
from pefttutor.check import ex12
from tests.check.rejection import reason

# ---- 12.1: the forward pass


def f_unscaled(x, weight, bias, lora_A, lora_B, lora_alpha):
    return F.linear(x, weight, bias) + x @ lora_A.T @ lora_B.T


def f_chapter(x, weight, bias, lora_A, lora_B, lora_alpha):
    return F.linear(x, weight + lora_alpha * lora_B @ lora_A, bias)


def f_rslora(x, weight, bias, lora_A, lora_B, lora_alpha):
    return F.linear(x, weight, bias) + lora_alpha / math.sqrt(len(lora_A)) * (x @ lora_A.T @ lora_B.T)


def f_upside_down(x, weight, bias, lora_A, lora_B, lora_alpha):
    return F.linear(x, weight, bias) + len(lora_A) / lora_alpha * F.linear(F.linear(x, lora_A), lora_B)


def f_swapped(x, weight, bias, lora_A, lora_B, lora_alpha):
    return F.linear(x, weight, bias) + lora_alpha / lora_A.shape[0] * (x @ lora_B @ lora_A)


def f_no_bias(x, weight, bias, lora_A, lora_B, lora_alpha):
    return x @ weight.T + lora_alpha / lora_A.shape[0] * (x @ lora_A.T @ lora_B.T)


def f_branch_alone(x, weight, bias, lora_A, lora_B, lora_alpha):
    return lora_alpha / lora_A.shape[0] * (x @ lora_A.T @ lora_B.T)


def f_scales_everything(x, weight, bias, lora_A, lora_B, lora_alpha):
    return (F.linear(x, weight, bias) + F.linear(F.linear(x, lora_A), lora_B)) * lora_alpha / lora_A.shape[0]


def f_wrong_r(x, weight, bias, lora_A, lora_B, lora_alpha):
    r = lora_A.shape[-1]
    return F.linear(x, weight, bias) + lora_alpha / r * (x @ lora_A.T @ lora_B.T)


def f_data(x, weight, bias, lora_A, lora_B, lora_alpha):
    delta = lora_alpha / lora_A.shape[0] * (lora_B.data @ lora_A)
    return F.linear(x, weight + delta, bias)


def f_a_detached(x, weight, bias, lora_A, lora_B, lora_alpha):
    delta = lora_alpha / lora_A.shape[0] * (lora_B @ lora_A.detach())
    return F.linear(x, weight + delta, bias)


def f_no_grad(x, weight, bias, lora_A, lora_B, lora_alpha):
    with torch.no_grad():
        return ex12.lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha)


def f_in_place(x, weight, bias, lora_A, lora_B, lora_alpha):
    with torch.no_grad():
        weight += lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)
    return F.linear(x, weight, bias)


def f_transposed(x, weight, bias, lora_A, lora_B, lora_alpha):
    return x @ weight + bias + lora_alpha / lora_A.shape[0] * (x @ lora_A.T @ lora_B.T)


def f_returns_nothing(x, weight, bias, lora_A, lora_B, lora_alpha):
    ex12.lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha)


def f_needs_bias(x, weight, bias, lora_A, lora_B, lora_alpha):
    return x @ weight.T + bias + lora_alpha / lora_A.shape[0] * (x @ lora_A.T @ lora_B.T)


def f_needs_batch(x, weight, bias, lora_A, lora_B, lora_alpha):
    low_rank = torch.einsum("bti,ri,or->bto", x, lora_A, lora_B)
    return F.linear(x, weight, bias) + lora_alpha / lora_A.shape[0] * low_rank


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (f_unscaled, "the scaling α/r is missing"),
        (f_chapter, "the scaling is α, as in the chapter's equation 4.10"),
        (f_rslora, "that is rsLoRA"),
        (f_upside_down, "upside down"),
        (f_swapped, "A and B are swapped"),
        (f_no_bias, "the bias is missing"),
        (f_branch_alone, "x W₀ᵀ + b is missing"),
        (f_scales_everything, "the scaling multiplies the base's output, too"),
        (f_wrong_r, "r is taken from A's second side"),
        (f_data, "B is cut off from the graph"),
        (f_a_detached, "A is cut off from the graph"),
        (f_no_grad, "cut off from the graph"),
        (f_in_place, "weight"),
        (f_transposed, "x @ weight + bias"),
        (f_returns_nothing, "doesn't return its result"),
        (f_needs_bias, "x @ weight.T + bias"),
        (f_needs_batch, "torch.einsum"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_12_1_names_the_mistake(attempt, words):
    assert words in reason(check.ex12_1, attempt)


def f_right_dense(x, weight, bias, lora_A, lora_B, lora_alpha):
    return F.linear(x, weight + lora_alpha / lora_A.shape[0] * (lora_B @ lora_A), bias)


def f_right_steps(x, weight, bias, lora_A, lora_B, lora_alpha):
    y = x @ weight.T + (x @ lora_A.T) @ lora_B.T * (lora_alpha / lora_B.shape[1])
    return y if bias is None else y + bias


@pytest.mark.parametrize("attempt", [f_right_dense, f_right_steps])
def test_12_1_accepts_every_right_form(attempt):
    assert check.ex12_1(attempt) is attempt


# ---- 12.2: merging


def m_unscaled(weight, lora_A, lora_B, lora_alpha):
    return weight + lora_B @ lora_A


def m_chapter(weight, lora_A, lora_B, lora_alpha):
    return weight + lora_alpha * lora_B @ lora_A


def m_minus(weight, lora_A, lora_B, lora_alpha):
    return weight - lora_alpha / lora_A.shape[0] * lora_B @ lora_A


def m_swapped(weight, lora_A, lora_B, lora_alpha):
    return weight + lora_alpha / lora_A.shape[0] * (lora_A @ lora_B)


def m_transposed(weight, lora_A, lora_B, lora_alpha):
    return weight.T + lora_alpha / lora_A.shape[0] * (lora_A.T @ lora_B.T)


def m_delta_alone(weight, lora_A, lora_B, lora_alpha):
    return lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)


def m_in_place(weight, lora_A, lora_B, lora_alpha):
    weight += lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)
    return weight


def m_rounds_delta(weight, lora_A, lora_B, lora_alpha):
    delta = lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)
    return weight + delta.to(weight.dtype)


def m_rounds_factors(weight, lora_A, lora_B, lora_alpha):
    A, B = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    return weight + lora_alpha / A.shape[0] * (B @ A)


def m_stays_wide(weight, lora_A, lora_B, lora_alpha):
    return weight.float() + lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)


def m_returns_nothing(weight, lora_A, lora_B, lora_alpha):
    weight + lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)


def m_rslora(weight, lora_A, lora_B, lora_alpha):
    return weight + lora_alpha / lora_A.shape[0] ** 0.5 * (lora_B @ lora_A)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (m_unscaled, "the scaling α/r is missing"),
        (m_chapter, "the scaling is α, as in the chapter's equation 4.10"),
        (m_minus, "that unmerges"),
        (m_swapped, "lora_A @ lora_B"),
        (m_transposed, "it is transposed"),
        (m_delta_alone, "W₀ is missing"),
        (m_in_place, "the base weight is changed in place"),
        (m_rounds_delta, "add in float32, round once"),
        (m_rounds_factors, "multiply in float32, round once"),
        (m_stays_wide, "the result stays in float32"),
        (m_returns_nothing, "doesn't return its result"),
        (m_rslora, "the scaling is α/√r: that is rsLoRA"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_12_2_names_the_mistake(attempt, words):
    assert words in reason(check.ex12_2, attempt)


def m_right_double(weight, lora_A, lora_B, lora_alpha):
    delta = (lora_alpha / lora_A.shape[0]) * lora_B.double() @ lora_A.double()
    return (weight.double() + delta).to(weight.dtype)


def m_right_addmm(weight, lora_A, lora_B, lora_alpha):
    with torch.no_grad():
        return torch.addmm(weight.float(), lora_B, lora_A, alpha=lora_alpha / len(lora_A)).to(weight.dtype)


@pytest.mark.parametrize("attempt", [m_right_double, m_right_addmm])
def test_12_2_accepts_every_right_form(attempt):
    assert check.ex12_2(attempt) is attempt


def test_12_2_asks_for_no_number_that_another_order_of_summing_would_round_differently(monkeypatch):
    """Every W + ΔW lies far from the middle between two bfloat16 numbers, compared with float32's own error."""
    asked = []
    monkeypatch.setattr(ex12, "same_result", lambda attempt, reference, inputs, **_: asked.append(inputs))
    ex12.ex12_2(ex12.merged_weight)
    half = asked[-1]
    assert half["weight"].dtype == torch.bfloat16
    exact = half["weight"].double() + 1.5 * half["lora_B"].double() @ half["lora_A"].double()
    step = 2.0 ** (exact.abs().log2().floor() - 7)  # between neighbours in bfloat16
    from_the_middle = ((exact / step) % 1 - 0.5).abs() * step
    assert float((from_the_middle / exact.abs()).min()) > 5e-6


# ---- 12.3: counting


def linears(model, targets):
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in targets]


def c_product(model, r, target_modules):
    return sum(r * m.in_features * m.out_features for m in linears(model, target_modules))


def c_weight(model, r, target_modules):
    return sum(m.weight.numel() for m in linears(model, target_modules))


def c_without_r(model, r, target_modules):
    return sum(sum(m.weight.shape) for m in linears(model, target_modules))


def c_square(model, r, target_modules):
    return sum(2 * r * m.in_features for m in linears(model, target_modules))


def c_one_factor(model, r, target_modules):
    return sum(r * m.in_features for m in linears(model, target_modules))


def c_bias(model, r, target_modules):
    return sum(r * sum(m.weight.shape) + m.bias.numel() for m in linears(model, target_modules))


def c_all(model, r, target_modules):
    return sum(r * sum(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))


def c_contains(model, r, target_modules):
    found = [m for n, m in model.named_modules() if any(t in n for t in target_modules)]
    return sum(r * sum(m.weight.shape) for m in found)


def c_ends(model, r, target_modules):
    found = [m for n, m in model.named_modules() if any(n.endswith(t) for t in target_modules)]
    return sum(r * sum(m.weight.shape) for m in found)


def c_whole_name(model, r, target_modules):
    found = [m for n, m in model.named_modules() if n in target_modules]
    return sum(r * sum(m.weight.shape) for m in found)


def c_children(model, r, target_modules):
    found = [m for n, m in model.named_children() if n in target_modules]
    return sum(r * sum(m.weight.shape) for m in found)


def c_with_weight(model, r, target_modules):
    return sum(m.weight.numel() + r * sum(m.weight.shape) for m in linears(model, target_modules))


def c_trainable(model, r, target_modules):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def c_attaches(model, r, target_modules):
    total = 0
    for m in linears(model, target_modules):
        m.lora_A = nn.Parameter(torch.zeros(r, m.in_features))
        m.lora_B = nn.Parameter(torch.zeros(m.out_features, r))
        total += m.lora_A.numel() + m.lora_B.numel()
    return total


def c_list(model, r, target_modules):
    return [r * sum(m.weight.shape) for m in linears(model, target_modules)]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (c_product, "this counts r · in · out"),
        (c_weight, "the weight itself"),
        (c_without_r, "r is missing"),
        (c_square, "right for square layers only"),
        (c_one_factor, "one factor only"),
        (c_bias, "the bias is counted"),
        (c_all, "every linear layer is counted"),
        (c_contains, "contains a target"),
        (c_ends, "ends in a target"),
        (c_whole_name, "whole names are compared"),
        (c_children, "whole names are compared"),
        (c_with_weight, "the frozen weight is counted"),
        (c_trainable, "expected"),
        (c_attaches, "model"),
        (c_list, "return their sum"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_12_3_names_the_mistake(attempt, words):
    assert words in reason(check.ex12_3, attempt)


def c_right(model, r, target_modules):
    return sum(r * sum(m.weight.shape) for m in linears(model, target_modules))


def test_12_3_accepts_another_right_form():
    assert check.ex12_3(c_right) is c_right


def test_12_3_agrees_with_the_method():
    from pefttutor import LoRA

    model = ex12._small_model()
    for targets in (("q_proj", "v_proj"), ("up_proj", "k_proj")):
        assert ex12.count_lora(model, 2, targets) == LoRA(r=2, target_modules=targets).count(model)


# ---- 12.4: cutting to a smaller rank


def svd(lora_A, lora_B):
    return torch.linalg.svd(lora_B @ lora_A, full_matrices=False)


def t_uncorrected(lora_A, lora_B, k):
    U, sigma, Vh = svd(lora_A, lora_B)
    return Vh[:k], U[:, :k] * sigma[:k]


def t_upside_down(lora_A, lora_B, k):
    U, sigma, Vh = svd(lora_A, lora_B)
    return Vh[:k], U[:, :k] * sigma[:k] * len(lora_A) / k


def t_twice(lora_A, lora_B, k):
    U, sigma, Vh = svd(lora_A, lora_B)
    factor = k / len(lora_A)
    return Vh[:k] * factor, U[:, :k] * sigma[:k] * factor


def t_root(lora_A, lora_B, k):
    U, sigma, Vh = svd(lora_A, lora_B)
    return Vh[:k], U[:, :k] * sigma[:k] * math.sqrt(k / len(lora_A))


def t_smallest(lora_A, lora_B, k):
    U, sigma, Vh = svd(lora_A, lora_B)
    r = len(lora_A)
    return Vh[r - k : r], U[:, r - k : r] * sigma[r - k : r] * k / r


def t_rows(lora_A, lora_B, k):
    return lora_A[:k], lora_B[:, :k]


def t_rows_corrected(lora_A, lora_B, k):
    return lora_A[:k], lora_B[:, :k] * k / len(lora_A)


def t_without_sigma(lora_A, lora_B, k):
    U, _, Vh = svd(lora_A, lora_B)
    return Vh[:k], U[:, :k] * k / len(lora_A)


def t_sigma_twice(lora_A, lora_B, k):
    U, sigma, Vh = svd(lora_A, lora_B)
    return sigma[:k, None] * Vh[:k], U[:, :k] * sigma[:k] * k / len(lora_A)


def t_order(lora_A, lora_B, k):
    A, B = ex12.truncate(lora_A, lora_B, k)
    return B, A


def t_matrix(lora_A, lora_B, k):
    A, B = ex12.truncate(lora_A, lora_B, k)
    return B @ A


def t_old_rank(lora_A, lora_B, k):
    U, sigma, Vh = svd(lora_A, lora_B)
    r = len(lora_A)
    sigma[k:] = 0
    return Vh[:r], U[:, :r] * sigma[:r] * k / r


def t_v_not_transposed(lora_A, lora_B, k):
    U, sigma, V = svd(lora_A, lora_B)
    return V.T[:, :k], U[:, :k] * sigma[:k] * k / len(lora_A)


def t_in_place(lora_A, lora_B, k):
    result = ex12.truncate(lora_A, lora_B, k)
    lora_A.zero_()
    return result


def t_nothing(lora_A, lora_B, k):
    ex12.truncate(lora_A, lora_B, k)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (t_uncorrected, "goes from α/r to α/k"),
        (t_upside_down, "upside down"),
        (t_twice, "product has it twice"),
        (t_root, "√(k/r)"),
        (t_smallest, "smallest singular values"),
        (t_rows, "mind α/k"),
        (t_rows_corrected, "aren't the best k directions"),
        (t_without_sigma, "the singular values are missing"),
        (t_sigma_twice, "they count twice"),
        (t_order, "wrong order"),
        (t_matrix, "return the two factors"),
        (t_old_rank, "still have the old rank"),
        (t_v_not_transposed, "svd returns Vᵀ already"),
        (t_in_place, "lora_A"),
        (t_nothing, "doesn't return its result"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_12_4_names_the_mistake(attempt, words):
    assert words in reason(check.ex12_4, attempt)


def t_right_by_qr(lora_A, lora_B, k):
    """Without ever forming B A, and with the singular values shared evenly."""
    Q_B, R_B = torch.linalg.qr(lora_B)
    Q_A, R_A = torch.linalg.qr(lora_A.T)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = (sigma[:k] * k / len(lora_A)).sqrt()
    return root[:, None] * (Vh[:k] @ Q_A.T), Q_B @ U[:, :k] * root


def test_12_4_accepts_another_right_form():
    assert check.ex12_4(t_right_by_qr) is t_right_by_qr
