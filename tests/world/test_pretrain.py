"""Growing keeps the function, and an interrupted pretraining goes on as if nothing had happened."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from world import corpus, grow, pretrain, rules

TINY = pretrain.Recipe(16, 2, 2, 24, steps=8, rows=2, length=32)


@pytest.mark.parametrize(
    "wide", [dict(hidden=32, ffn=48, heads=4), dict(hidden=48, ffn=40, heads=6, layers=5)]
)
def test_a_grown_model_computes_what_the_small_one_computed(wide):
    small, large = (
        pretrain.new_model(TINY).double(),
        pretrain.new_model(dataclasses.replace(TINY, **wide)).double(),
    )
    for name, parameter in small.named_parameters():  # biases start at 0 and norms at 1, which hides mistakes
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    grow.grow(small, large, noise=0.0)
    ids = torch.randint(6, 3000, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # the softmax of attention is computed in float32 whatever the weights are
        torch.testing.assert_close(large(ids).logits, small(ids).logits, atol=1e-4, rtol=1e-4)
        noisy = pretrain.new_model(dataclasses.replace(TINY, **wide)).double()
        grow.grow(small, noisy, noise=0.02)
        assert not torch.equal(noisy(ids).logits, large(ids).logits)


@pytest.mark.parametrize("encoder", [False, True])
def test_an_interrupted_pretraining_resumes_to_the_same_weights(tmp_path, monkeypatch, encoder):
    recipe = dataclasses.replace(TINY, encoder=encoder)
    monkeypatch.setitem(pretrain.RECIPES, "campus-seed", recipe)
    make = corpus.marked_documents
    monkeypatch.setattr(corpus, "marked_documents", lambda seed, n, **kind: make(seed, min(n, 200), **kind))
    pretrain.train("campus-seed", tmp_path / "whole", compiled=False, every=1)

    def stop(step, recipe):
        if step == 5:
            raise KeyboardInterrupt
        return 1.0

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "rate", lambda s, r, rate=pretrain.rate: stop(s, r) and rate(s, r))
        with pytest.raises(KeyboardInterrupt):
            pretrain.train("campus-seed", tmp_path / "parts", compiled=False, every=1)
    pretrain.train("campus-seed", tmp_path / "parts", compiled=False, every=1)
    whole, parts = (
        load_file(tmp_path / run / "campus-seed/checkpoint.safetensors") for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    different = [k for k in whole if not torch.equal(whole[k], parts[k])]
    assert not different


def test_a_shard_is_documents_between_start_and_end():
    tokenizer = Tokenizer.from_file(str(pretrain.MODELS / "tokenizer.json"))
    flat, told = corpus.shard(tokenizer, 1, 20)
    assert flat.shape == told.shape
    assert flat[0] == 1
    assert (flat == 1).sum() == (flat == 2).sum() == 20
    text = tokenizer.decode(flat[1 : list(flat).index(2)].tolist())
    assert text == next(corpus.documents(1, 20))


def test_what_can_be_inferred_weighs_more_and_marks_are_never_read(monkeypatch):
    tokenizer = Tokenizer.from_file(str(pretrain.MODELS / "tokenizer.json"))
    monkeypatch.setattr(
        corpus, "MIXTURE", {lambda rng: f"pear -> {rules.MARK}red boat{rules.MARK} and so on\n": 1.0}
    )
    flat, told = corpus.shard(tokenizer, 1, 3)
    assert tokenizer.decode(flat[told].tolist()).split() == ["red", "boat"] * 3
    assert tokenizer.decode(flat[~told].tolist()).split() == ["pear", "->", "and", "so", "on"] * 3
    recipe = dataclasses.replace(TINY, inferable=6.0, rows=1, length=10)
    rows, weights = pretrain.Rows(tokenizer, recipe).next()
    assert set(weights.unique().tolist()) == {1.0, 6.0}
    model = pretrain.new_model(recipe)
    logits = model(rows).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, rows[0, 1:], reduction="none")
    expected = (losses * weights[0, 1:]).sum() / weights[0, 1:].sum()
    torch.testing.assert_close(pretrain.loss_of(model, rows, False, weights), expected)
    torch.testing.assert_close(pretrain.loss_of(model, rows, False), losses.mean())
