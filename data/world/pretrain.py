"""Pretraining of the embedded models on the world's text, on a CPU, resumable.

Hidden matrices are trained by Muon (Jordan et al. 2024; `torch.optim.Muon`), everything else by AdamW. The learning rate warms up,
stays, and falls over the last part. Weights and optimizer are float32; multiplications bfloat16 where the processor is faster at it.
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
    inferable: float = 1.0  # weight of a token that can be inferred from its context (see rules.MARK)
    drills: float = 0.0  # share of documents that are drills (see rules.drill)
    seed: int = 1
    generator: str = "14fb006"  # the commit whose world/ wrote the text it read, or the first kept after it


_SHAPES = {
    "nano": dict(hidden=128, layers=4, heads=4, ffn=352, muon_lr=0.02, adam_lr=3e-3),
    "small": dict(hidden=256, layers=6, heads=8, ffn=704, muon_lr=0.015, adam_lr=2e-3),
    "base": dict(hidden=384, layers=8, heads=12, ffn=896, muon_lr=0.01, adam_lr=1.5e-3),
}
_EARLY = dict(generator="942069d")
_LATER = dict(
    rows=8, length=512, decay=0.5, inferable=6.0
)  # long rows: a block of examples fits, every position is trained
RECIPES = {
    # Stages, not shipped. The first three read the world before it had ledgers and the later kinds of few-shot blocks.
    "campus-seed": Recipe(**_SHAPES["nano"], **_EARLY, steps=1000, decay=0.01),
    "campus-nano-1": Recipe(**_SHAPES["nano"], **_EARLY, steps=700, start="campus-seed", seed=5),
    "campus-small-1": Recipe(**_SHAPES["small"], **_EARLY, steps=900, start="campus-seed", seed=2),
    "campus-base-1": Recipe(**_SHAPES["base"], **_LATER, steps=560, start="campus-small", seed=13),
    # The models of data/models: each goes on from its stage. Base alone is drilled in learning from its context.
    "campus-nano": Recipe(**_SHAPES["nano"], **_LATER, steps=1400, start="campus-nano-1", seed=15),
    "campus-small": Recipe(**_SHAPES["small"], **_LATER, steps=1250, start="campus-small-1", seed=12),
    "campus-base": Recipe(**_SHAPES["base"], **_LATER | dict(inferable=12.0), drills=0.65, steps=1400, start="campus-base-1",
                          seed=17, generator="172fbaa"),
    # Not shipped: the smallest model with base's last stage, to tell what size does from what the drills do.
    "campus-nano-drilled": Recipe(**_SHAPES["nano"], **_LATER | dict(inferable=12.0), drills=0.65, steps=600, start="campus-nano",
                                  seed=19, generator="172fbaa"),
    "campus-encoder": Recipe(256, 4, 8, 704, steps=640, start="campus-small-1", encoder=True, rows=32, length=128,
                             muon_lr=0.015, adam_lr=2e-3, seed=4),
}  # fmt: skip
SHIPPED = ("campus-nano", "campus-small", "campus-base", "campus-encoder")


def shipped() -> list[str]:
    """The models that data/models holds now."""
    return [name for name in SHIPPED if (MODELS / name / "model.safetensors").exists()]


def new_model(recipe: Recipe) -> nn.Module:
    """The untrained model of a recipe."""
    import transformers

    torch.manual_seed(recipe.seed)
    common = dict(vocab_size=corpus.VOCABULARY, hidden_size=recipe.hidden, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
                  intermediate_size=recipe.ffn, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    if recipe.encoder:
        return transformers.BertForMaskedLM(
            transformers.BertConfig(
                **common, type_vocab_size=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
        )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=recipe.heads, attention_bias=True,
                                         mlp_bias=True, tie_word_embeddings=True, attn_implementation="sdpa"))  # fmt: skip


def waves(length: int, width: int) -> Tensor:
    """Sine and cosine of each position at falling frequencies (Vaswani et al. 2017): a neighbour is a rotation away."""
    angles = torch.arange(length)[:, None] / 10_000 ** (
        torch.arange(0, width, 2) / width
    )  # (length, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def loss_of(model: nn.Module, rows: Tensor, encoder: bool, weights: Tensor | None = None) -> Tensor:
    """Next-token loss, weighed by token; or masked-token loss (20 % masked: 80 % by <mask>, 10 % random, 10 % kept)."""
    if not encoder:
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[
            :, :-1
        ]  # (rows, length − 1, hidden)
        losses = F.cross_entropy(
            F.linear(hidden, model.lm_head.weight).flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        )
        if weights is None:
            return losses.mean()
        weights = weights[:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()
    chosen = (torch.rand(rows.shape) < 0.2) & (rows > 5)
    how = torch.rand(rows.shape)
    other = torch.randint(6, corpus.VOCABULARY, rows.shape)
    seen = torch.where(chosen & (how < 0.8), 4, torch.where(chosen & (how > 0.9), other, rows))
    hidden = model.bert(input_ids=seen).last_hidden_state[chosen]  # (masked, hidden)
    return F.cross_entropy(model.cls(hidden).float(), rows[chosen])


class Rows:
    """Rows of `length` tokens and their weights, cut from seeded shards, in a seeded order; calling `next` again and again resumes."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe):
        self.tokenizer, self.recipe, self.shard_no, self.at = tokenizer, recipe, -1, 0
        self.rows = self.weights = np.zeros((0, recipe.length))

    def next(self) -> tuple[Tensor, Tensor]:
        n, length = self.recipe.rows, self.recipe.length
        if self.at + n > len(self.rows):
            self.shard_no, self.at = self.shard_no + 1, 0
            flat, told = corpus.shard(
                self.tokenizer,
                1000 * self.recipe.seed + self.shard_no,
                plain=self.recipe.encoder,
                drills=self.recipe.drills,
            )
            order = np.random.default_rng(self.shard_no).permutation(len(flat) // length)
            self.rows, self.weights = (
                a[: len(flat) // length * length].reshape(-1, length)[order] for a in (flat, told)
            )
        self.at += n
        chosen = slice(self.at - n, self.at)
        weights = 1.0 + (self.recipe.inferable - 1.0) * torch.from_numpy(self.weights[chosen]).float()
        return torch.from_numpy(self.rows[chosen].astype(np.int64)), weights


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
    flat, _ = corpus.shard(tokenizer, corpus.HELD_OUT_SEED, 1500, plain=recipe.encoder)
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


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32: tried, because with AVX-512 either was seen, by a factor of two."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(1024, 512, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            a @ a[:512].t()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def train(name: str, work: Path, *, compiled: bool = True, every: int = 100) -> None:
    """Train one model of RECIPES, checkpointing into `work`/name; at the end write it to data/models/name in float16."""
    import transformers

    bfloat16 = fast_bfloat16()

    recipe, folder = RECIPES[name], work / name
    tokenizer = Tokenizer.from_file(str(MODELS / "tokenizer.json"))
    model = new_model(recipe)
    if recipe.start:
        begun = transformers.AutoModelForCausalLM.from_pretrained(
            work / recipe.start / "model", dtype=torch.float32
        )
        if recipe.encoder:  # of a causal model, an encoder can use what the words mean, not how they are read
            words = begun.get_input_embeddings().weight.data
            model.get_input_embeddings().weight.data.copy_(words)
            positions = model.bert.embeddings.position_embeddings.weight.data
            positions.copy_(
                words.std() * 2**0.5 * waves(*positions.shape)
            )  # as large as the words, or nobody looks at them
        else:
            same = begun.config.hidden_size == recipe.hidden
            grow(begun, model, noise=0.0 if same else 0.02, seed=recipe.seed)
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
        rows, weights = source.next()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = loss_of(model, rows, recipe.encoder, weights)
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
    if name in SHIPPED:
        export(name, model)


def export(name: str, model: nn.Module) -> None:
    """Write the model in float16 and the tokenizer to data/models/name."""
    corpus.save_tokenizer(Tokenizer.from_file(str(MODELS / "tokenizer.json")), MODELS / name)
    model.to(torch.float16).save_pretrained(MODELS / name)
