"""Output head and cross-entropy: equal to logits and F.cross_entropy, in any parts, with any labels ignored."""

import pytest
import torch

from pefttutor.kernels import online_softmax
from pefttutor.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from pefttutor.memory.allocator import transient_bytes


def draw(tokens=13, d=5, vocabulary=11, ignored=4, dtype=torch.float64, trained=("hidden", "weight", "bias")):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(tokens, d, generator=generator).to(dtype),
        "weight": torch.randn(vocabulary, d, generator=generator).to(dtype),
        "bias": torch.randn(vocabulary, generator=generator).to(dtype),
    }
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[:ignored]] = -100
    for name in trained:
        tensors[name].requires_grad_()
    return tensors, labels


def run(function, tensors, labels, **options):
    loss = function(tensors["hidden"], tensors["weight"], labels, tensors["bias"], **options)
    wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(loss * 3, list(wanted.values()))  # an incoming gradient that isn't 1
    return {"loss": loss.detach()} | dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("tokens", [4, 1000])
@pytest.mark.parametrize("max_bytes", [1, 500, 1 << 23])
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.usefixtures("way")
def test_equals_the_formula(monkeypatch, tokens, max_bytes, trained, threads):
    monkeypatch.setattr(online_softmax, "TOKENS", tokens)
    monkeypatch.setattr(online_softmax, "TOKENS_TRAINED", tokens)
    tensors, labels = draw(trained=trained)
    ours, wanted = (
        run(linear_cross_entropy, tensors, labels, max_bytes=max_bytes),
        run(linear_cross_entropy_reference, tensors, labels),
    )
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name])


@pytest.mark.usefixtures("way")
def test_gradients_are_the_numerical_ones():
    tensors, labels = draw()
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias, max_bytes=100),
        tuple(tensors.values()),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.usefixtures("way")
def test_every_dtype_against_float64(dtype, tolerance):
    tensors, labels = draw(dtype=dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    ours, wanted = (
        run(linear_cross_entropy, tensors, labels),
        run(linear_cross_entropy_reference, exact, labels),
    )
    assert ours["loss"].dtype == torch.float32
    for name in wanted:
        scale = wanted[name].abs().max()
        torch.testing.assert_close(ours[name].double() / scale, wanted[name] / scale, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("way")
def test_large_logits_stay_finite():
    """A label whose probability is 0 in float32, and logits whose exponential is infinite."""
    tensors, labels = draw(dtype=torch.float32)
    tensors["weight"] = (tensors["weight"].detach() * 500).requires_grad_()
    ours, wanted = (
        run(linear_cross_entropy, tensors, labels),
        run(linear_cross_entropy_reference, tensors, labels),
    )
    assert wanted["loss"] > 200
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name])


@pytest.mark.usefixtures("way")
def test_a_large_number_that_all_logits_share_costs_no_digits():
    tensors, labels = draw(dtype=torch.float32, trained=())
    tensors["bias"] = torch.full_like(tensors["bias"], 1e6)
    ours, wanted = (
        function(tensors["hidden"], tensors["weight"], labels, tensors["bias"])
        for function in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("tokens", [1, 3000])
@pytest.mark.usefixtures("way")
def test_the_scale_of_a_grad_scaler_in_half_precision(tokens, trained):
    """65,536 is its first scale, and infinite in float16; and a mean over many tokens must not vanish before it."""
    tensors, labels = draw(tokens=tokens, ignored=0, dtype=torch.float16, trained=())
    tensors = {name: (t / 10).requires_grad_(name in trained) for name, t in tensors.items()}
    exact = {name: t.detach().double().requires_grad_(name in trained) for name, t in tensors.items()}
    grads = []
    for function, given in ((linear_cross_entropy, tensors), (linear_cross_entropy_reference, exact)):
        loss = function(given["hidden"], given["weight"], labels, given["bias"]) * 65536
        loss.backward()
        grads.append({name: given[name].grad.double() for name in trained})
    for name in trained:
        ours, wanted = (found[name] for found in grads)
        assert (ours - wanted).norm() < 2e-3 * wanted.norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("way")
def test_a_half_head_sums_many_tokens_of_one_label(dtype):
    """The sum is beyond what float16 has, the mean is not."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.rand(12_000, 4, generator=generator) * 2 + 6, torch.randn(5, 4, generator=generator) / 10]
    labels = torch.full((12_000,), 2)
    found = []
    for function, kind in ((linear_cross_entropy, dtype), (linear_cross_entropy_reference, torch.float64)):
        hidden, weight = (t.to(dtype).to(kind) for t in given)
        function(hidden, weight.requires_grad_(), labels).backward()
        found.append(weight.grad.double())
    assert (found[0] - found[1]).norm() < 2 * torch.finfo(dtype).eps * found[1].norm()


@pytest.mark.usefixtures("way")
def test_in_inference_mode():
    tensors, labels = draw()
    given = tensors["hidden"], tensors["weight"], labels, tensors["bias"]
    with torch.inference_mode():
        torch.testing.assert_close(linear_cross_entropy(*given), linear_cross_entropy_reference(*given))


@pytest.mark.usefixtures("way")
def test_no_label_at_all_is_nan_as_in_the_formula():
    tensors, labels = draw(ignored=13)
    ours, wanted = (
        run(linear_cross_entropy, tensors, labels),
        run(linear_cross_entropy_reference, tensors, labels),
    )
    assert ours["loss"].isnan()
    assert wanted["loss"].isnan()
    assert ours["hidden"].eq(0).all()


@pytest.mark.parametrize("threads", [1], indirect=True)  # the profiler sees no helper's products
@pytest.mark.usefixtures("way")
def test_without_grad_mode_nothing_but_the_loss_is_computed(threads):
    tensors, labels = draw()
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profiler:
        loss = linear_cross_entropy(tensors["hidden"], tensors["weight"], labels, tensors["bias"])
    torch.testing.assert_close(
        loss, linear_cross_entropy_reference(tensors["hidden"], tensors["weight"], labels, tensors["bias"])
    )
    assert sum(event.name in ("aten::mm", "aten::addmm") for event in profiler.events()) == 1


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.usefixtures("way")
def test_peak_memory_is_what_logits_may_have(threads):
    tensors, labels = draw(
        tokens=64, d=4, vocabulary=5000, ignored=0, dtype=torch.float32, trained=("hidden",)
    )
    logits = 64 * 5000 * 4

    def peak(function, **options):
        return transient_bytes(lambda: run(function, tensors, labels, **options))

    assert peak(linear_cross_entropy_reference) > 2.9 * logits
    assert peak(linear_cross_entropy, max_bytes=logits // 8) < 1.5 * logits / 8


def test_a_head_that_trains_needs_the_logits_of_some_tokens(monkeypatch):
    monkeypatch.setattr(online_softmax, "TOKENS_TRAINED", 8)
    tensors, labels = draw(tokens=64, d=4, vocabulary=5000, ignored=0, dtype=torch.float32)
    logits, head = 64 * 5000 * 4, 4 * 5000 * 4
    assert transient_bytes(lambda: run(linear_cross_entropy, tensors, labels)) < 1.5 * logits / 8 + 3 * head


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.usefixtures("way")
def test_words_that_can_not_come(trained, threads):
    """A bias of minus infinity, for all words that one thread reads too: probability 0, and no NaN."""
    tensors, labels = draw(trained=())
    tensors["bias"][:7] = -torch.inf
    tensors["bias"][10] = -torch.inf
    labels[labels >= 0] = 7 + labels[labels >= 0] % 3
    for name in trained:
        tensors[name].requires_grad_()
    ours, wanted = (
        run(linear_cross_entropy, tensors, labels, max_bytes=200),
        run(linear_cross_entropy_reference, tensors, labels),
    )
    for name in wanted:
        assert wanted[name].isfinite().all()
        torch.testing.assert_close(ours[name], wanted[name])


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"labels": torch.full((13,), 11)}, ValueError, r"labels reach from 11 to 11, expected 0 … 10"),
        ({"labels": torch.full((13,), -1)}, ValueError, "labels reach from -1"),
        ({"labels": torch.zeros(12, dtype=torch.int64)}, ValueError, r"labels \(12,\)"),
        ({"labels": torch.zeros(13)}, TypeError, "labels are torch.float32"),
        ({"hidden": torch.zeros(2, 13, 5)}, ValueError, "flatten batch and sequence"),
        ({"max_bytes": 0}, ValueError, "max_bytes is 0"),
    ],
)
def test_errors_say_what_was_given_and_expected(changes, error, says):
    tensors, labels = draw(dtype=torch.float32)
    arguments = tensors | {"labels": labels} | changes
    with pytest.raises(error, match=says):
        linear_cross_entropy(**arguments)
