"""Pretraining of the embedded models on the world's text, on a CPU, resumable.

Hidden matrices are trained by Muon (Jordan et al. 2024; `torch.optim.Muon`), everything else by AdamW. The learning rate warms up,
stays, and falls to a tenth over the last part. Multiplications run in bfloat16, weights and optimizer in float32.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from . import corpus
from .grow import grow

MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Recipe:
    """How one model is made: its shape, what it grows from, and how long it trains. `rows` × `length` tokens a step."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    steps: int
    start: str | None = None
    encoder: bool = False
    rows: int = 16
    length: int = 256
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    decay: float = 0.4  # share of the steps over which the learning rate falls
    seed: int = 1


RECIPES = {
    "campus-seed": Recipe(
        128, 4, 4, 352, steps=1000, decay=0.01
    ),  # where the three causal models start; not shipped
    "campus-nano": Recipe(128, 4, 4, 352, steps=700, start="campus-seed", seed=5),
    "campus-small": Recipe(
        256, 6, 8, 704, steps=900, start="campus-seed", muon_lr=0.015, adam_lr=2e-3, seed=2
    ),
    "campus-base": Recipe(
        384, 8, 12, 1024, steps=1100, start="campus-seed", muon_lr=0.01, adam_lr=1.5e-3, seed=3
    ),
    "campus-encoder": Recipe(256, 4, 8, 1024, steps=800, encoder=True, rows=32, length=128, seed=4),
}


def shipped() -> list[str]:
    """The models that data/models holds now."""
    return [name for name in RECIPES if (MODELS / name / "model.safetensors").exists()]


def new_model(recipe: Recipe) -> nn.Module:
    """The untrained model of a recipe."""
    import transformers

    torch.manual_seed(recipe.seed)
    common = dict(vocab_size=corpus.VOCABULARY, hidden_size=recipe.hidden, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
                  intermediate_size=recipe.ffn, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    if recipe.encoder:
        return transformers.BertForMaskedLM(transformers.BertConfig(**common, type_vocab_size=2))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=recipe.heads, attention_bias=True,
                                         mlp_bias=True, tie_word_embeddings=True, attn_implementation="eager"))  # fmt: skip


def loss_of(model: nn.Module, rows: Tensor, encoder: bool) -> Tensor:
    """Next-token loss, or masked-token loss (30 % of the tokens masked: 80 % by <mask>, 10 % random, 10 % kept)."""
    if not encoder:
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[
            :, :-1
        ]  # (rows, length − 1, hidden)
        return F.cross_entropy(
            F.linear(hidden, model.lm_head.weight).flatten(0, 1).float(), rows[:, 1:].flatten()
        )
    chosen = (torch.rand(rows.shape) < 0.3) & (rows > 5)
    how = torch.rand(rows.shape)
    other = torch.randint(6, corpus.VOCABULARY, rows.shape)
    seen = torch.where(chosen & (how < 0.8), 4, torch.where(chosen & (how > 0.9), other, rows))
    hidden = model.bert(input_ids=seen).last_hidden_state[chosen]  # (masked, hidden)
    return F.cross_entropy(model.cls(hidden).float(), rows[chosen])


class Rows:
    """Rows of `length` tokens cut from seeded shards, in a seeded order; `skip` resumes at a step."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe):
        self.tokenizer, self.recipe, self.shard_no, self.rows, self.at = (
            tokenizer,
            recipe,
            -1,
            np.zeros((0, recipe.length)),
            0,
        )

    def next(self) -> Tensor:
        n, length = self.recipe.rows, self.recipe.length
        if self.at + n > len(self.rows):
            self.shard_no, self.at = self.shard_no + 1, 0
            flat = corpus.shard(self.tokenizer, 1000 * self.recipe.seed + self.shard_no)
            self.rows = flat[: len(flat) // length * length].reshape(-1, length)
            np.random.default_rng(self.shard_no).shuffle(self.rows)
        self.at += n
        return torch.from_numpy(self.rows[self.at - n : self.at].astype(np.int64))


def rate(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate at a step."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return min(1.0, (step + 1) / 100, 0.05 + 0.95 * left)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layer" in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]  # fmt: skip


def held_out_loss(model: nn.Module, tokenizer: Tokenizer, recipe: Recipe, *, rows: int = 48) -> float:
    """Mean loss in nats per (predicted) token on a shard that is never trained on."""
    flat = corpus.shard(tokenizer, corpus.HELD_OUT_SEED, 1500)
    data = torch.from_numpy(flat[: rows * recipe.length].reshape(rows, -1).astype(np.int64))
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        loss = loss_of(model, data, recipe.encoder).item()
    model.train()
    return loss


def _save(folder: Path, model: nn.Module, opts: list[torch.optim.Optimizer], step: int) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": v.clone() for k, v in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "new.safetensors", metadata={"step": str(step)})
    os.replace(folder / "new.safetensors", folder / "checkpoint.safetensors")


def _resume(folder: Path, model: nn.Module, opts: list[torch.optim.Optimizer]) -> int:
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict({n: tensors[f"model.{n}"] for n, _ in model.named_parameters()}, strict=False)
    for i, opt in enumerate(opts):
        packed = opt.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, name = key.split(".", 3)
                packed["state"].setdefault(int(j), {})[name] = value
        opt.load_state_dict(packed)
    with safe_open(path, "pt") as f:
        return int(f.metadata()["step"])


def train(name: str, work: Path, *, compiled: bool = True, every: int = 100) -> None:
    """Train one model of RECIPES, checkpointing into `work`/name; at the end write it to data/models/name in float16."""
    import transformers

    recipe, folder = RECIPES[name], work / name
    tokenizer = Tokenizer.from_file(str(MODELS / "tokenizer.json"))
    model = new_model(recipe)
    if recipe.start:
        grow(
            transformers.AutoModelForCausalLM.from_pretrained(
                work / recipe.start / "model", dtype=torch.float32
            ),
            model,
            seed=recipe.seed,
        )
    model.train()
    opts = optimizers(model, recipe)
    first = _resume(folder, model, opts)
    layers = model.bert.encoder.layer if recipe.encoder else model.model.layers
    if compiled:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    source, start = Rows(tokenizer, recipe), time.time()
    for _ in range(first):
        source.next()
    losses: list[float] = []
    for step in range(first, recipe.steps):
        torch.manual_seed(1_000_003 * recipe.seed + step)  # masks and dropout: the same after a resumption
        for opt, peak in zip(opts, (recipe.muon_lr, recipe.adam_lr), strict=True):
            opt.param_groups[0]["lr"] = peak * rate(step, recipe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, source.next(), recipe.encoder)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
        if (step + 1) % every == 0:
            speed = (step + 1 - first) * recipe.rows * recipe.length / (time.time() - start)
            print(json.dumps({"step": step + 1, "loss": round(float(np.mean(losses[-every:])), 4), "tokens_per_s": round(speed),
                              "minutes": round((time.time() - start) / 60, 1)}), flush=True)  # fmt: skip
        if (step + 1) % (3 * every) == 0 or step + 1 == recipe.steps:
            _save(folder, model, opts, step + 1)
    for layer in layers:
        layer.__dict__.pop("forward", None)
    model.save_pretrained(folder / "model")
    print(json.dumps({"held_out_loss": held_out_loss(model, tokenizer, recipe)}), flush=True)
    if name != "campus-seed":
        export(name, model)


def export(name: str, model: nn.Module) -> None:
    """Write the model in float16 and the tokenizer to data/models/name."""
    corpus.save_tokenizer(Tokenizer.from_file(str(MODELS / "tokenizer.json")), MODELS / name)
    model.to(torch.float16).save_pretrained(MODELS / name)
