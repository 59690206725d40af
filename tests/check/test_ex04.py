"""The checks of notebook 04 against answers written in other ways, and wrong in yet others (see test_mistakes)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from pefttutor import PrefixTuning, check, detach
from pefttutor.check import ex04
from pefttutor.parts.cached_attention import cache_key
from tests.check.rejection import reason
from tests.tiny import tiny_model


def test_right_answers_written_in_another_way_pass(capsys):
    def attention(q, k, v, prefix_k, prefix_v, mask):
        keys = torch.cat([prefix_k[None].repeat(len(q), 1, 1, 1), k], dim=-2)
        values = torch.cat([prefix_v[None].repeat(len(q), 1, 1, 1), v], dim=-2)
        count, n = prefix_k.shape[1], q.shape[2]
        causal = torch.ones(n, count + n).tril(diagonal=count).bool()
        seen = F.pad(mask, (count, 0), value=1).bool()[:, None, None, :] & causal
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)

    def share(prefix_scores, text_scores):
        both = torch.cat([prefix_scores, text_scores], dim=-1)
        return both.softmax(dim=-1)[..., : prefix_scores.shape[-1]].sum(dim=-1)

    def pairs(prefix, layers, heads, batch):
        found, size = [], prefix.shape[1] // (2 * layers)
        for i in range(layers):
            both = [prefix[:, (2 * i + j) * size : (2 * i + j + 1) * size] for j in (0, 1)]
            split = [x.reshape(len(prefix), heads, size // heads).transpose(0, 1) for x in both]
            found.append([x.unsqueeze(0).repeat(batch, 1, 1, 1) for x in split])
        return tuple(found)

    class InOneRow(nn.Module):
        def __init__(self, count, d, m, width):
            super().__init__()
            self.table = nn.Parameter(torch.rand(count, d))
            self.second, self.first = nn.Linear(m, width), nn.Linear(d, m)

        def forward(self):
            return nn.Sequential(self.first, nn.Tanh(), self.second)(self.table)

        def dropped(self):
            with torch.no_grad():
                return nn.Parameter(self())

    answers = {
        check.ex04_1: attention,
        check.ex04_2: share,
        check.ex04_3: pairs,
        check.ex04_4: InOneRow,
    }
    for check_function, answer in answers.items():
        assert check_function(answer) is answer
    assert capsys.readouterr().out.count("correct") == 4


def test_the_share_splits_the_attention():
    """Attention with a prefix is (1 − λ) of that to the text and λ of that to the prefix."""
    q, k, v, prefix_k, prefix_v = (torch.randn(2, 3, n, 4) for n in (5, 5, 5, 6, 6))
    prefix_k, prefix_v = prefix_k[0], prefix_v[0]
    whole = ex04.prefix_attention(q, k, v, prefix_k, prefix_v, torch.ones(2, 5))
    text = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    prefix = F.scaled_dot_product_attention(q, *(x.expand(2, -1, -1, -1) for x in (prefix_k, prefix_v)))
    unseen = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / 2).masked_fill(unseen, -torch.inf)
    share = ex04.prefix_share(q @ prefix_k.mT / 2, scores)[..., None]
    assert torch.allclose(whole, (1 - share) * text + share * prefix, atol=1e-5)


def test_the_package_puts_a_prefix_where_the_reference_does():
    """The logits of `PrefixTuning`, and of the model behind a cache with the reference's pairs."""
    model = tiny_model("llama").eval()
    config = model.config
    ids = torch.tensor([[5, 6, 7], [8, 9, 4]])
    model = PrefixTuning(num_virtual_tokens=4).attach(model)
    prefix = next(p for name, p in model.named_parameters() if name.endswith("prefix")).detach()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = detach(model)
        cache = DynamicCache(config=config)
        pairs = ex04.layer_pairs(prefix, config.num_hidden_layers, config.num_key_value_heads, 2)
        for layer, pair in enumerate(pairs):
            cache.update(*pair, layer)
        came = plain(input_ids=ids, **{cache_key(plain.model): cache}).logits
    assert torch.allclose(came, expected, atol=1e-5)


def test_the_package_counts_as_the_reference_does():
    model = tiny_model("llama")
    config = model.config
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    made = ex04.MadeByMLP(3, config.hidden_size, 7, width)
    method = PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7)
    assert sum(p.numel() for p in made.parameters()) == method.count(model)
    assert made.dropped().numel() == PrefixTuning(num_virtual_tokens=3).count(model)


@pytest.mark.parametrize(
    ("check_function", "attempt", "says"),
    [
        (check.ex04_1, lambda **inputs: None, "None"),
        (check.ex04_1, lambda q, k, v, prefix_k, prefix_v, mask: torch.cat([prefix_k, k], 2), "RuntimeError"),
        (check.ex04_1, lambda **inputs: inputs["q"] @ inputs["k"].mT, "shape (2, 2, 3, 3)"),
        (check.ex04_2, lambda prefix_scores, text_scores: 0.5, "float"),
        (check.ex04_2, lambda prefix_scores, text_scores: ex04.prefix_share(prefix_scores, text_scores)[0], "shape"),
        (check.ex04_3, lambda **inputs: ex04.layer_pairs(**inputs)[0], "list of float32"),
        (check.ex04_3, lambda prefix, layers, heads, batch: prefix.view(batch, heads, -1, 7), "RuntimeError"),
        (check.ex04_4, lambda **inputs: nn.Linear(inputs["d"], inputs["width"]), "parameters"),
        (check.ex04_4, lambda **inputs: None, "AttributeError"),
    ],
)  # fmt: skip
def test_other_wrong_answers_are_rejected_too(check_function, attempt, says):
    assert says in reason(check_function, attempt)
