"""PaFi: the smallest entries, without any data."""

from __future__ import annotations

import torch

from pefttutor import (
    PaFi,
    fit,
)
from tests.tiny import (
    language_examples,
    llama,
)


def test_pafi_chooses_what_kthvalue_says():
    model = llama(tie_word_embeddings=False)
    chosen = PaFi(fraction=0.03).masks(model)
    assert not any("embed" in name for name in chosen)
    named = dict(model.named_parameters())
    flat = torch.cat([named[name].abs().flatten() for name in chosen])
    mask = torch.cat([m.flatten() for m in chosen.values()])
    k = int(0.03 * len(flat))
    assert int(mask.sum()) == k
    limit = flat.kthvalue(k).values
    assert flat[mask].max() <= limit <= flat[~mask].min()


def test_pafi_asks_for_no_data_and_is_the_same_for_every_task():
    one, two = llama(), llama()
    PaFi(fraction=0.02).attach(one)
    fit(one, language_examples(), steps=2, lr=0.05)
    again = PaFi(fraction=0.02).attach(two)
    for (n, a), (_, b) in zip(one.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), n
