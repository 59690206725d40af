"""Child-Tuning: its limiting cases, the mean of many draws, and who moves although masked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import (
    ChildTuningD,
    ChildTuningF,
    fit,
)
from tests.tiny import (
    class_examples,
    llama_classifier,
    weights,
)


def trained(attach, **settings):
    model = llama_classifier()
    attach(model)
    fit(model, class_examples(), steps=5, lr=0.01, **settings)
    return {n: p.detach() for n, p in model.named_parameters() if not n.endswith("_values")}


def test_with_all_of_the_network_both_are_full_fine_tuning():
    full = trained(lambda model: model.requires_grad_(True))
    of_f = trained(lambda model: ChildTuningF(p_F=1).attach(model))
    of_d = trained(lambda model: ChildTuningD(p_D=1).attach(model, class_examples()))
    for name, weight in full.items():
        assert torch.equal(of_f[name], weight)
        torch.testing.assert_close(of_d[name], weight, rtol=1e-5, atol=1e-7)


def test_the_expected_gradient_of_f_is_the_whole_gradient():
    model = nn.Linear(6, 5)
    method = ChildTuningF(p_F=0.3)
    method.attach(model)
    torch.manual_seed(0)
    whole = torch.randn(5, 6)
    draws = []
    for step in range(4000):
        model.weight.grad = whole.clone()
        method.after_backward(model, step)
        draws.append(model.weight.grad.clone())
    draws = torch.stack(draws)
    kept = (draws != 0).float().mean()
    assert abs(kept - 0.3) < 0.01
    assert set((draws / whole).flatten().mul(3).round().unique().tolist()) == {0.0, 10.0}
    error = (draws.mean(0) - whole).abs() / whole.abs()
    assert error.max() < 5 * ((1 / 0.3 - 1) / 4000) ** 0.5


def test_f_moves_everything_through_momentum_and_d_does_not():
    before = weights(llama_classifier())
    of_f = trained(lambda model: ChildTuningF(p_F=0.3).attach(model), weight_decay=0.1)
    of_d = trained(lambda model: ChildTuningD(p_D=0.3).attach(model, class_examples()), weight_decay=0.1)

    def share(after):
        moved = sum(int((after[n] != old).sum()) for n, old in before.items())
        return moved / sum(old.numel() for old in before.values())

    assert share(of_f) > 0.9
    assert share(of_d) <= 0.3


def test_an_interrupted_run_of_f_goes_on_bit_for_bit(tmp_path):
    class Stop(ChildTuningF):
        def after_backward(self, model, step):
            if step == stop_at:
                raise KeyboardInterrupt
            super().after_backward(model, step)

    def run(**more):
        model = llama_classifier()
        method = Stop(p_F=0.4)
        method.attach(model)
        fit(model, class_examples(), steps=6, lr=0.01, **more)
        return weights(model)

    stop_at = -1
    expected = run()
    stop_at = 3
    run(checkpoint=tmp_path)
    stop_at = -1
    resumed = run(checkpoint=tmp_path, resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("p", [0, 1.01, None])
def test_a_probability_outside_is_refused(p):
    with pytest.raises(ValueError, match=r"p_F is .*\(0, 1\]"):
        ChildTuningF(p_F=p)
    with pytest.raises(ValueError, match=r"p_D is .*\(0, 1\]"):
        ChildTuningD(p_D=p)
