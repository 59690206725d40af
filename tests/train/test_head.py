"""The converged head, held against scikit-learn's logistic regression."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import pefttutor
from pefttutor.train import head as module
from pefttutor.train.head import fit_head
from tests.tiny import language_examples, llama, llama_classifier, made, tiny_config, weights

HEADS = {
    "llama": (llama_classifier, "score"),
    "bert": (lambda: made(hf.BertForSequenceClassification, tiny_config("bert"), spread=True), "classifier"),
    "roberta": (lambda: _other("Roberta", pad_token_id=0), "classifier.out_proj"),
    "gpt2": (
        lambda: made(hf.GPT2ForSequenceClassification, tiny_config("gpt2", num_labels=3), spread=True),
        "score",
    ),
}


def _other(kind, **own):
    config = getattr(hf, f"{kind}Config")(
        vocab_size=97, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=32, num_labels=3, **own,
    )  # fmt: skip
    return made(getattr(hf, f"{kind}ForSequenceClassification"), config, spread=True)


def texts(n, classes=3, seed=0):
    """Five to seven tokens; the first and the last of them tell the class in four texts of five."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        ids = torch.randint(6, 90, (5 + i % 3,), generator=generator)
        label = int(ids[0] + ids[-1]) % classes if i % 5 else i % classes
        found.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(label)}
        )
    return found


def outputs(model, examples):
    """The logits of each text, one at a time, so without padding."""
    inputs = [{k: v[None] for k, v in e.items() if k != "labels"} for e in examples]
    with torch.no_grad():
        return torch.cat([model(**i).logits for i in inputs]).double()


def features(model, examples, head):
    seen = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    outputs(model, examples)
    hook.remove()
    return torch.cat([x[:, -1] if x.ndim == 3 else x for x in seen]).double()


@pytest.mark.parametrize("kind", HEADS)
def test_it_is_the_logistic_regression_of_scikit_learn(kind):
    make, head = HEADS[kind]
    model = make().eval()
    layer, train = model.get_submodule(head), texts(90)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x, labels = features(model, train, head), torch.stack([e["labels"] for e in train])
    has_bias = layer.bias is not None
    z = x - x.mean(0) if has_bias else x
    z = z / z.square().mean(0).sqrt()
    found = fit_head(model, train, texts(40, seed=1), batch_size=16)
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="the oracle comes with the extra `test`"
    )
    peer = linear_model.LogisticRegression(
        C=1 / (found.l2 * len(z)), fit_intercept=has_bias, tol=1e-9, max_iter=100_000
    ).fit(z, labels)
    expected = torch.from_numpy(peer.predict_log_proba(z.numpy()))
    torch.testing.assert_close(outputs(model, train).log_softmax(-1), expected, rtol=2e-3, atol=2e-4)
    assert (found.name, found.rows) == (head, 90)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if n.startswith(head)}


def test_the_validation_chooses_and_the_grid_goes_on_at_its_edge():
    model = llama_classifier()
    validation = texts(60, seed=1)
    found = fit_head(model, texts(60), validation, l2=[1e-4])
    assert len(found.tried) > 1
    assert not found.at_edge or found.l2 in module.WIDEST
    best = max(found.tried.values(), key=lambda scores: (scores["accuracy"], -scores["loss"]))
    assert found.tried[found.l2] == best
    scores = pefttutor.evaluate(model, validation)
    assert scores["accuracy"] == pytest.approx(best["accuracy"])
    assert scores["loss"] == pytest.approx(best["loss"], rel=1e-4)


def test_the_order_the_batches_and_the_heads_start_do_not_matter():
    train, validation = texts(60), texts(40, seed=1)
    one = llama_classifier()
    two = copy.deepcopy(one)
    nn.init.normal_(two.score.weight)
    fit_head(one, train, validation)
    fit_head(two, train[::-1], validation[::-1], batch_size=7, head="score")
    torch.testing.assert_close(one.score.weight, two.score.weight, rtol=1e-3, atol=1e-3)


def test_no_gradient_step_makes_the_loss_smaller():
    """Weight decay on the scaled features aside: at l2 → 0 the gradient of the mean loss itself is zero."""
    model, train = llama_classifier(), texts(90)
    found = fit_head(model, train, texts(40, seed=1), l2=[1e-7])
    fit_head(model, train, train, l2=[found.l2])
    before = pefttutor.evaluate(model, train)["loss"]
    pefttutor.LinearProbe(modules_to_save=("score",)).attach(model)
    pefttutor.fit(
        model, train, steps=30, batch_size=len(train), lr=1e-3, schedule="constant", weight_decay=0.0
    )
    assert pefttutor.evaluate(model, train)["loss"] > before - 1e-3


def test_a_language_models_head_and_labels_that_shift():
    model = llama(tie_word_embeddings=False)
    examples = language_examples(24)
    before = pefttutor.evaluate(model, examples)["loss"]
    found = fit_head(model, examples, examples)
    assert found.name == "lm_head"
    assert found.rows == sum(int((e["labels"][1:] != -100).sum()) for e in examples)
    assert pefttutor.evaluate(model, examples)["loss"] < before / 2


def test_a_tag_for_each_token():
    model = made(hf.BertForTokenClassification, tiny_config("bert", num_labels=2), spread=True)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(20):
        ids = torch.randint(6, 90, (5 + i % 3,), generator=generator)
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 2})
        examples[-1]["labels"][0] = -100
    found = fit_head(model, examples[:15], examples[15:])
    assert found.rows == sum(len(e["labels"]) - 1 for e in examples[:15])
    assert pefttutor.evaluate(model, examples[:15])["accuracy"] > 0.8


def test_an_encoder_decoder_is_asked_with_its_labels():
    model = made(hf.T5ForConditionalGeneration, tiny_config("t5"), spread=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    examples = [e | {"labels": e["input_ids"][:3]} for e in texts(12)]
    assert fit_head(model, examples, examples).rows == 36
    assert pefttutor.evaluate(model, examples)["accuracy"] > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_an_attachment_saves_comes_back_with_it(dtype, tmp_path):
    base, validation = llama_classifier().to(dtype), texts(40, seed=1)
    model = copy.deepcopy(base)
    pefttutor.LoRA(r=2, target_modules=("q_proj",), modules_to_save=("score",)).attach(model)
    fit_head(model, texts(60), validation)
    fitted = pefttutor.evaluate(model, validation)
    pefttutor.save(model, tmp_path)
    assert pefttutor.evaluate(pefttutor.load(copy.deepcopy(base), tmp_path), validation) == fitted
    pefttutor.detach(model)
    assert torch.equal(model.score.weight, base.score.weight)


def test_autocast_outside_changes_the_features_only_by_their_rounding():
    one, two = llama_classifier(), llama_classifier()
    fit_head(one, texts(60), texts(40, seed=1), l2=[0.1, 1.0, 10.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit_head(two, texts(60), texts(40, seed=1), l2=[0.1, 1.0, 10.0])
    torch.testing.assert_close(one.score.weight, two.score.weight, rtol=0.05, atol=0.02)


# ---- refused, and the model is as it was


def nowhere(model):
    return fit_head(model, texts(30), texts(9), head="nowhere")


def absent(model):
    return fit_head(model, [e for e in texts(30) if e["labels"] != 1], texts(9))


def broken(model):
    model.model.embed_tokens.weight.data[:] = float("nan")
    return fit_head(model, texts(30), texts(9))


def empty(model):
    return fit_head(model, texts(30), [])


def capped(model):
    model.score.register_forward_hook(lambda *a: a[2].tanh())
    return fit_head(model, texts(30), texts(9))


def regression(model):
    model.config.problem_type = "regression"
    examples = [e | {"labels": torch.rand(3)} for e in texts(30)]
    return fit_head(model, examples, examples)


def frozen(model):
    pefttutor.LoRA(r=2, target_modules=("q_proj",)).attach(model)
    return fit_head(model, texts(30), texts(9))


def adapted(model):
    pefttutor.LoRA(r=2, target_modules=("score",)).attach(model)
    return fit_head(model, texts(30), texts(9))


def switched_off(model):
    pefttutor.LoRA(r=2, target_modules=("q_proj",), modules_to_save=("score",)).attach(model)
    pefttutor.switch(model)
    return fit_head(model, texts(30), texts(9))


def bodily(model):
    return fit_head(model.model, texts(30), texts(9))


def weightless(model):
    return fit_head(copy.deepcopy(model).to("meta"), texts(30), texts(9))


def lower(model):
    return fit_head(model, texts(30), texts(9), head="model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (nowhere, r"head='nowhere' is no linear layer.*'score'"),
        (absent, r"no training example has the class 1 of 3.*draw more"),
        (broken, r"features of 30 of 30 rows aren't finite.*load it in float32"),
        (empty, r"validation is empty"),
        (capped, r"aren't what its layer 'score' returns"),
        (regression, r"expected one class"),
        (frozen, r"'score' belongs to the frozen base of 'default'.*modules_to_save=\('score',\)"),
        (adapted, r"'score' belongs to the frozen base"),
        (switched_off, r"'score' belongs to the frozen base"),
        (bodily, r"LlamaModel returns no logits; expected a model with a head"),
        (weightless, r"no weights yet"),
        (lower, r"aren't what its layer 'model.layers.0.mlp.down_proj' returns"),
    ],
)
def test_it_refuses(ask, says):
    model = llama_classifier()
    head = model.score.weight.clone()
    with pytest.raises(ValueError, match=says):
        ask(model)
    assert torch.equal(model.score.weight, head)
    if pefttutor.attached(model):
        pefttutor.detach(model)
    assert not any(m._forward_hooks for n, m in model.named_modules() if n != "score")


def test_a_tied_head_is_refused():
    model = llama(tie_word_embeddings=True)
    before = {n: t.clone() for n, t in weights(model).items()}
    with pytest.raises(ValueError, match=r"shared: 'model.embed_tokens.weight' and 'lm_head.weight'.*untie"):
        fit_head(model, language_examples(6), language_examples(6))
    assert all(torch.equal(t, before[n]) for n, t in weights(model).items())


def test_a_problem_without_an_end_is_named(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    model = llama_classifier()
    head = model.score.weight.clone()
    with pytest.raises(RuntimeError, match=r"not zero; try a larger l2"):
        fit_head(model, texts(30), texts(9), l2=[1e-3])
    assert torch.equal(model.score.weight, head)


def test_the_search_ends_where_a_weaker_penalty_has_no_minimum_within_reach(monkeypatch):
    fitted = module._fitted

    def out_of_reach(*data, **how):
        if data[4] < 1e-3:
            raise module._Unfinished("not zero; try a larger l2")
        return fitted(*data, **how)

    model, train = llama_classifier(), texts(40)
    free = fit_head(
        copy.deepcopy(model), train, train, l2=(1e-1, 1e-2)
    )  # on its own training texts: weaker is better
    monkeypatch.setattr(module, "_fitted", out_of_reach)
    found = fit_head(model, train, train, l2=(1e-1, 1e-2))
    assert free.l2 < 1e-3
    assert found.l2 == min(found.tried) == 1e-3
    with pytest.raises(RuntimeError, match="try a larger l2"):
        fit_head(model, train, train, l2=(1e-5,))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_caller_may_have_switched_gradients_off(kind, off):
    free, inside = (HEADS[kind][0]() for _ in range(2))
    wanted = fit_head(free, texts(40), texts(9))
    with off():
        found = fit_head(inside, texts(40), texts(9))
        assert torch.is_grad_enabled() is False
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), inside.parameters(), strict=True))
