"""Where a model's tokens go in, what its blocks are called with, and hooks that come and go."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

import pefttutor as pt
from pefttutor.parts.blocks import blocks
from pefttutor.parts.streams import Hooked, cache_made, hidden_states, reader, seen_before, token_ids
from tests.cases import answer
from tests.pictures import differences, picture
from tests.tiny import bert, llama_classifier, made, tiny_batch, tiny_model

HIDDEN = torch.ones(2, 3, 4)
IDS = torch.ones(2, 3, dtype=torch.long)


# ---- what a block is called with


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((HIDDEN,), {}),
        ((HIDDEN, "mask"), {"cache": None}),
        ((), {"mask": torch.ones(2, 3), "hidden_states": HIDDEN}),
        ((), {"ids": IDS.unsqueeze(0), "hidden_states": HIDDEN, "other": 5}),
    ],
)
def test_the_hidden_states_are_found_and_replaced_where_they_stand(args, kwargs):
    assert hidden_states(args, kwargs) is HIDDEN
    new = torch.zeros(2, 3, 4)
    new_args, new_kwargs = hidden_states(args, kwargs, new)
    assert hidden_states(new_args, new_kwargs) is new
    assert new_args[1:] == args[1:]
    assert new_kwargs.keys() == kwargs.keys()
    assert all(new_kwargs[key] is value for key, value in kwargs.items() if value is not HIDDEN)


def test_without_any_it_says_what_it_was_called_with():
    with pytest.raises(
        ValueError, match=r"called with \['mask'\]; expected hidden states \(batch, seq, d\) first"
    ):
        hidden_states((), {"mask": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((IDS,), {}, True),
        ((), {"input_ids": IDS}, True),
        ((HIDDEN,), {"input_ids": IDS}, True),
        ((), {"inputs_embeds": HIDDEN}, False),
        ((HIDDEN,), {"input_ids": None}, False),
        ((torch.ones(2, 3),), {}, False),
        ((IDS[0],), {}, False),
    ],
)
def test_token_ids_are_two_dimensional_whole_numbers(args, kwargs, found):
    assert (token_ids(args, kwargs) is IDS) is found


class Counted:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("kwargs", "filled"),
    [
        ({}, False),
        ({"past_key_values": None}, False),
        ({"past_key_values": Counted(0)}, False),
        ({"past_key_values": Counted(4)}, True),
        ({"cache_params": SimpleNamespace()}, None),
    ],
)
def test_a_cache_says_whether_it_holds_tokens_already(kwargs, filled):
    cache, found = seen_before(kwargs)
    assert found is filled
    assert cache is next(iter(kwargs.values()), None)


# ---- where tokens go in


@pytest.mark.parametrize(
    ("make", "path", "width"),
    [
        (lambda: tiny_model("llama"), "model", 24),
        (lambda: tiny_model("gpt2"), "transformer", 24),
        (lambda: tiny_model("bert"), "bert", 24),
        (llama_classifier, "model", 16),
        (bert, "bert", 16),
        (lambda: tiny_model("llama").model, "", 24),
    ],
)
def test_the_body_gets_the_tokens_and_its_blocks_the_width(make, path, width):
    model = make()
    before = picture(model)
    body, found = reader(model)
    assert body is model.get_submodule(path)
    assert found == width
    assert differences(before, picture(model)) == []


def test_blocks_may_be_wider_than_the_embeddings():
    sizes = {"vocab_size": 50, "embedding_size": 6, "hidden_size": 8, "intermediate_size": 12}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    albert = made(hf.AlbertModel, hf.AlbertConfig(**sizes, num_hidden_groups=2))
    electra = made(hf.ElectraModel, hf.ElectraConfig(**sizes))
    assert reader(albert)[1] == reader(electra)[1] == 8


def test_without_values_it_is_what_is_usual():
    with torch.device("meta"):
        model = llama_classifier()
    body, width = reader(model)
    assert body is model.model
    assert width == 16


class Turned(nn.Module):
    """It hands (seq, batch, d) to its blocks, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_of_another_order_are_refused_with_what_they_get():
    model = Turned()
    before = picture(model)
    with pytest.raises(ValueError, match=r"those of a Turned get two tokens of one text as \(2, 1, 4\)"):
        reader(model)
    assert differences(before, picture(model)) == []


def test_a_model_that_needs_more_than_tokens_is_refused_with_its_own_error():
    model = tiny_model("vit")
    model.get_input_embeddings = lambda: nn.Embedding(3, 3)
    with pytest.raises(ValueError, match="a ViTForImageClassification can't be tried with two tokens alone"):
        reader(model)


# ---- hooks that come and go


def note(seen: list[str], name: str):
    return lambda module, args, kwargs: seen.append(name)


def test_hooks_are_put_once_taken_away_and_put_again():
    model, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    before = picture(model)
    part = Hooked([(model[0], note(seen, "first")), (model[1], note(seen, "second"))],
                  after=[(model, lambda module, args, output: seen.append("after"))])  # fmt: skip
    part.switch(True)
    model(torch.ones(1, 2))
    assert seen == ["first", "second", "after"]
    part.switch(False)
    part.switch(False)
    model(torch.ones(1, 2))
    assert len(seen) == 3
    assert differences(before, picture(model)) == []
    part.switch(True)
    model(torch.ones(1, 2))
    assert len(seen) == 6
    part.remove()
    assert differences(before, picture(model)) == []
    assert part.trained() == part.saved() == []
    with pytest.raises(ValueError, match="no weight can hold"):
        part.check_foldable()


def test_what_is_taken_back_before_a_module_is_taken_back_last_one_first():
    """Whatever is switched meanwhile; a hook of one's own gets what the module gets without any."""
    module, seen = nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda module, args: seen.append("own"))
    first, second = (
        Hooked([(module, note(seen, name))], taking_back=[(module, note(seen, f"{name} back"))])
        for name in ("first", "second")
    )
    module(torch.ones(1, 2))
    for part in (second, first):  # switched in the wrong order
        part.switch(False)
        part.switch(True)
    for part in (first, second):
        part.in_turn()
    module(torch.ones(1, 2))
    assert seen == 2 * ["second back", "first back", "own", "first", "second"]
    second.remove()
    seen.clear()
    module(torch.ones(1, 2))
    assert seen == ["first back", "own", "first"]


def add_one(module: nn.Module, args, kwargs):
    return (args[0] + 1, *args[1:]), kwargs


def test_what_a_hook_returns_is_what_the_module_gets_and_a_copy_has_its_own():
    model = nn.Sequential(nn.Linear(2, 2))
    expected = model(torch.full((1, 2), 2.0))
    model.part = [Hooked([(model[0], add_one)])]
    torch.testing.assert_close(model(torch.ones(1, 2)), expected)
    twin = copy.deepcopy(model)
    twin.part[0].switch(False)
    torch.testing.assert_close(model(torch.ones(1, 2)), expected)
    assert not torch.allclose(twin(torch.ones(1, 2)), expected)


def test_what_goes_between_blocks_is_seen_by_the_outer_model_and_the_body_alike():
    model, seen = tiny_model("llama"), []
    part = Hooked([(block, note(seen, "block")) for block in blocks(model)[1]])
    inputs = tiny_batch("llama")
    model(**inputs)
    model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert seen == ["block"] * 4
    part.remove()


# ---- several on one body

STREAMS = {
    "prompt": lambda: pt.PromptTuning(num_virtual_tokens=3),
    "prefix": lambda: pt.PrefixTuning(num_virtual_tokens=4),
    "special": lambda: pt.PASTA(special_token_ids=(1, 5, 9)),
}


def carrying(*names: str) -> nn.Module:
    model = tiny_model("llama")
    for name in names:
        STREAMS[name]().attach(model, name=name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("pair", list(itertools.combinations(STREAMS, 2)), ids="-".join)
def test_the_order_in_which_two_kinds_are_attached_or_switched_changes_nothing(pair):
    batch, said = tiny_batch("llama", side="left"), []
    batch["input_ids"][:, 6:] = torch.tensor([5, 8, 9])
    prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for order in (pair, pair[::-1]):
        model = carrying(*order)
        said.append(answer(model, batch))
        pt.switch(model, order[1])
        assert not torch.equal(answer(model, batch), said[0])
        pt.switch(model, *order)
        said.append(answer(model, batch))
        torch.testing.assert_close(said, said[:1] * len(said))
        written = [
            model.generate(**prompt, use_cache=use_cache, max_new_tokens=4, min_new_tokens=4)
            for use_cache in (True, False)
        ]
        assert torch.equal(*written)


def test_a_hook_of_ones_own_stays_before_what_is_attached_later():
    model, seen = tiny_model("llama"), []
    model.model.register_forward_pre_hook(lambda body, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pt.PromptTuning(num_virtual_tokens=3).attach(model)
    pt.switch(pt.switch(model), "default")(**tiny_batch("llama"))
    assert seen[-1]["input_ids"].shape == (3, 9)


def test_a_cache_is_asked_for_by_its_newest_name():
    """Transformers 5.24 warns whoever asks its outputs by a name of before."""

    class Output:
        cache = hf.DynamicCache()

        @property
        def past_key_values(self):
            raise AssertionError("asked by the old name")

    assert cache_made(Output()) is Output.cache
    assert cache_made(SimpleNamespace(past_key_values=(old := hf.DynamicCache()))) is old
    assert cache_made(SimpleNamespace(logits=None)) is None
