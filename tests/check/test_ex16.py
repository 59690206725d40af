"""The checks of notebook 16 must reject what learners really write, and say which mistake it is."""

import pytest
import torch

from pefttutor import check
from pefttutor.check import ex16
from tests.check.rejection import reason


def names(value):
    return getattr(value, "__name__", "")


# ---- 16.1: the sum of the factors


def f_weights_in_b(A, B, w, s):
    return s * (w[:, None, None] * B).sum(0) @ A.sum(0)


def f_weights_in_a(A, B, w, s):
    return s * B.sum(0) @ (w[:, None, None] * A).sum(0)


def f_unweighted(A, B, w, s):
    return s * B.sum(0) @ A.sum(0)


def f_each_product(A, B, w, s):
    return s * sum(w[n] * B[n] @ A[n] for n in range(len(w)))


def f_squares_alone(A, B, w, s):
    return s * sum(w[n] ** 2 * B[n] @ A[n] for n in range(len(w)))


def f_no_scaling(A, B, w, s):
    return ex16.sum_factors(A, B, w, 1.0)


def f_scaling_twice(A, B, w, s):
    return (s * torch.einsum("n,nor->or", w, B)) @ (s * torch.einsum("n,nri->ri", w, A))


def f_mean(A, B, w, s):
    return s * (w[:, None, None] * B).mean(0) @ (w[:, None, None] * A).mean(0)


def f_softmax(A, B, w, s):
    return ex16.sum_factors(A, B, w.softmax(0), s)


def f_normalised(A, B, w, s):
    return ex16.sum_factors(A, B, w / w.sum(), s)


def f_roots(A, B, w, s):
    root = w.abs().sqrt()
    return s * torch.einsum("n,nor->or", w.sign() * root, B) @ torch.einsum("n,nri->ri", root, A)


def f_signless(A, B, w, s):
    return ex16.sum_factors(A, B, w.abs(), s)


def f_detached(A, B, w, s):
    return ex16.sum_factors(A, B, w.detach(), s)


def f_items(A, B, w, s):
    return s * sum(x * b for x, b in zip(w.tolist(), B, strict=True)) @ torch.einsum("n,nri->ri", w, A)


def f_chapter(A, B, w, s):
    """Equation 4.16 of the chapter as it stands: the shapes don't meet."""
    return torch.einsum("n,nri->ri", w, A) @ torch.einsum("n,nor->or", w, B)


def f_transposed(A, B, w, s):
    return s * torch.einsum("n,nri->ir", w, A) @ torch.einsum("n,nor->ro", w, B)


def f_in_place(A, B, w, s):
    A *= w[:, None, None]
    return s * torch.einsum("n,nor->or", w, B) @ A.sum(0)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (f_weights_in_b, "the weights are missing in A"),
        (f_weights_in_a, "the weights are missing in B"),
        (f_unweighted, "the weights are missing"),
        (f_each_product, "each plug-in's own product is weighted and summed"),
        (f_squares_alone, "this is Σ w² B A"),
        (f_no_scaling, "s is missing"),
        (f_scaling_twice, "s is there twice"),
        (f_mean, "this is the mean over the plug-ins"),
        (f_softmax, "put through a softmax"),
        (f_normalised, "normalised to a sum of 1"),
        (f_roots, "as in HF PEFT's 'linear'"),
        (f_signless, "lose their signs"),
        (f_detached, "the weights are cut off from the graph"),
        (f_items, "the right numbers forward, but the gradient"),
        (f_chapter, "in your line"),
        (f_transposed, "this is ΔWᵀ"),
        (f_in_place, "in-place operation"),
    ],
    ids=names,
)
def test_16_1_names_the_mistake(attempt, words):
    assert words in reason(check.ex16_1, attempt)


def f_right_by_loops(A, B, w, s):
    """All pairs of plug-ins, one after the other."""
    pairs = ((i, j) for i in range(len(w)) for j in range(len(w)))
    return s * sum(w[i] * w[j] * B[i] @ A[j] for i, j in pairs)


def test_16_1_accepts_another_right_form():
    assert check.ex16_1(f_right_by_loops) is f_right_by_loops


# ---- 16.2: side by side


def b_squared(A, B, w, s):
    return (w[:, None, None] * A).flatten(0, 1), torch.cat([s * x * b for x, b in zip(w, B, strict=True)], 1)


def b_unweighted(A, B, w, s):
    return A.flatten(0, 1), torch.cat([*(s * B)], 1)


def b_no_scaling(A, B, w, s):
    return ex16.beside(A, B, w, 1.0)


def b_scaling_twice(A, B, w, s):
    A, B = ex16.beside(A, B, w, s)
    return s * A, B


def b_roots_of_size(A, B, w, s):
    root = (s * w.abs()).sqrt()[:, None, None]
    return (root * A).flatten(0, 1), torch.cat([*(root * B)], 1)


def b_mean(A, B, w, s):
    A, B = ex16.beside(A, B, w, s)
    return A, B / len(w)


def b_reshaped(A, B, w, s):
    return A.reshape(-1, A.shape[2]), (s * w[:, None, None] * B).reshape(B.shape[1], -1)


def b_other_order(A, B, w, s):
    return A.flatten(0, 1), torch.cat([s * w[n] * B[n] for n in reversed(range(len(w)))], 1)


def b_interleaved(A, B, w, s):
    return A.transpose(0, 1).reshape(-1, A.shape[2]), ex16.beside(A, B, w, s)[1]


def b_below(A, B, w, s):
    return A.flatten(0, 1), (s * w[:, None, None] * B).flatten(0, 1)


def b_a_beside(A, B, w, s):
    return torch.cat([*A], 1), ex16.beside(A, B, w, s)[1]


def b_summed(A, B, w, s):
    return torch.einsum("n,nri->ri", w, A), s * torch.einsum("n,nor->or", w, B)


def b_order(A, B, w, s):
    return ex16.beside(A, B, w, s)[::-1]


def b_product(A, B, w, s):
    A, B = ex16.beside(A, B, w, s)
    return B @ A


def b_nothing(A, B, w, s):
    ex16.beside(A, B, w, s)


def b_detached(A, B, w, s):
    return ex16.beside(A, B, w.detach(), s)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (b_squared, "so that they are squared"),
        (b_unweighted, "the weights are missing"),
        (b_no_scaling, "s is missing"),
        (b_scaling_twice, "s is there twice"),
        (b_roots_of_size, "lose their signs"),
        (b_mean, "this is the mean over the plug-ins"),
        (b_reshaped, "B is reshaped, which mixes its rows"),
        (b_other_order, "another order in B than in A"),
        (b_interleaved, "A's rows are interleaved"),
        (b_below, "stand below each other"),
        (b_a_beside, "stand beside each other"),
        (b_summed, "the factors are summed, as in exercise 16.1"),
        (b_order, "wrong order"),
        (b_product, "return the two factors"),
        (b_nothing, "doesn't return its result"),
        (b_detached, "cut off from the graph"),
    ],
    ids=names,
)
def test_16_2_names_the_mistake(attempt, words):
    assert words in reason(check.ex16_2, attempt)


def b_right_in_a(A, B, w, s):
    """The weights stand in A, and B is put beside itself by a transposition."""
    return (s * w[:, None, None] * A).flatten(0, 1), B.transpose(0, 1).flatten(1)


def test_16_2_accepts_weights_in_the_other_factor():
    assert check.ex16_2(b_right_in_a) is b_right_in_a


# ---- 16.3: what the search makes small


def o_released(batch_means, sizes, w, l1):
    return batch_means.sum() / sizes.sum() + l1 * w.abs().mean()


def o_alike(batch_means, sizes, w, l1):
    return batch_means.mean() + l1 * w.abs().mean()


def o_summed(batch_means, sizes, w, l1):
    return (batch_means * sizes).sum() + l1 * w.abs().mean()


def o_by_batches(batch_means, sizes, w, l1):
    return (batch_means * sizes).mean() + l1 * w.abs().mean()


def o_sum_of_w(batch_means, sizes, w, l1):
    return (batch_means * sizes).sum() / sizes.sum() + l1 * w.abs().sum()


def o_square(batch_means, sizes, w, l1):
    return (batch_means * sizes).sum() / sizes.sum() + l1 * (w**2).mean()


def o_signs(batch_means, sizes, w, l1):
    return (batch_means * sizes).sum() / sizes.sum() + l1 * w.mean()


def o_norm(batch_means, sizes, w, l1):
    return (batch_means * sizes).sum() / sizes.sum() + l1 * w.norm()


def o_no_penalty(batch_means, sizes, w, l1):
    return (batch_means * sizes).sum() / sizes.sum()


def o_minus(batch_means, sizes, w, l1):
    return (batch_means * sizes).sum() / sizes.sum() - l1 * w.abs().mean()


def o_all_divided(batch_means, sizes, w, l1):
    return ((batch_means * sizes).sum() + l1 * w.abs().mean()) / sizes.sum()


def o_item(batch_means, sizes, w, l1):
    return ex16.objective(batch_means, sizes, w, l1).item()


def o_nothing(batch_means, sizes, w, l1):
    ex16.objective(batch_means, sizes, w, l1)


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (o_released, "as in the released code"),
        (o_alike, "every batch counts alike"),
        (o_summed, "the losses are summed over the examples"),
        (o_by_batches, "divided by the number of batches"),
        (o_sum_of_w, "|w| is summed over the plug-ins"),
        (o_square, "w is squared"),
        (o_signs, "those of two signs cancel out"),
        (o_norm, "this is the length of w"),
        (o_no_penalty, "the penalty is missing"),
        (o_minus, "the penalty is subtracted"),
        (o_all_divided, "divided by the number of examples, too"),
        (o_item, "float 2.117"),
        (o_nothing, "doesn't return its result"),
    ],
    ids=names,
)
def test_16_3_names_the_mistake(attempt, words):
    assert words in reason(check.ex16_3, attempt)


def o_right(batch_means, sizes, w, l1):
    """Shares of the examples instead of a quotient of sums."""
    return (batch_means * (sizes / sizes.sum())).sum() + l1 * w.norm(p=1) / w.numel()


def test_16_3_accepts_another_right_form():
    assert check.ex16_3(o_right) is o_right


# ---- 16.4: a search without gradients


def steps(*, origin="best", clamp=True, keep=lambda now, least: now < least, more=0, back="best", first=True):
    def attempt(cost, n, tries, bound, step, generator):
        best = last = torch.zeros(n)
        least = cost(best) if first else float("inf")
        for _ in range(tries - first + more):
            last = {"best": best, "last": last, "zero": torch.zeros(n)}[origin]
            last = last + step * torch.randn(n, generator=generator)
            last = last.clamp(-bound, bound) if clamp else last
            now = cost(last)
            if keep(now, least):
                best, least = last, now
        return best if back == "best" else last

    return attempt


def s_own_noise(cost, n, tries, bound, step, generator):
    best, least = torch.zeros(n), cost(torch.zeros(n))
    for _ in range(tries - 1):
        candidate = (best + step * torch.randn(n)).clamp(-bound, bound)
        if (now := cost(candidate)) < least:
            best, least = candidate, now
    return best


def s_asks_again(cost, n, tries, bound, step, generator):
    """The cost of the best is asked for anew each time."""
    best = torch.zeros(n)
    for _ in range(tries - 1):
        candidate = (best + step * torch.randn(n, generator=generator)).clamp(-bound, bound)
        if cost(candidate) < cost(best):
            best = candidate
    return best


def s_forgets(cost, n, tries, bound, step, generator):
    best = torch.zeros(n)
    least = cost(best)
    for _ in range(tries - 1):
        candidate = (best + step * torch.randn(n, generator=generator)).clamp(-bound, bound)
        if cost(candidate) < least:
            best = candidate
    return best


def s_nothing(cost, n, tries, bound, step, generator):
    ex16.search(cost, n, tries, bound, step, generator)


def s_cost(cost, n, tries, bound, step, generator):
    return cost(ex16.search(cost, n, tries, bound, step, generator))


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (steps(clamp=False), "clamp each candidate"),
        (steps(back="last"), "the last candidate is returned"),
        (steps(origin="last"), "a random walk"),
        (steps(origin="last", back="last"), "every candidate is kept"),
        (steps(origin="zero"), "every step starts from 0"),
        (steps(keep=lambda now, least: now > least), "the worse one is kept"),
        (steps(keep=lambda now, least: True), "every candidate is kept"),
        (steps(more=1), "asks once more than allowed"),
        (steps(more=-1), "asks once less than allowed"),
        (steps(first=False), "0 is never tried"),
        (s_own_noise, "try 2"),
        (s_asks_again, "number of tries"),
        (s_forgets, "the least cost isn't remembered"),
        (s_nothing, "doesn't return its result"),
        (s_cost, "number of tries"),
    ],
    ids=[
        "unclamped", "last", "walk", "walk-last", "zero", "worse", "every", "more", "less", "no-zero", "own-noise",
        "asks-again", "forgets", "nothing", "cost",
    ],
)  # fmt: skip
def test_16_4_names_the_mistake(attempt, words):
    assert words in reason(check.ex16_4, attempt)


def s_right_with_a_list(cost, n, tries, bound, step, generator):
    """All tries are kept, and the least of them is looked for each time."""
    tried = [torch.zeros(n)]
    costs = [cost(tried[0])]
    while len(tried) < tries:
        best = tried[costs.index(min(costs))]
        tried.append(torch.clamp(torch.randn(n, generator=generator) * step + best, min=-bound, max=bound))
        costs.append(cost(tried[-1]))
    return tried[costs.index(min(costs))]


def test_16_4_accepts_another_right_form():
    assert check.ex16_4(s_right_with_a_list) is s_right_with_a_list


# ---- against the package


@pytest.mark.parametrize("combine", ["factors", "deltas"])
def test_both_sums_agree_with_the_method(combine):
    import pefttutor

    model = torch.nn.Sequential(torch.nn.Linear(5, 7))
    for seed, name in enumerate("abc"):
        pefttutor.LoRA(r=2, lora_alpha=3, target_modules=("0",), init_seed=seed).attach(model, name=name)
    held = dict(model.named_parameters())
    for name, p in held.items():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name) + ord(name[-1])))
    A, B = (torch.stack([held[f"0.lora_{x}@{name}"].detach() for name in "abc"]) for x in "AB")
    w = torch.tensor([0.5, -1.0, 0.3])
    pefttutor.LoRAHub(plugins=("a", "b", "c"), combine=combine).attach(model)
    model.lorahub_weights.data = w
    delta = pefttutor.attached(model)["default"].parts[1].delta()
    if combine == "factors":
        mine = ex16.sum_factors(A, B, w, 1.5)
    else:
        wide_A, wide_B = ex16.beside(A, B, w, 1.5)
        mine = wide_B @ wide_A
    torch.testing.assert_close(mine, delta.detach())
