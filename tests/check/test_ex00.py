"""The checks of notebook 00 take a right answer, however it is written, and name the mistake in a wrong one."""

import pytest
import torch
from torch import nn

from pefttutor import check
from pefttutor.check.ex00 import ACCURACY, COUNTING, count_parameters, token_accuracy, train_only


def rejected(exercise, attempt):
    with pytest.raises(AssertionError) as caught:
        exercise(attempt)
    return str(caught.value)


def named_parameters(model):
    named = dict(model.named_parameters())
    return sum(map(torch.numel, named.values())), sum(p.numel() for p in named.values() if p.requires_grad)


def by_storage(model):
    distinct = {p.data_ptr(): p for module in model.modules() for p in module.parameters(recurse=False)}
    return (
        sum(p.numel() for p in distinct.values()),
        sum(p.numel() for p in distinct.values() if p.requires_grad),
    )


@pytest.mark.parametrize("right", [count_parameters, named_parameters, by_storage])
def test_counting_right(right, capsys):
    assert check.ex00_1(right) is right
    assert "correct" in capsys.readouterr().out


@pytest.mark.parametrize("mistake", COUNTING)
def test_counting_wrong(mistake):
    assert mistake in rejected(check.ex00_1, COUNTING[mistake])


# ---- 00.2


def the_rest(model, part, lr):
    """Right, written in another way."""
    own = set(model.get_submodule(part).parameters())
    for p in model.parameters():
        p.grad, p.requires_grad = None, p in own
    return torch.optim.AdamW(own, lr=lr)


def set_on_module(model, part, lr):
    model.requires_grad = False
    model.get_submodule(part).requires_grad = True
    return torch.optim.AdamW(model.parameters(), lr=lr)


def built_before(model, part, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    train_only(model, part, lr)
    return optimizer


def holds_all(model, part, lr):
    train_only(model, part, lr)
    return torch.optim.AdamW(model.parameters(), lr=lr)


def by_text(model, part, lr):
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad_(part in name)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def by_beginning(model, part, lr):
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad_(name.startswith(part))
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def stale_gradients(model, part, lr):
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.get_submodule(part).parameters():
        p.requires_grad_(True)
    return torch.optim.AdamW(model.get_submodule(part).parameters(), lr=lr)


def all_frozen(model, part, lr):
    for p in model.parameters():
        p.requires_grad_(False)
    return torch.optim.AdamW(model.get_submodule(part).parameters(), lr=lr)


def never_opened(model, part, lr):
    for name, p in model.named_parameters():
        p.grad = None
        if not name.startswith(part + "."):
            p.requires_grad_(False)
    return torch.optim.AdamW(model.get_submodule(part).parameters(), lr=lr)


def weight_only(model, part, lr):
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None
    weight = model.get_submodule(part).weight.requires_grad_(True)
    return torch.optim.AdamW([weight], lr=lr)


def only_optimizer(model, part, lr):
    model.requires_grad_(True)
    model.zero_grad()
    return torch.optim.AdamW(model.get_submodule(part).parameters(), lr=lr)


def wrong_way_round(model, part, lr):
    model.requires_grad_(True)
    model.get_submodule(part).requires_grad_(False)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def nothing_returned(model, part, lr):
    train_only(model, part, lr)


def own_lr(model, part, lr):
    return train_only(model, part, 1e-3)


def new_head(model, part, lr):
    model.requires_grad_(False)
    setattr(model, part, nn.Linear(5, 3))
    return train_only(model, part, lr)


def trains_at_once(model, part, lr):
    optimizer = train_only(model, part, lr)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


WRONG = {
    set_on_module: "its parameters never see it",
    built_before: "built before freezing",
    holds_all: "gets model.parameters()",
    by_text: "compared as text",
    by_beginning: "compared as text",
    stale_gradients: "parameter.grad = None is missing",
    all_frozen: "open the part again",
    never_opened: "frozen before isn't opened again",
    weight_only: "bias is forgotten",
    only_optimizer: "the rest isn't frozen",
    wrong_way_round: "the wrong way round",
    nothing_returned: "doesn't return its optimizer",
    own_lr: "lr isn't passed on",
    new_head: "a new layer or nn.Parameter was made",
    trains_at_once: "the function trains",
}


@pytest.mark.parametrize("right", [train_only, the_rest])
def test_freezing_right(right):
    assert check.ex00_2(right) is right


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_freezing_wrong(wrong):
    assert WRONG[wrong] in rejected(check.ex00_2, wrong)


def test_the_check_draws_no_number_of_the_learner():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check.ex00_2(train_only)
    assert torch.equal(torch.rand(1), expected)


# ---- 00.3


def by_cross(logits, labels):
    """Right, as a tensor, and over the flattened batch."""
    predicted, labels = logits[:, :-1].flatten(0, 1).max(-1).indices, labels[:, 1:].flatten()
    return (predicted[labels != -100] == labels[labels != -100]).float().mean()


@pytest.mark.parametrize("right", [token_accuracy, by_cross])
def test_accuracy_right(right):
    assert check.ex00_3(right) is right


@pytest.mark.parametrize("mistake", ACCURACY)
def test_accuracy_wrong(mistake):
    assert mistake in rejected(check.ex00_3, ACCURACY[mistake])


def test_accuracy_that_overwrites_the_labels_is_rejected():
    def fills(logits, labels):
        result = token_accuracy(logits, labels)
        labels[labels == -100] = 0
        return result

    assert "labels has changed" in rejected(check.ex00_3, fills)
