"""AdaMix against the plain adapter, against the formula with each draw, and by the counts of the authors' code."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from pefttutor import AdaMix, Adapter, LoRA, fit, load, memory, save, trainable
from tests.cases import answer, base_answer, batch_of, fresh, gradients, loss_of, moved
from tests.memory.models import TARGET_LENGTH, held
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import rows_of, tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])
def test_one_expert_is_an_adapter(kind, placement):
    """Outputs and every gradient, bit for bit, in training mode and in evaluation."""
    how = {"placement": placement, "bottleneck": 5, "activation": "tanh"}
    ours = moved(AdaMix(experts=1, **how).attach(tiny_model(kind, dtype=F64)))
    plain, inputs = Adapter(**how).attach(tiny_model(kind, dtype=F64)), tiny_batch(kind, dtype=F64)
    names = {n: n.replace("adamix", "adapter") for n in trainable(ours)}
    for name, theirs in names.items():
        p = plain.get_parameter(theirs)
        p.data.copy_(ours.get_parameter(name).view_as(p))
    for training in (False, True):
        ours.train(training), plain.train(training)
        assert torch.equal(answer(ours, inputs), answer(plain, inputs))
        found, expected = (gradients(m, loss_of(m, inputs)) for m in (ours, plain))
        assert set(found) == set(names)
        for name, grad in found.items():
            assert grad.abs().max() > 1e-8
            assert torch.equal(grad.view_as(expected[names[name]]), expected[names[name]]), name


@pytest.mark.parametrize(
    ("share", "shapes"),
    [
        ("up", [(3, 4, 24), (3, 4), (24, 4), (24,)]),
        ("down", [(4, 24), (4,), (3, 24, 4), (3, 24)]),
        ("none", [(3, 4, 24), (3, 4), (3, 24, 4), (3, 24)]),
    ],
)
def test_in_training_an_expert_of_each_matrix_is_drawn_and_no_other_gets_a_gradient(share, shapes):
    model = torch.nn.ModuleDict({"down": torch.nn.Linear(6, 24, dtype=F64)})
    moved(AdaMix(bottleneck=4, experts=3, share=share, target_modules=("down",)).attach(model)).train()
    down, down_bias, up, up_bias = w = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in w] == shapes
    x, seen = torch.randn(5, 6, dtype=F64), set()
    for _ in range(60):
        model.zero_grad()
        y = model.down(x)
        y.square().sum().backward()
        # which one, by its gradient
        drawn = [
            int(p.grad.flatten(1).abs().sum(1).nonzero()) if share != which else None
            for which, p in (("down", down), ("up", up))
        ]
        for i, (matrix, bias) in zip(drawn, ((down, down_bias), (up, up_bias)), strict=True):
            if i is not None:
                assert (matrix.grad.flatten(1).abs().sum(1) > 0).tolist() == [j == i for j in range(3)]
                assert (bias.grad.abs().sum(1) > 0).tolist() == [j == i for j in range(3)]
        one = [
            p if i is None else p[i] for p, i in zip(w, (drawn[0], drawn[0], drawn[1], drawn[1]), strict=True)
        ]
        h = F.linear(x, model.down.weight, model.down.bias)
        expected = h + F.linear(F.gelu(F.linear(h, one[0], one[1])), one[2], one[3])
        torch.testing.assert_close(y, expected, **EXACT)
        seen.add(tuple(drawn))
    assert len(seen) == (9 if share == "none" else 3)


def test_layers_draw_for_themselves_and_in_evaluation_nothing_is_drawn():
    model, inputs = moved(AdaMix(bottleneck=4, experts=3).attach(fresh("llama"))), batch_of("llama")
    assert torch.equal(answer(model, inputs), answer(model, inputs))
    said = {answer(model.train(), inputs).sum().item() for _ in range(80)}
    assert 5 <= len(said) <= 9  # two layers with three experts each


def test_the_mean_of_the_weights_is_that_of_the_outputs_after_the_nonlinearity_alone():
    model = torch.nn.ModuleDict({"down": torch.nn.Linear(6, 24, dtype=F64)})
    for share, same in (("down", True), ("up", False)):
        method = AdaMix(bottleneck=4, experts=2, share=share, target_modules=("down",))
        moved(method.attach(model, name=share))
        x = torch.randn(5, 6, dtype=F64)
        mean = model.eval().down(x)
        outputs = torch.stack([model.train().down(x) for _ in range(40)]).unique(dim=0)
        assert len(outputs) == 2
        assert torch.allclose(outputs.mean(0), mean, rtol=1e-9) is same
        model = torch.nn.ModuleDict({"down": torch.nn.Linear(6, 24, dtype=F64)})


def test_averaged_it_says_what_it_said_draws_no_more_and_is_as_small_as_an_adapter(tmp_path):
    method = AdaMix(bottleneck=4, experts=3, share="none")
    model = moved(method.attach(fresh("bert")))
    said = answer(model, batch_of("bert"))
    method.average(model)
    assert torch.equal(answer(model, batch_of("bert")), said)
    assert torch.equal(answer(model.train(), batch_of("bert")), answer(model, batch_of("bert")))
    plain = Adapter(placement="pfeiffer", bottleneck=4).count(fresh("bert"))
    assert sum(trainable(model).values()) == plain < method.count(fresh("bert"))
    save(model.eval(), tmp_path)
    assert torch.equal(answer(load(fresh("bert"), tmp_path), batch_of("bert")), said)
    other = LoRA(r=2, target_modules=("query",)).attach(fresh("bert"))
    with pytest.raises(ValueError, match="'default' is a LoRA, which has no experts"):
        method.average(other)


# ---- the loss of two passes


@pytest.mark.parametrize(("kind", "shifted"), [("llama", True), ("bert", False)])
def test_the_loss_is_the_formula_by_two_passes_with_the_same_draws(kind, shifted):
    model, batch = AdaMix(bottleneck=4, experts=3).attach(tiny_model(kind, dtype=F64)), batch_of(kind)
    moved(model).train()
    method = AdaMix(bottleneck=4, experts=3, consistency=5.0)
    method.loss(model, batch)  # whether the labels are shifted is found once
    torch.manual_seed(3)
    found = method.loss(model, batch)
    torch.manual_seed(3)
    one, other = model(**batch), model(**batch)
    p, q = one.logits, other.logits
    assert not torch.equal(p, q)
    if shifted:
        real = batch["labels"][:, 1:] != -100
        p, q = p[:, :-1][real], q[:, :-1][real]
    p, q = p.float(), q.float()
    kl = [
        F.kl_div(b.log_softmax(-1), a.detach().softmax(-1), reduction="batchmean")
        for a, b in ((p, q), (q, p))
    ]
    expected = one.loss + 5.0 * (kl[0] + kl[1]) / 2
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert kl[0] > 1e-4
    ours, theirs = gradients(model, found), gradients(model, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_fit_takes_it_and_what_has_no_labels_is_refused():
    method, batch = AdaMix(bottleneck=4, experts=2), batch_of("llama")
    model = method.attach(fresh("llama"))
    before = tensors(model)
    fit(model, rows_of(batch), steps=2, lr=0.01, loss=method.loss, progress=False)
    assert set(trainable(model)) <= set(differences(before, tensors(model)))
    with pytest.raises(ValueError, match="expected 'labels' among them"):
        method.loss(model, {"input_ids": batch["input_ids"]})


# ---- start, counts, memory, refusals


def test_it_starts_as_the_base_in_training_too_and_a_seed_fixes_it():
    model = AdaMix(bottleneck=4).attach(fresh("gpt2")).train()
    assert torch.equal(answer(model, batch_of("gpt2")), base_answer("gpt2"))
    one, same, other = (tensors(AdaMix(bottleneck=4, init_seed=i).attach(fresh("gpt2"))) for i in (1, 1, 2))
    assert differences(one, same) == []
    assert all("adamix_down" in name for name in differences(one, other))
    experts = one[next(name for name in one if name.endswith("adamix_down"))]
    assert not torch.equal(experts[0], experts[1])


def test_the_counts_for_bert_base_are_those_of_the_authors_code():
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    place = {"target_modules": r".*\.\d+\.output\.dense"}
    assert AdaMix(**place).count(model) == 12 * 185_280
    assert AdaMix(experts=1, **place).count(model) == 894_528


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("bert", torch.bfloat16), ("t5", torch.float32)]
)
def test_what_a_step_keeps_for_it_is_estimated(kind, dtype):
    model, method = model_for_memory(kind, dtype=dtype), AdaMix(bottleneck=16)
    options = {"batch_size": 2, "sequence_length": 24, "target_length": TARGET_LENGTH, "attention": "eager"}
    estimated = memory.estimate(model, method, **options, device="cpu")
    method.attach(model)
    assert estimated.trained == sum(trainable(model).values()) == method.count(model)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bottleneck": 28}, "bottleneck is 28, but .* gives 24 features: it must be at most 24"),
        ({"experts": 0}, "experts is 0; it must be a whole number ≥ 1"),
        ({"share": "both"}, "share is 'both'; it must be one of 'up', 'down', 'none'"),
        ({"placement": "parallel"}, "placement is 'parallel'; it must be one of 'pfeiffer', 'houlsby'"),
        ({"consistency": -1}, "consistency is -1; it must be a number ≥ 0"),
        ({"target_modules": ("wrong",)}, "target_modules: this model has no 'wrong'"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        AdaMix(**({"bottleneck": 4} | fields)).attach(model)
    assert differences(before, picture(model)) == []
