"""Grow a trained causal model into a wider and deeper one that starts from what the small one knows.

Width: every wide unit copies a narrow one; what reads k copies of a unit weighs each by 1/k, so the function stays the same
(exactly for whole multiples; RMSNorm makes it approximate otherwise). Depth: a new layer is a copy whose two outputs are zero,
that is, the identity. A little noise then tells the copies apart.

Source: Chen, Goodfellow and Shlens 2016 (Net2Net) for width; the zero output for depth is standard practice.
"""

import torch
from torch import Tensor, nn


def _mapping(wide: int, narrow: int) -> tuple[Tensor, Tensor]:
    """Which narrow unit each wide one copies, and 1 / (number of copies of it)."""
    index = torch.arange(wide) % narrow
    copies = torch.bincount(index, minlength=narrow).float()
    return index, 1.0 / copies[index]


def _heads(wide: int, narrow: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The same for attention channels, which are copied by whole heads."""
    index, share = _mapping(wide // head_dim, narrow // head_dim)
    return (index[:, None] * head_dim + torch.arange(head_dim)).flatten(), share.repeat_interleave(head_dim)


@torch.no_grad()
def grow(small: nn.Module, large: nn.Module, *, noise: float = 0.02, seed: int = 0) -> None:
    """Write `small` (LlamaForCausalLM, tied embeddings, biases) into `large`, which has at least its width and depth."""
    s, g = small.config, large.config
    hidden, ffn = _mapping(g.hidden_size, s.hidden_size), _mapping(g.intermediate_size, s.intermediate_size)
    heads = _heads(g.hidden_size, s.hidden_size, s.hidden_size // s.num_attention_heads)
    rows = {
        "q_proj": heads,
        "k_proj": heads,
        "v_proj": heads,
        "o_proj": hidden,
        "gate_proj": ffn,
        "up_proj": ffn,
        "down_proj": hidden,
    }
    columns = {"q_proj": hidden, "k_proj": hidden, "v_proj": hidden, "o_proj": heads, "gate_proj": hidden, "up_proj": hidden,
               "down_proj": ffn}  # fmt: skip
    source = small.state_dict()
    generator = torch.Generator().manual_seed(seed)
    taken: set[int] = set()
    for i, layer in enumerate(large.model.layers):
        old = i * s.num_hidden_layers // g.num_hidden_layers
        new_layer = old in taken
        taken.add(old)
        for name, parameter in layer.named_parameters():
            weight, module = source[f"model.layers.{old}.{name}"], name.split(".")[-2]
            if module not in rows:  # the two norms
                parameter.copy_(weight[hidden[0]])
                continue
            wide = weight[rows[module][0]]
            if weight.dim() == 2:
                wide = wide[:, columns[module][0]] * columns[module][1]
                wide = wide + noise * wide.std() * torch.randn(wide.shape, generator=generator)
            parameter.copy_(
                torch.zeros_like(wide) if new_layer and module in ("o_proj", "down_proj") else wide
            )
    large.model.norm.weight.copy_((source["model.norm.weight"][hidden[0]]) * hidden[1])
    large.model.embed_tokens.weight.copy_(source["model.embed_tokens.weight"][:, hidden[0]])
