"""DyLoRA: every rank against HF PEFT's LoRA of that rank; what a step moves, and that nothing else does."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from pefttutor import DyLoRA, LoRA, attached, fit, load, merge, save, trainable, unmerge
from pefttutor.train.hooks import Hooks
from tests.lowrank.peers import EXACT, drawn, lora_config, run, with_peft
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("how", ["chosen", "drawn", "drawn, frozen"])
@pytest.mark.parametrize(
    ("kind", "names", "rank"),
    [("llama", ("q_proj", "down_proj"), 2), ("gpt2", ("c_attn",), 1), ("bert", ("query", "dense"), 3)],
)
def test_every_rank_is_a_lora_of_peft_in_outputs_and_gradients(tiny, batch, kind, names, rank, how):
    """Chosen in evaluation, drawn in training; frozen, only the last direction gets the gradient."""
    ours = DyLoRA(r=4, lora_alpha=7, target_modules=names, frozen="frozen" in how)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left", dtype=F64)
    adapted = drawn(ours.attach(copy.deepcopy(base))).train(how != "chosen")
    if how == "chosen":
        ours.use_rank(adapted, rank)
    else:
        for part in attached(adapted)["default"].parts[:-1]:
            part.held("lora_ranks")[0] = rank
    short = LoRA(r=rank, lora_alpha=7, target_modules=names)
    theirs, parameters = with_peft(base, lora_config(short))
    theirs.train(how != "chosen")
    own = dict(adapted.named_parameters())
    for name in trainable(adapted):
        values = own[name].data
        parameters[name].data.copy_(values[:rank] if name.endswith("lora_A") else values[:, :rank])
    torch.testing.assert_close(run(adapted, inputs), run(theirs, inputs), **EXACT)
    for name in trainable(adapted):
        expected = torch.zeros_like(own[name])
        first = rank - 1 if "frozen" in how else 0
        for i in range(first, rank):
            index = (i,) if name.endswith("lora_A") else (slice(None), i)
            expected[index] = parameters[name].grad[index]
        assert expected.abs().max() > 1e-8
        torch.testing.assert_close(own[name].grad, expected, **EXACT)


def test_ranks_are_uniform_the_same_for_the_whole_model_and_go_on_after_an_interruption(tmp_path):
    method = DyLoRA(r=4, target_modules=("0", "1"))
    counts = Counter(method.drawn_rank(step) for step in range(2000))
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(n - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for n in counts.values())
    assert DyLoRA(r=4, init_seed=1).drawn_rank(0) != method.drawn_rank(0)
    rows = [{"x": torch.randn(6)} for _ in range(4)]
    how = {"loss": lambda m, b: m(b["x"]).square().mean(), "batch_size": 2, "lr": 0.05}
    models = []
    for steps in ((6,), (6, 6)):
        torch.manual_seed(1)
        model = method.attach(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
        folder = tmp_path / str(len(steps))
        for i, _ in enumerate(steps):
            interrupted = i == 0 and len(steps) == 2
            Stop.left = 3 if interrupted else 10**9
            own = how | {"loss": Stop(how["loss"])}
            fit(model, rows, steps=6, checkpoint=folder, resume=i > 0, **own)
        models.append(model)
    one, other = models
    assert int(one.dylora_step) == 6
    assert differences(dict(one.named_parameters()), dict(other.named_parameters())) == []
    ranks = [int(layer.lora_ranks[0]) for layer in other]
    assert ranks == [method.drawn_rank(6)] * 2


class Stop:
    """A loss that is interrupted after so many calls."""

    left = 0

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, model, batch):
        Stop.left -= 1
        if Stop.left < 0:
            raise KeyboardInterrupt
        return self.loss(model, batch)


@pytest.mark.parametrize("frozen", [True, False])
def test_only_what_a_step_has_drawn_moves_under_momentum_and_decay(frozen):
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(8, 6)
    method = DyLoRA(r=3, frozen=frozen, target_modules=("0",))
    drawn(method.attach(model)).train()
    hooks, optimizer = Hooks(model), torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for step in range(8):
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        rank = method.drawn_rank(step)
        model(x).square().mean().backward()
        hooks.after_backward(step)
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
        free = {rank - 1} if frozen else set(range(rank))
        for name, was in before.items():
            now = model.get_parameter(name)
            rows, rows_before = (now, was) if name.endswith("lora_A") else (now.T, was.T)
            moved = {i for i in range(3) if not torch.equal(rows[i], rows_before[i])}
            assert moved == free


def test_merging_folds_the_chosen_rank_also_in_training_and_a_file_knows_it(tmp_path):
    base = nn.Sequential(nn.Linear(6, 5)).eval()
    method = DyLoRA(r=3, target_modules=("0",))
    model, x = drawn(method.attach(copy.deepcopy(base))).eval(), torch.randn(4, 6)
    whole = model(x).detach()
    said = method.use_rank(model, 2)(x).detach()
    assert not torch.allclose(said, whole)
    save(model, tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path).eval()(x), said)
    merge(model.train()).eval()
    torch.testing.assert_close(model(x), said)
    with pytest.raises(RuntimeError, match="'default' is merged with the rank it had"):
        method.use_rank(model, 1)
    assert torch.equal(unmerge(model)(x), said)


def test_a_loop_that_asks_no_hook_is_told_so():
    model = DyLoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 5)))
    with pytest.warns(
        UserWarning, match="DyLoRA: only one rank was trained, for after_step was never called"
    ):
        Hooks(model).warn_of_unfinished()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(dropout, dtype):
    method = DyLoRA(r=4, target_modules=("q_proj", "down_proj"), lora_dropout=dropout)
    assert_estimate_is_measured("llama", method, dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model, method = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 6)), DyLoRA(r=3, target_modules=("0",))
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        DyLoRA(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: DyLoRA takes no embedding"):
        DyLoRA(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match=r"frozen is 1\.5; it must be one of True, False"):
        DyLoRA(frozen=1.5)
    with pytest.raises(ValueError, match="no method is attached"):
        method.use_rank(model, 1)
    assert differences(before, picture(model)) == []
    method.attach(model)
    with pytest.raises(ValueError, match=r"'default' is DyLoRA\(r=3, .*, and not this method, DyLoRA\(r=4"):
        DyLoRA(r=4, target_modules=("0",)).use_rank(model, 4)
    for wrong in (0, 4, True, 1.0):
        with pytest.raises(ValueError, match=rf"rank is {wrong}; it must be a whole number from 1 to r, 3"):
            method.use_rank(model, wrong)
