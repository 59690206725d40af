"""Squared per-sample gradients against torch.func and a loop over batches of one, in float64, for all parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from pefttutor.kernels import fisher, per_sample
from pefttutor.kernels.fisher import squared_gradients, squared_gradients_reference
from pefttutor.parts.information import fisher_information

F64 = torch.float64


def log_likelihood(model, inputs):
    """log p(y | x) of each example: of its class, or the sum over its labelled tokens."""
    labels, rest = inputs["labels"], {k: v for k, v in inputs.items() if k != "labels"}
    if labels.dim() == 2 and "t5" in type(model).__name__.lower():
        rest["decoder_input_ids"] = model._shift_right(labels.clamp(min=0))
    logits = model(**rest).logits
    if labels.dim() == 1:
        return -cross_entropy(logits, labels, reduction="none")
    if "t5" not in type(model).__name__.lower():
        logits, labels = logits[:, :-1], labels[:, 1:]
    return -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


def by_loop(model, inputs):
    """Batches of one, backward, square, add: what FISH's own code does."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for s in range(len(inputs["labels"])):
        model.zero_grad()
        log_likelihood(model, {k: v[s : s + 1] for k, v in inputs.items()}).sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.square()
    model.zero_grad()
    return total


def assert_same(ours, expected):
    assert set(ours) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-18, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("max_bytes", "threads"), [(1 << 25, 1), (4000, 3)], indirect=["threads"])
@pytest.mark.usefixtures("way")
def test_every_parameter_of_every_architecture_is_that_of_batches_of_one(
    tiny, batch, kind, side, max_bytes, threads
):
    model, inputs = tiny(kind, dtype=F64), batch(kind, side=side, dtype=F64)
    ours = squared_gradients(model, lambda: log_likelihood(model, inputs), samples=3, max_bytes=max_bytes)
    assert_same(ours, by_loop(model, inputs))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_it_is_what_torch_func_says(tiny, batch):
    model, inputs = tiny("bert", dtype=F64, attn_implementation="eager"), batch("bert")
    del inputs["attention_mask"]  # vmap can't see through the code that reads it

    def value(parameters, sample):
        one = {k: v[None] for k, v in sample.items()}
        label = one.pop("labels")
        return -cross_entropy(functional_call(model, parameters, (), one).logits, label)

    named = {name: p.detach() for name, p in model.named_parameters()}
    grads = vmap(grad(value), in_dims=(None, 0))(named, inputs)
    ours = squared_gradients(model, lambda: log_likelihood(model, inputs), samples=3)
    assert_same(ours, {name: g.square().sum(0) for name, g in grads.items()})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.usefixtures("way")
def test_a_weight_tied_to_the_head_gets_the_square_of_its_sum(tiny, batch, kind):
    model, inputs = tiny(kind, dtype=F64, tie_word_embeddings=True), batch(kind)
    model.get_input_embeddings().padding_idx = 0
    ours = squared_gradients(model, lambda: log_likelihood(model, inputs), samples=3)
    assert len(ours) == len(list(model.parameters())) < len(model.state_dict())
    assert_same(ours, by_loop(model, inputs))


@pytest.mark.usefixtures("way")
def test_the_true_fisher_is_the_expectation_over_labels(tiny, batch):
    model, inputs = tiny("bert", dtype=F64), batch("bert")
    rest = {k: v for k, v in inputs.items() if k != "labels"}

    def weighted():
        logp = model(**rest).logits.log_softmax(-1)
        return (logp.detach().exp().sqrt() * logp).t()

    ours = squared_gradients(model, weighted, samples=3)
    p = model(**rest).logits.softmax(-1).detach()
    expected = {name: torch.zeros_like(v) for name, v in ours.items()}
    for s in range(3):
        for y in range(3):
            one = {k: v[s : s + 1] for k, v in inputs.items()} | {"labels": torch.tensor([y])}
            for name, value in by_loop(model, one).items():
                expected[name] += p[s, y] * value
    assert_same(ours, expected)


def test_no_layer_is_left_to_the_slow_way_in_usual_models(tiny, batch, monkeypatch):
    for kind in ("llama", "gpt2", "bert"):
        model, inputs = tiny(kind, dtype=F64), batch(kind)
        expected = squared_gradients_reference(model, lambda m=model, i=inputs: log_likelihood(m, i))
        with monkeypatch.context() as patch:
            patch.setattr("pefttutor.kernels.fisher.squared_gradients_reference", None)
            ours = squared_gradients(model, lambda m=model, i=inputs: log_likelihood(m, i), samples=3)
        assert_same(ours, expected)


def test_rows_that_are_not_samples_are_noticed():
    """A table looked up with as many rows as there are samples, for all of them: T5's position bias, by bad luck."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.out = nn.Embedding(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            shared = self.bias(torch.arange(3))  # (3, 5), the same for every sample
            return self.out(x + shared.sum(0)).log_softmax(-1)[:, 0]

    torch.manual_seed(0)
    model, x = Biased().double(), torch.randn(3, 5, dtype=F64)
    ours = squared_gradients(model, lambda: model(x), samples=3)
    assert_same(ours, squared_gradients_reference(model, lambda: model(x)))


def test_only_what_requires_a_gradient_is_measured(tiny, batch):
    model, inputs = tiny("bert", dtype=F64), batch("bert")
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.bert.encoder.layer[0].output.LayerNorm.weight.requires_grad_(True)
    ours = squared_gradients(model, lambda: log_likelihood(model, inputs), samples=3)
    assert set(ours) == {
        "classifier.weight",
        "classifier.bias",
        "bert.encoder.layer.0.output.LayerNorm.weight",
    }
    full = by_loop(model.requires_grad_(True), inputs)
    assert_same(ours, {name: full[name] for name in ours})


def test_a_norm_that_adds_one_to_its_weight():
    class GemmaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=F64))

        def forward(self, x):
            return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)

    model, x = GemmaRMSNorm(), torch.randn(4, 2, 3, dtype=F64)
    assert per_sample.knows(model)
    ours = squared_gradients(model, lambda: model(x).pow(3).sum((1, 2)), samples=4)
    assert_same(ours, squared_gradients_reference(model, lambda: model(x).pow(3).sum((1, 2))))


def test_half_precision_is_summed_in_float32(tiny, batch):
    exact, inputs = tiny("bert", dtype=F64), batch("bert")
    model = tiny("bert", dtype=torch.bfloat16)
    ours = squared_gradients(model, lambda: log_likelihood(model, inputs), samples=3)
    expected = squared_gradients(exact, lambda: log_likelihood(exact, inputs), samples=3)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert ours[name].dtype == torch.float32
    assert torch.corrcoef(torch.stack([ours[name].flatten(), expected[name].float().flatten()]))[0, 1] > 0.99


def test_errors_say_what_was_given(tiny, batch):
    model, inputs = tiny("bert"), batch("bert")
    with pytest.raises(ValueError, match=r"returned \(\), expected one value a sample: \(3,\)"):
        squared_gradients(model, lambda: log_likelihood(model, inputs).sum(), samples=3)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="returned NaN"):
        squared_gradients(model, lambda: log_likelihood(model, inputs), samples=3)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        squared_gradients(model.requires_grad_(False), lambda: log_likelihood(model, inputs), samples=3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    """The root's slope at 0 is infinite, the value is 0."""
    model, x = nn.Linear(2, 2), torch.ones(3, 2)

    def forward():
        y = model(x)
        return (y - y.detach()).square().pow(0.25).sum(1) if bad != bad else (y - y.detach()).pow(0.5).sum(1)

    assert not forward().any()
    with pytest.raises(FloatingPointError, match="gradient of 'weight' has NaN or infinite"):
        squared_gradients(model, forward, samples=3)


@pytest.mark.usefixtures("way")
def test_one_of_two_uses_gets_no_gradient():
    layer, x = nn.Linear(3, 2).double(), torch.randn(3, 4, 3, dtype=F64)

    def forward():
        layer(x.cos())  # for nothing
        return layer(x).sin().sum((1, 2))

    assert_same(squared_gradients(layer, forward, samples=3), squared_gradients_reference(layer, forward))


def test_a_batch_as_large_as_its_texts_are_long(tiny):
    """T5 looks its position bias up by (query, key): with as many queries as samples it looks like a batch."""
    model, generator = tiny("t5", dtype=F64), torch.Generator().manual_seed(2)
    ids = torch.randint(3, 97, (4, 4), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(1)}
    ours = squared_gradients(model, lambda: log_likelihood(model, inputs), samples=4)
    assert_same(ours, by_loop(model, inputs))


def test_two_texts_of_two_tokens_one_of_which_is_padding(tiny):
    """T5 looks two by two distances up; of the padded text nothing tells that these aren't its rows."""
    model = tiny("t5", dtype=F64)
    ids = torch.tensor([[5, 0], [7, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    ours = squared_gradients(model, lambda: log_likelihood(model, inputs), samples=2)
    assert_same(ours, by_loop(model, inputs))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.usefixtures("way")
def test_texts_of_one_token(tiny, kind):
    model, ids = tiny(kind, dtype=F64), torch.tensor([[5], [7], [9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    inputs["labels"] = ids[:, 0] % 2 if kind == "bert" else ids

    def forward(inputs=inputs):
        if kind == "gpt2":  # nothing to predict: the value is a logit
            return model(input_ids=inputs["input_ids"]).logits[:, -1, 3]
        return log_likelihood(model, inputs)

    ours = squared_gradients(model, forward, samples=3)
    assert_same(ours, squared_gradients_reference(model, forward))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_layer_proved_once_is_trusted_later(tiny, monkeypatch, kind):
    """What was found with two samples holds for the rest, except for what has two dimensions: BERT's head.

    Not for a T5 with as many texts as tokens: its position bias looks like a batch there, and like none before.
    """
    asked, mixed = [], fisher._mixed
    monkeypatch.setattr(fisher, "_mixed", lambda *args: asked.append(args[1]) or mixed(*args))
    model, generator = tiny(kind, dtype=F64), torch.Generator().manual_seed(2)
    ids = torch.randint(3, 97, (10, 4), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["labels"] = ids[:, 0] % 2 if kind == "bert" else ids.flip(1)
    examples = [{name: value[s] for name, value in inputs.items()} for s in range(10)]
    found = fisher_information(
        model, examples, batch_size=4, collate=default_collate, log_likelihood=log_likelihood
    )
    assert_same(found, {name: value / 10 for name, value in by_loop(model, inputs).items()})
    names = {layer: name for name, layer in model.named_modules()}
    first, *later = [{names[call.layer] for call in calls} for calls in asked]
    assert len(first) > 10
    heads = {"bert.pooler.dense", "classifier"}
    biases = {
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias" for side in ("encoder", "decoder")
    }
    assert later == [heads if kind == "bert" else biases] * 2


def test_an_expert_that_gets_as_many_tokens_as_there_are_samples_is_not_trusted():
    """Tokens of a mixture's expert look like samples when their number is the batch's; at first they even are."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, chosen):  # (B, T, 3), (B, T)
            out = self.layer(x[chosen])
            return torch.zeros(*x.shape[:2], 2, dtype=x.dtype).masked_scatter(chosen.unsqueeze(2), out)

    model, x = Expert().double(), torch.randn(6, 3, 3, dtype=F64)
    chosen = torch.zeros(6, 3, dtype=torch.bool)
    chosen[:2, 0] = True  # the first two samples: a token each
    chosen[2, :2] = chosen[3, 1] = chosen[4, 2] = (
        True  # the other four: four tokens, but two are of one sample
    )
    examples = [{"x": a, "chosen": b} for a, b in zip(x, chosen, strict=True)]

    def value(model, batch):
        return model(**batch).sin().sum((1, 2))

    assert_means(model, examples, value)


def test_a_layer_that_is_also_called_with_tokens_first_is_not_trusted():
    """Where there are as many samples as tokens, nothing but a proof tells the two calls apart."""
    layer, x = nn.Linear(3, 2).double(), torch.randn(6, 4, 3, dtype=F64)

    def value(layer, batch):
        both = layer(batch["x"]) * layer(batch["x"].transpose(0, 1).cos()).transpose(0, 1)
        return both.sin().sum((1, 2))

    assert_means(layer, [{"x": a} for a in x], value)


def assert_means(model, examples, value, batch_size=4):
    """Two examples, then batches of the rest, give what each gives alone."""
    found = fisher_information(
        model, examples, batch_size=batch_size, collate=default_collate, log_likelihood=value
    )
    each = [
        squared_gradients_reference(model, lambda e=e: value(model, default_collate([e]))) for e in examples
    ]
    assert_same(found, {name: sum(one[name] for one in each) / len(each) for name in found})


def test_an_expert_that_gets_no_token_of_the_first_sample():
    """And of the other seven as many tokens as there are samples."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(30, 6), nn.Linear(6, 3)
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

        def forward(self, ids):
            h = self.embedding(ids)
            out = torch.zeros_like(h)
            for i, expert in enumerate(self.experts):
                out[ids % 4 == i] = expert(h[ids % 4 == i])
            return self.head(out.tanh().mean(1)).log_softmax(-1)[:, 0]

    torch.manual_seed(0)
    model = Mixture().double()
    ids = torch.randint(0, 7, (10, 4)) * 4 + torch.randint(1, 4, (10, 4))
    ids[3:7, :2] = ids[3:7, :2] // 4 * 4  # the first expert's: two of four samples
    assert_means(model, [{"ids": i} for i in ids], lambda model, batch: model(**batch), batch_size=8)


def test_a_proof_that_saw_nothing_is_not_trusted(tiny):
    """Of one or two labels T5's decoder shows no row of its position bias but the sample's own."""
    model, generator = tiny("t5", dtype=F64), torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 97, (4, 2), generator=generator) for _ in range(2))
    labels[0, 1] = -100
    examples = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
        for i, y in zip(ids, labels, strict=True)
    ]
    assert_means(model, examples, log_likelihood, batch_size=2)


@pytest.mark.usefixtures("way")
def test_in_inference_mode_too(tiny, batch):
    model, inputs = tiny("gpt2", dtype=F64), batch("gpt2")
    examples = [{name: value[s] for name, value in inputs.items()} for s in range(3)]
    expected = fisher_information(model, examples, collate=default_collate, log_likelihood=log_likelihood)
    with torch.inference_mode():
        found = fisher_information(model, examples, collate=default_collate, log_likelihood=log_likelihood)
    assert_same(found, expected)
    assert any(value.any() for value in found.values())


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.usefixtures("way")
def test_under_autocast_it_is_what_autograd_gives_there(tiny, batch, kind):
    model, inputs = tiny(kind), batch(kind)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return log_likelihood(model, inputs)

    expected = squared_gradients_reference(model, forward)
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            ours = squared_gradients(model, forward, samples=3)
        for name, value in expected.items():
            assert ours[name].dtype == torch.float32
            if value.max() > 1e-9:
                assert (ours[name] - value).abs().max() < 0.05 * value.max(), name


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.usefixtures("way")
def test_tokens_without_a_gradient_cost_nothing_and_change_nothing(threads):
    """The value reads one token of a sample, two of another: the rest of the eight are left out."""
    model, x = (
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double(),
        torch.randn(3, 8, 5, dtype=F64),
    )
    weight = torch.zeros(3, 8, 3, dtype=F64)
    weight[0, 4], weight[1, 1], weight[1, 7, 1:] = 1, 2, 3

    def forward():
        return (model(x).sin() * weight).sum((1, 2))

    a, delta = per_sample._busy(x, weight)
    assert a.shape == (3, 2, 5)
    assert delta.shape == (3, 2, 3)
    assert_same(squared_gradients(model, forward, samples=3), squared_gradients_reference(model, forward))
