"""What the methods of chapter 4.4 add to a weight, by their formulas from what is saved: dense, and slow.

Each formula gets the tensors of one layer by their keys, how many features go in and come out, the method, and the
model, for what layers share. A method's line here serves its own tests and the matrix of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Formula = Callable[[Tensors, int, int, Any, nn.Module], Tensor]


def vera(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    A, B = model.get_buffer("vera_A")[:, :n_in], model.get_buffer("vera_B")[:n_out]
    return t["vera_lambda_b"].diag() @ B @ t["vera_lambda_d"].diag() @ A


def loha(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    first, second = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2))
    return method.alpha / method.r * first * second


def lokr(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    W1, W2 = (t[f"lokr_w{i}"] if f"lokr_w{i}" in t else t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"] for i in (1, 2))
    rows = [torch.cat([w * W2 for w in row], 1) for row in W1]  # block by block
    return method.alpha / method.r * torch.cat(rows)


def melora(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    delta = torch.zeros(n_out, n_in, dtype=t["melora_A"].dtype)
    rows, columns = n_out // method.n, n_in // method.n
    for i, (A, B) in enumerate(zip(t["melora_A"], t["melora_B"], strict=True)):
        delta[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = B @ A
    return method.lora_alpha / method.r * delta


def lotr(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    L, R = (t[f"lotr_{x}_{n_out}x{n_in}"] for x in "LR")
    return method.lora_alpha / method.r * L @ t["lotr_M"] @ R


def mora(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    """As matrices: which feature fills which place, M · R(i) in a block for each group, and what is cut or repeated.

    R(i) is the exponential of i times what generates the rotation.
    """
    M = t["mora_M"]
    width, half = len(M), len(M) // 2
    groups = -(-n_in // width)
    filling = torch.eye(n_in, dtype=M.dtype)[torch.arange(groups * width) % n_in]
    if method.mora_type == 1:
        answers = torch.cat([M] * groups, 1) @ filling
    else:
        speeds = torch.tensor([10000.0 ** (-2 * k / width) for k in range(half)], dtype=M.dtype)
        turning = torch.zeros_like(M)
        turning[:half, half:], turning[half:, :half] = -speeds.diag(), speeds.diag()
        answers = torch.block_diag(*(M @ torch.matrix_exp(i * turning) for i in range(groups))) @ filling
    return answers[torch.arange(n_out) % len(answers)]


def mpo(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    """Of three tensors: every row and column by its three indices."""
    now = torch.einsum("xaip,pbjq,qcky->abcijk", *(t[f"mpo_{k}"] for k in range(3)))
    start = torch.einsum("xaip,pbjq,qcky->abcijk", t["mpo_0_start"], t["mpo_1"], t["mpo_2_start"])
    return (now - start).reshape(n_out, n_in)


def sltrain(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    S = torch.sparse_coo_tensor(
        torch.stack([t["sltrain_places"].long() // n_in, t["sltrain_places"].long() % n_in]),
        t["sltrain_values"],
        (n_out, n_in),
        check_invariants=True,
    )
    return method.lora_alpha / method.r * t["lora_B"] @ t["lora_A"] + S.to_dense()


MPO = ("mpo_0", "mpo_1", "mpo_2", "mpo_0_start", "mpo_2_start")
LOKR = tuple(f"lokr_w{i}{x}" for i in (1, 2) for x in ("", "_a", "_b"))

# By the key that a layer must hold for it, and the keys of all that the formula uses.
FORMULAS: dict[str, tuple[Formula, tuple[str, ...]]] = {
    "vera_lambda_b": (vera, ("vera_lambda_b", "vera_lambda_d")),
    "hada_w1_a": (loha, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    "lotr_M": (lotr, ("lotr_M",)),
    "melora_A": (melora, ("melora_A", "melora_B")),
    "mora_M": (mora, ("mora_M",)),
    "mpo_0": (mpo, MPO),
    "sltrain_values": (sltrain, ("sltrain_values", "sltrain_places", "lora_A", "lora_B")),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a"), (lokr, LOKR)),
}
USED = {key for _, keys in FORMULAS.values() for key in keys}
