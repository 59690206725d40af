"""The checks of notebook 15 must reject what learners really write, and say which mistake it is."""

import pytest
import torch
from torch.nn import functional as F

from pefttutor import check
from pefttutor.check import ex15
from tests.check.rejection import reason


def names(value):
    return getattr(value, "__name__", "")


# ---- 15.1: the forward pass


def changed_by(weight, lora_A, lora_B, lora_alpha):
    return weight + lora_alpha / len(lora_A) * lora_B @ lora_A


def f_columns(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    changed = changed_by(weight, lora_A, lora_B, lora_alpha)
    return F.linear(x, magnitude[:, None] * changed / changed.norm(dim=0, keepdim=True).detach(), bias)


def f_frobenius(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    changed = changed_by(weight, lora_A, lora_B, lora_alpha)
    return F.linear(x, magnitude[:, None] * changed / changed.norm().detach(), bias)


def f_not_detached(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    changed = changed_by(weight, lora_A, lora_B, lora_alpha)
    return F.linear(x, (magnitude / changed.norm(dim=1))[:, None] * changed, bias)


def f_bias_scaled(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    changed = changed_by(weight, lora_A, lora_B, lora_alpha)
    return magnitude / changed.norm(dim=1).detach() * F.linear(x, changed, bias)


def f_unscaled(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    return ex15.dora_forward(x, weight, bias, lora_A, lora_B, magnitude, len(lora_A))


def f_norm_unscaled(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    ratio = magnitude / (weight + lora_B @ lora_A).norm(dim=1).detach()
    return ratio * F.linear(x, changed_by(weight, lora_A, lora_B, lora_alpha)) + bias


def f_old_norm(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    ratio = magnitude / weight.norm(dim=1)
    return F.linear(x, ratio[:, None] * changed_by(weight, lora_A, lora_B, lora_alpha), bias)


def f_unit(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    changed = changed_by(weight, lora_A, lora_B, lora_alpha)
    return F.linear(x, changed / changed.norm(dim=1, keepdim=True).detach(), bias)


def f_not_divided(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    return F.linear(x, magnitude[:, None] * changed_by(weight, lora_A, lora_B, lora_alpha), bias)


def f_branch_alone(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    changed = changed_by(weight, lora_A, lora_B, lora_alpha)
    ratio = magnitude / changed.norm(dim=1).detach()
    return F.linear(x, weight, bias) + ratio * F.linear(x, changed - weight)


def f_all_detached(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    changed = changed_by(weight, lora_A, lora_B, lora_alpha).detach()
    return F.linear(x, (magnitude / changed.norm(dim=1))[:, None] * changed, bias)


def f_in_place(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    y = ex15.dora_forward(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha)
    weight += 1
    return y


def f_needs_bias(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    return ex15.dora_forward(x, weight, None, lora_A, lora_B, magnitude, lora_alpha) + bias


def f_normalised_branch(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    low_rank = lora_alpha / len(lora_A) * x @ lora_A.T @ lora_B.T
    return F.linear(x, weight, bias) + magnitude * low_rank / low_rank.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (f_columns, "each column, an input, is divided by its norm"),
        (f_frobenius, "one norm of the whole matrix"),
        (f_not_detached, "the norm takes part in the gradient"),
        (f_bias_scaled, "the bias is scaled, too"),
        (f_unscaled, "the scaling α/r is missing"),
        (f_norm_unscaled, "the norm is made without α/r"),
        (f_old_norm, "this is the norm of W₀"),
        (f_unit, "every row has the length 1"),
        (f_not_divided, "aren't divided by their norm"),
        (f_branch_alone, "the ratio multiplies ΔW only"),
        (f_all_detached, "detach the norm, not W₀ + ΔW"),
        (f_in_place, "weight"),
        (f_needs_bias, "+ bias"),
        (f_normalised_branch, "expected"),
    ],
    ids=names,
)
def test_15_1_names_the_mistake(attempt, words):
    assert words in reason(check.ex15_1, attempt)


def f_right_outputs(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha):
    """The outputs are scaled, not the weight."""
    with torch.no_grad():
        norm = changed_by(weight, lora_A, lora_B, lora_alpha).norm(dim=1)
    v = x @ weight.T + lora_alpha / len(lora_A) * (x @ lora_A.T) @ lora_B.T
    return magnitude / norm * v + (0 if bias is None else bias)


def test_15_1_accepts_another_right_form():
    assert check.ex15_1(f_right_outputs) is f_right_outputs


# ---- 15.2: the start


def svd(weight):
    return torch.linalg.svd(weight, full_matrices=False)


def s_cut(first=lambda n, r, minor: n - r if minor else 0, in_A=0.5, in_B=0.5, divide=0.5):
    def start(weight, r, scaling, minor):
        U, S, Vh = svd(weight)
        i = first(len(S), r, minor)
        S, Vh, U = S[i : i + r], Vh[i : i + r], U[:, i : i + r]
        return (S**in_A / scaling**divide)[:, None] * Vh, U * (S**in_B / scaling**divide)

    return start


def s_order(weight, r, scaling, minor):
    A, B = ex15.singular_start(weight, r, scaling, minor)
    return B, A


def s_columns(weight, r, scaling, minor):
    U, S, Vh = svd(weight)
    i = len(S) - r if minor else 0
    root = (S[i : i + r] / scaling).sqrt()
    return root[:, None] * Vh[:, i : i + r].T, U[:, i : i + r] * root


def s_transposed(weight, r, scaling, minor):
    A, B = ex15.singular_start(weight, r, scaling, minor)
    return A.T, B


def s_matrix(weight, r, scaling, minor):
    A, B = ex15.singular_start(weight, r, scaling, minor)
    return B @ A


def s_three(weight, r, scaling, minor):
    return svd(weight)


def s_all_in_b(weight, r, scaling, minor):
    A, B = ex15.singular_start(weight, r, scaling, minor)
    length = A.norm(dim=1)
    return A / length[:, None], B * length


def s_in_place(weight, r, scaling, minor):
    result = ex15.singular_start(weight, r, scaling, minor)
    weight -= scaling * result[1] @ result[0]
    return result


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (s_cut(first=lambda n, r, minor: 0 if minor else n - r), "`minor` is the wrong way round"),
        (s_cut(first=lambda n, r, minor: 0), "`minor` is ignored"),
        (s_cut(first=lambda n, r, minor: n - r), "always the weakest"),
        (s_cut(in_A=1.0, in_B=1.0), "counts twice"),
        (s_cut(in_A=0.0, in_B=0.0), "the singular values are missing"),
        (s_cut(divide=0.0), "s is left out"),
        (s_cut(divide=-0.5), "multiplied by the root of s"),
        (s_cut(divide=1.0), "each factor is divided by s"),
        (s_order, "wrong order"),
        (s_columns, "its rows are the directions"),
        (s_transposed, "A is transposed"),
        (s_matrix, "return the two factors"),
        (s_three, "this is the decomposition"),
        (s_all_in_b, "lengths of A's rows"),
        (s_in_place, "weight"),
    ],
    ids=names,
)
def test_15_2_names_the_mistake(attempt, words):
    assert words in reason(check.ex15_2, attempt)


def s_right_other_signs(weight, r, scaling, minor):
    """Signs and order are free."""
    A, B = ex15.singular_start(weight, r, scaling, minor)
    return -A.flip(0), -B.flip(1)


def test_15_2_accepts_other_signs_and_another_order():
    assert check.ex15_2(s_right_other_signs) is s_right_other_signs


@pytest.mark.parametrize(("minor", "name"), [(False, "PiSSA"), (True, "MiLoRA")])
def test_15_2_agrees_with_the_methods(minor, name):
    import pefttutor

    layer = torch.nn.Linear(6, 9)
    model = getattr(pefttutor, name)(r=2, lora_alpha=8, target_modules=("0",)).attach(
        torch.nn.Sequential(layer)
    )
    A, B = (p.detach() for n, p in sorted(model.named_parameters()) if "lora_" in n)
    mine = ex15.singular_start(layer.weight.detach(), 2, 4.0, minor)
    torch.testing.assert_close((A, B), mine)


# ---- 15.3: the gradient


def g_exact(grad, changed, magnitude, detach):
    return ex15.direction_gradient(grad, changed, magnitude, False)


def g_detached(grad, changed, magnitude, detach):
    return ex15.direction_gradient(grad, changed, magnitude, True)


def g_swapped(grad, changed, magnitude, detach):
    return ex15.direction_gradient(grad, changed, magnitude, not detach)


def g_no_magnitude(grad, changed, magnitude, detach):
    return ex15.direction_gradient(grad, changed, torch.ones_like(magnitude), detach)


def g_no_ratio(grad, changed, magnitude, detach):
    return ex15.direction_gradient(grad, changed, changed.norm(dim=1), detach)


def g_no_norm(grad, changed, magnitude, detach):
    return ex15.direction_gradient(grad, changed, magnitude * changed.norm(dim=1), detach)


def g_columns(grad, changed, magnitude, detach):
    unit = changed / changed.norm(dim=1, keepdim=True)
    grad = grad if detach else grad - (grad * unit).sum(0) * unit
    return (magnitude / changed.norm(dim=1))[:, None] * grad


def g_plus(grad, changed, magnitude, detach):
    unit = changed / changed.norm(dim=1, keepdim=True)
    grad = grad if detach else grad + (grad * unit).sum(1, keepdim=True) * unit
    return (magnitude / changed.norm(dim=1))[:, None] * grad


def g_not_unit(grad, changed, magnitude, detach):
    grad = grad if detach else grad - (grad * changed).sum(1, keepdim=True) * changed
    return (magnitude / changed.norm(dim=1))[:, None] * grad


def g_rows_of_ratio(grad, changed, magnitude, detach):
    return magnitude / changed.norm(dim=1) * grad


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (g_exact, "is taken out although the norm is detached"),
        (g_detached, "is left in although the norm isn't detached"),
        (g_swapped, "`detach` is the wrong way round"),
        (g_no_magnitude, "the magnitude is missing"),
        (g_no_ratio, "m / norm is missing"),
        (g_no_norm, "the norm is missing"),
        (g_columns, "the projection is on the columns"),
        (g_plus, "added instead of subtracted"),
        (g_not_unit, "isn't divided by its norm before"),
        (g_rows_of_ratio, "in your line"),
    ],
    ids=names,
)
def test_15_3_names_the_mistake(attempt, words):
    assert words in reason(check.ex15_3, attempt)


def g_right_by_autograd(grad, changed, magnitude, detach):
    changed = changed.clone().requires_grad_()
    norm = changed.norm(dim=1, keepdim=True)
    made = magnitude[:, None] * changed / (norm.detach() if detach else norm)
    return torch.autograd.grad(made, changed, grad)[0]


def test_15_3_agrees_with_autograd():
    assert check.ex15_3(g_right_by_autograd) is g_right_by_autograd


# ---- 15.4: the norm without the matrix


def n_dense(weight, lora_A, lora_B, scaling):
    return (weight + scaling * lora_B @ lora_A).norm(dim=1)


def n_product(weight, lora_A, lora_B, scaling):
    delta = scaling * lora_B @ lora_A
    return (weight.norm(dim=1) ** 2 + 2 * (weight * delta).sum(1) + delta.norm(dim=1) ** 2).sqrt()


def n_square(weight, lora_A, lora_B, scaling):
    mixed = ((weight @ lora_A.T) * lora_B).sum(1)
    last = ((lora_B @ lora_A @ lora_A.T) * lora_B).sum(1)
    return ((weight**2).sum(1) + 2 * scaling * mixed + scaling**2 * last).sqrt()


def n_by_parts(factor=2.0, power=2, root=True, A_too=True):
    def norms(weight, lora_A, lora_B, scaling):
        mixed = ((weight @ lora_A.T) * lora_B).sum(1)
        last = (lora_B @ (lora_A @ lora_A.T if A_too else torch.eye(2)) * lora_B).sum(1)
        square = weight.norm(dim=1) ** 2 + factor * scaling * mixed + scaling**power * last
        return square.sqrt() if root else square

    return norms


def n_own(weight, lora_A, lora_B, scaling):
    return weight.norm(dim=1)


def n_columns(weight, lora_A, lora_B, scaling):
    return weight.norm(dim=0)


def n_nothing(weight, lora_A, lora_B, scaling):
    weight.norm(dim=1)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (n_dense, "W + s B A, B A or W² is made"),
        (n_product, "W + s B A, B A or W² is made"),
        (n_square, "W + s B A, B A or W² is made"),
        (n_by_parts(factor=1.0), "the mixed term stands twice"),
        (n_by_parts(factor=0.0), "the mixed term is missing"),
        (n_by_parts(factor=-2.0), "the mixed term has a plus"),
        (n_by_parts(power=1), "s is squared in the last term"),
        (n_by_parts(root=False), "the root is missing"),
        (n_by_parts(A_too=False), "A Aᵀ is left out"),
        (n_own, "these are W's own norms"),
        (n_columns, "shape (7,)"),
        (n_nothing, "doesn't return its result"),
    ],
    ids=names,
)
def test_15_4_names_the_mistake(attempt, words):
    assert words in reason(check.ex15_4, attempt)


def n_right_by_einsum(weight, lora_A, lora_B, scaling):
    mixed = torch.einsum("or,or->o", torch.einsum("oi,ri->or", weight, lora_A), lora_B)
    last = torch.einsum("or,or->o", lora_B @ (lora_A @ lora_A.mT), lora_B)
    return torch.sqrt(torch.linalg.vector_norm(weight, dim=1) ** 2 + 2 * scaling * mixed + scaling**2 * last)


@pytest.mark.parametrize("attempt", [n_by_parts(), n_right_by_einsum], ids=names)
def test_15_4_accepts_every_right_form(attempt):
    assert check.ex15_4(attempt) is attempt


def test_15_4_agrees_with_the_package():
    from pefttutor.kernels.row_norms import row_norms

    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in ((7, 9), (2, 9), (7, 2)))
    torch.testing.assert_close(ex15.row_norms(W, A, B, 0.5), row_norms(W, A, B, 0.5))
