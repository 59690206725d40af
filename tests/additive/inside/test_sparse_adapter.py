"""SparseAdapter against the dense adapter with zeros, its scores against autograd, and what its files keep."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pefttutor import Adapter, SparseAdapter, fit, load, memory, save, trainable
from tests.cases import answer, base_answer, batch_of, fresh, gradients, loss_of, moved
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import held
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import rows_of, tiny_batch, tiny_model

F64 = torch.float64
SIZES = {"bottleneck": 6, "fraction": 0.3}


def dense_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a sparse adapter, put into zeros; and its biases."""
    found = {}
    for name, p in model.named_parameters():
        path, _, key = name.rpartition(".sparse_")
        if key.endswith("_bias"):
            found[f"{path}.adapter_{key}"] = p.detach()
        elif path:
            which, layer = key.removesuffix("_kept"), model.get_submodule(path)
            shape = (len(layer.sparse_down_bias), len(layer.sparse_up_bias))
            full = torch.zeros(shape[0] * shape[1], dtype=p.dtype)
            full[layer.get_buffer(f"sparse_{which}_place")] = p.detach()
            found[f"{path}.adapter_{which}"] = full.view(shape if which == "down" else shape[::-1])
    return found


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])
def test_it_is_the_dense_adapter_with_zeros_and_gets_the_same_gradients_where_it_has_weights(kind, placement):
    how = {"placement": placement, "activation": "tanh", "scaling": 1.5}
    ours = moved(SparseAdapter(**SIZES, **how).attach(tiny_model(kind, dtype=F64)))
    plain, inputs = (
        Adapter(bottleneck=6, **how).attach(tiny_model(kind, dtype=F64)),
        tiny_batch(kind, dtype=F64),
    )
    dense = dense_of(ours)
    assert dense.keys() == trainable(plain).keys()
    for name, value in dense.items():
        plain.get_parameter(name).data.copy_(value)
    assert torch.equal(answer(ours, inputs), answer(plain, inputs))
    found, expected = (gradients(m, loss_of(m, inputs)) for m in (ours, plain))
    for name, grad in found.items():
        path, _, key = name.rpartition(".sparse_")
        theirs = expected[f"{path}.adapter_{key.removesuffix('_kept')}"]
        if key.endswith("_kept"):
            theirs = theirs.flatten()[ours.get_buffer(name.replace("_kept", "_place"))]
        assert torch.equal(grad, theirs), name
    assert max(g.abs().max() for g in found.values()) > 1e-6


@pytest.mark.parametrize("score", ["random", "magnitude", "snip"])
def test_the_best_scored_weights_are_kept_over_all_adapters(score):
    """By autograd on the dense adapter, which starts with the same draws."""
    base, batch = fresh("bert"), batch_of("bert")
    method = SparseAdapter(score=score, init_std=0.3, **SIZES)
    ours = method.attach(fresh("bert"), rows_of(batch))
    plain = Adapter(placement="pfeiffer", bottleneck=6, init_std=0.3).attach(base)
    weights = {n: p for n, p in plain.named_parameters() if p.requires_grad and not n.endswith("bias")}
    dense = dense_of(ours)
    n = sum(w.numel() for w in weights.values())
    kept = torch.cat([dense[name].flatten() != 0 for name in weights])
    assert int(kept.sum()) == int(0.3 * n)
    start = torch.cat([w.detach().flatten() for w in weights.values()])
    assert torch.equal(torch.cat([dense[name].flatten() for name in weights]), start * kept)
    if score == "random":
        assert all(0.1 < (dense[name] != 0).float().mean() < 0.5 for name in weights)
        return
    scores = start.abs()
    if score == "snip":
        found = gradients(plain, loss_of(plain, batch))
        scores = (start * torch.cat([found[name].flatten() for name in weights])).abs()
    assert scores[kept].min() >= scores[~kept].max()
    assert scores[~kept].max() > 0


def test_what_is_cut_stays_away_in_training():
    model = SparseAdapter(**SIZES).attach(fresh("llama"))
    before = dense_of(model)
    fit(model, rows_of(batch_of("llama")), steps=2, lr=0.01, weight_decay=0.1, progress=False)
    for name, after in dense_of(model).items():
        if not name.endswith("bias"):
            assert torch.equal(after == 0, before[name] == 0)
            assert not torch.equal(after, before[name])


def test_a_file_brings_its_places_without_examples_and_wrong_ones_are_refused(tmp_path):
    examples, batch = rows_of(batch_of("bert")), batch_of("bert")
    model = moved(SparseAdapter(score="snip", **SIZES).attach(fresh("bert"), examples))
    save(model, tmp_path / "good")
    said = answer(model, batch)
    assert torch.equal(answer(load(fresh("bert"), tmp_path / "good"), batch), said)
    file = tmp_path / "good" / "adapter.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    stored = load_file(file)
    key = next(name for name in stored if name.endswith("sparse_up_place"))
    for wrong in (stored[key] + 10_000, -stored[key] - 1, stored[key].float(), None):
        changed = {n: t for n, t in stored.items() if n != key} | ({} if wrong is None else {key: wrong})
        save_file(changed, file, metadata=metadata)
        base = fresh("bert")
        before = picture(base)
        with pytest.raises(ValueError, match="isn't there, or doesn't hold places among 144 weights"):
            load(base, tmp_path / "good")
        assert differences(before, picture(base)) == []


def test_it_starts_near_the_base_and_a_seed_fixes_it():
    near = answer(SparseAdapter(**SIZES, init_std=1e-3).attach(fresh("gpt2")), batch_of("gpt2"))
    assert 0 < (near - base_answer("gpt2")).norm() < 1e-4 * base_answer("gpt2").norm()
    one, same, other = (tensors(SparseAdapter(**SIZES, init_seed=i).attach(fresh("gpt2"))) for i in (1, 1, 2))
    assert differences(one, same) == []
    assert differences(one, other)


def test_all_weights_kept_is_the_adapter_and_large_sparse_has_as_many_values():
    """Eight times as wide with an eighth kept: the same weights, and only more biases."""
    base = fresh("llama")
    assert SparseAdapter(bottleneck=6, fraction=1).count(base) == Adapter(
        placement="pfeiffer", bottleneck=6
    ).count(base)
    wide = SparseAdapter(bottleneck=24, fraction=0.125).count(base)
    assert wide - SparseAdapter(bottleneck=3, fraction=1).count(base) == 2 * 21


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("bert", torch.bfloat16)])
def test_what_a_step_keeps_for_it_is_estimated(kind, dtype):
    model, method = model_for_memory(kind, dtype=dtype), SparseAdapter(bottleneck=16)
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager"}
    estimated = memory.estimate(model, method, **options, device="cpu")
    method.attach(model)
    assert estimated.trained == sum(trainable(model).values()) == method.count(model)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bottleneck": 28}, "bottleneck is 28, but .* gives 24 features: it must be at most 24"),
        ({"fraction": 0}, r"fraction is 0; it must be in \(0, 1\]"),
        ({"score": "snip"}, "SparseAdapter chooses by data: attach"),
        ({"score": "grasp"}, "score is 'grasp'; it must be one of 'random', 'magnitude', 'snip'"),
        ({"init_std": 0}, "init_std is 0; it must be a number > 0"),
        ({"target_modules": ("wrong",)}, "target_modules: this model has no 'wrong'"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        SparseAdapter(**(SIZES | fields)).attach(model)
    assert differences(before, picture(model)) == []
