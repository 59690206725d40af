"""AutoFreeze: its rule on small cases, what freezes with a block, and a run that is interrupted."""

from __future__ import annotations

import torch

from pefttutor import (
    AutoFreeze,
    fit,
    trainable,
)
from pefttutor.selective.auto_freeze import settled
from tests.tiny import (
    bert,
    class_examples,
    freeze_one_block,
    llama,
    llama_classifier,
    same,
    weights,
)


def test_what_has_settled_is_frozen_up_to_the_first_that_has_not():
    before = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert settled(before, torch.tensor([1.001, 0.99, 0.5, 1.02]), 0) == 2
    assert settled(before, torch.tensor([0.5, 0.99, 0.9, 1.0]), 0) == 0
    assert settled(before, torch.tensor([0.0, 0.999, 0.5, 0.98]), 1) == 2  # block 0 isn't looked at any more
    assert settled(before, before, 3) == 3


def test_auto_freeze_freezes_a_growing_prefix_and_can_be_interrupted(tmp_path):
    class Stop(AutoFreeze):
        def after_backward(self, model, step):
            if step == stop_at:
                raise KeyboardInterrupt
            super().after_backward(model, step)
            frozen.append(int(model.get_buffer("autofreeze_frozen")))

    def run(**more):
        model = llama_classifier(num_hidden_layers=4)
        method = Stop(interval=2, percentile=90)
        method.attach(model)
        fit(model, class_examples(), steps=9, lr=0.01, weight_decay=0.1, **more)
        return model

    stop_at, frozen = -1, []
    model = run()
    assert frozen == sorted(frozen)
    assert 0 < frozen[-1] < 4
    trains = trainable(model)
    for i in range(4):
        assert any(name.startswith(f"model.layers.{i}.") for name in trains) == (i >= frozen[-1])
    assert "model.embed_tokens.weight" not in trains
    stop_at, history, frozen = 6, frozen, []
    run(checkpoint=tmp_path)
    stop_at = -1
    assert same(weights(run(checkpoint=tmp_path, resume=True)), weights(model))
    assert frozen == history


def test_a_tied_head_is_frozen_with_the_embeddings():
    assert "model.embed_tokens.weight" not in trainable(freeze_one_block(llama()))
    assert "bert.embeddings.word_embeddings.weight" not in trainable(freeze_one_block(bert()))


def test_an_overflowing_gradient_leaves_no_nan_in_the_norms():
    model = llama_classifier(num_hidden_layers=3)
    method = AutoFreeze(interval=2)
    method.attach(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    method.after_backward(model, 0)
    before = model.get_buffer("autofreeze_norms").clone()
    assert before[1].min() > 0
    model.model.layers[1].mlp.up_proj.weight.grad[0, 0] = float("nan")
    method.after_backward(model, 1)
    assert torch.equal(model.get_buffer("autofreeze_norms")[0], before[1])
