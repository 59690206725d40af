"""An interrupted pretraining goes on as if nothing had happened, and its optimizer is the one that everybody means."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from world import corpus, muon, pretrain, rows, rules

TINY = pretrain.Recipe(16, 2, 2, 24, 0.02, 3e-3, steps=8, rows=2, length=32)


def _few_documents(monkeypatch):
    monkeypatch.setattr(pretrain, "fast_bfloat16", lambda: False)  # which it finds out by the clock
    make = corpus.marked_documents
    monkeypatch.setattr(corpus, "marked_documents", lambda seed, n, **kind: make(seed, min(n, 200), **kind))


@pytest.mark.parametrize("encoder", [False, True])
def test_an_interrupted_pretraining_resumes_to_the_same_weights(tmp_path, monkeypatch, encoder):
    monkeypatch.setitem(pretrain.RECIPES, "campus-nano", dataclasses.replace(TINY, encoder=encoder))
    _few_documents(monkeypatch)

    def train(run):
        folder = tmp_path / run
        pretrain.train("campus-nano", folder, models=folder, compiled=False, every=1, save_every=0)
        return load_file(folder / "campus-nano/checkpoint.safetensors")

    whole = train("whole")

    def stopped(step, done, recipe, rate=pretrain.rate):
        if step == 5:
            raise KeyboardInterrupt
        return rate(step, done, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "rate", stopped)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    parts = train("parts")
    assert whole.keys() == parts.keys()
    assert not [k for k in whole if not torch.equal(whole[k], parts[k])]
    facts = json.loads((tmp_path / "parts/campus-nano/training.json").read_text())
    assert facts["steps"] == 8
    assert facts["tokens"] == 8 * 2 * 32
    assert facts["text_sha256"] == pretrain.text_sha256()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, monkeypatch):
    _few_documents(monkeypatch)
    for lr in (0.02, 0.01):
        monkeypatch.setitem(pretrain.RECIPES, "campus-nano", dataclasses.replace(TINY, steps=2, muon_lr=lr))
        if lr == 0.02:
            pretrain.train("campus-nano", tmp_path, models=tmp_path / "models", compiled=False)
    with pytest.raises(ValueError, match=r"another recipe.*'muon_lr': 0.01.*--work"):
        pretrain.train("campus-nano", tmp_path, models=tmp_path / "models", compiled=False)


def test_a_run_with_a_clock_ends_with_it_and_its_rate_has_fallen(tmp_path, monkeypatch):
    monkeypatch.setitem(pretrain.RECIPES, "campus-nano", dataclasses.replace(TINY, steps=10**6))
    _few_documents(monkeypatch)
    shares = []

    def noted(step, done, recipe, rate=pretrain.rate):
        shares.append(rate(10**6, done, recipe))  # far behind the warm-up
        return rate(step, done, recipe)

    monkeypatch.setattr(pretrain, "rate", noted)
    pretrain.train("campus-nano", tmp_path, models=tmp_path, seconds=6.0, compiled=False)
    assert shares[0] == 1
    assert shares[-1] < 0.1


def test_text_written_ahead_is_the_text_that_is_drawn(tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_file(str(pretrain.MODELS / "tokenizer.json"))
    kind = dataclasses.replace(rows.KINDS["late"], documents=100)
    monkeypatch.setitem(rows.KINDS, "late", kind)
    rows._write((tmp_path, "late", 0))
    read = rows.Rows(tokenizer, "late", 2, 64, folder=tmp_path)
    drawn = rows.Rows(tokenizer, "late", 2, 64)
    for a, b in zip(read.next(), drawn.next(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "late" / "0.npz").unlink()
    waited = rows.Rows(tokenizer, "late", 2, 64, folder=tmp_path, patience=0.1)
    assert torch.equal(waited.next()[0], rows.Rows(tokenizer, "late", 2, 64).next()[0])


def test_each_shard_is_text_of_its_own_and_rows_go_on_across_them(monkeypatch):
    tokenizer = Tokenizer.from_file(str(pretrain.MODELS / "tokenizer.json"))
    for name, kind in rows.KINDS.items():
        monkeypatch.setitem(rows.KINDS, name, dataclasses.replace(kind, documents=4))
    texts = [rows.draw(tokenizer, kind, no)[0].tolist() for kind in rows.KINDS for no in range(3)]
    assert len({tuple(text) for text in texts}) == len(texts)
    one, other = (rows.Rows(tokenizer, "main", 2, 32) for _ in range(2))
    read = [one.next() for _ in range(12)]
    assert one.shard_no > 1
    other.skip(11)
    assert all(torch.equal(a, b) for a, b in zip(read[11], other.next(), strict=True))
    assert (one.shard_no, one.at) == (other.shard_no, other.at)


@pytest.mark.parametrize("shapes", [[(24, 16), (16, 24), (24, 16)], [(8, 8)]])
def test_muon_is_torchs_muon(shapes):
    g = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    theirs = [torch.nn.Parameter(m.detach().clone()) for m in ours]
    mine = muon.Muon(ours)
    peer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01, momentum=0.95)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        mine.step(0.02)
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # bfloat16 inside: updates of about 0.02


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
    monkeypatch.setitem(rows.KINDS, "main", rows.Kind(1, 1, documents=3))
    ids, inferable = rows.Rows(tokenizer, "main", 1, 10).next()
    assert set(inferable.unique().tolist()) == {False, True}
    weights = 1 + 5.0 * inferable
    model = pretrain.new_model(TINY)
    losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    expected = (losses * weights[0, 1:]).sum() / weights[0, 1:].sum()
    torch.testing.assert_close(pretrain.loss_of(model, ids, False, weights), expected)
    torch.testing.assert_close(pretrain.loss_of(model, ids, False), losses.mean())
