"""Pretraining of the embedded models on the world's text, on a GPU or a CPU, resumable.

All causal sizes read the same two mixtures, one after the other, from their own random weights. Beside their size they differ in their
learning rates, and in how much they read where the clock ends a run.
Hidden matrices are trained by Muon, everything else by AdamW. The learning rate warms up, stays, and falls over the last part.
Weights and optimizer are float32; multiplications bfloat16 where the machine is faster at it.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from . import corpus
from .muon import Muon
from .rows import KINDS, TOKENIZER, Rows, draw

MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Recipe:
    """How one model is made: its shape, and how long it trains. `rows` × `length` tokens a step."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    muon_lr: float
    adam_lr: float
    steps: int
    encoder: bool = False
    rows: int = 128
    length: int = 512
    late: float = 0.5  # share of the run in the late mixture (see rows.KINDS) of causal models
    decay: float = 0.45  # share of the run over which the learning rate falls
    warmup: int = 200
    inferable: tuple[float, float] = (4.0, 8.0)  # weight of a token that can be inferred, by mixture
    seed: int = 31


# At most so many steps: what one H100 was seen to do in 165 s (the first, the second and the encoder side by side) and in 375 s
# (base). The shipped ones had 150 and 320 s of an H200: the clock ended all but small.
RECIPES = {
    "campus-nano": Recipe(128, 4, 4, 352, 0.03, 4e-3, steps=5000),
    "campus-small": Recipe(256, 6, 8, 704, 0.02, 3e-3, steps=2500),
    "campus-base": Recipe(384, 8, 12, 896, 0.02, 2e-3, steps=9900),
    "campus-encoder": Recipe(256, 4, 8, 704, 0.02, 3e-3, steps=4600, encoder=True, rows=512, length=128),
}


def shipped() -> list[str]:
    """The models that data/models holds now."""
    return [name for name in RECIPES if (MODELS / name / "model.safetensors").exists()]


def waves(length: int, width: int) -> Tensor:
    """Sine and cosine of each position at falling frequencies (Vaswani et al. 2017): a neighbour is a rotation away."""
    angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def new_model(recipe: Recipe) -> nn.Module:
    """The untrained model of a recipe."""
    import transformers

    torch.manual_seed(recipe.seed)
    common = dict(vocab_size=corpus.VOCABULARY, hidden_size=recipe.hidden, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
                  intermediate_size=recipe.ffn, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    if not recipe.encoder:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=recipe.heads, attention_bias=True,
                                             mlp_bias=True, tie_word_embeddings=True, attn_implementation="sdpa"))  # fmt: skip
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            **common, type_vocab_size=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )
    words, positions = model.get_input_embeddings().weight, model.bert.embeddings.position_embeddings.weight
    # as large as the words, or nobody looks at them
    positions.data.copy_(words.std() * 2**0.5 * waves(*positions.shape))
    return model


def _weighed(hidden: Tensor, words: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(hidden, words).float(), target, reduction="none")
    return (losses * weights).sum() / weights.sum()


def loss_of(
    model: nn.Module, rows: Tensor, encoder: bool, weights: Tensor | None = None, weighed=_weighed
) -> Tensor:
    """Next-token loss, weighed by token; or masked-token loss (20 % masked: 80 % by <mask>, 10 % random, 10 % kept)."""
    if not encoder:
        weights = torch.ones_like(rows, dtype=torch.float32) if weights is None else weights
        hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1]
        return weighed(
            hidden.flatten(0, 1), model.lm_head.weight, rows[:, 1:].flatten(), weights[:, 1:].flatten()
        )
    # the same number of positions in every row: those with the highest draw, special tokens never
    draw = torch.rand(rows.shape, device=rows.device).masked_fill(rows <= 5, -1.0)
    chosen = draw.topk(round(0.2 * rows.shape[1]), dim=1).indices
    target = rows.gather(1, chosen)
    how = torch.rand(target.shape, device=rows.device)
    other = torch.randint(6, corpus.VOCABULARY, target.shape, device=rows.device)
    seen = torch.where(how < 0.8, 4, torch.where(how > 0.9, other, target))
    hidden = model.bert(input_ids=rows.scatter(1, chosen, seen)).last_hidden_state
    hidden = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)
    return F.cross_entropy(model.cls(hidden).float(), target.flatten())


def rate(step: int, done: float, recipe: Recipe) -> float:
    """Share of the peak learning rate at a step, when `done` (a share) of the run has passed."""
    return min(1.0, (step + 1) / recipe.warmup, 0.02 + 0.98 * (1 - done) / recipe.decay)


def held_out_loss(model: nn.Module, tokenizer: Tokenizer, recipe: Recipe, *, tokens: int = 24_576) -> float:
    """Mean loss in nats per (predicted) token on a shard that is never trained on."""
    flat, _ = corpus.shard(tokenizer, corpus.HELD_OUT_SEED, 1500, plain=recipe.encoder)
    tokens = min(tokens, len(flat)) // recipe.length * recipe.length
    data = torch.from_numpy(flat[:tokens].reshape(-1, recipe.length).astype(np.int64))
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return loss_of(model, data, recipe.encoder).item()


@cache
def text_sha256(documents: int = 200) -> str:
    """Fingerprint of the text: a sample of each mixture, as tokens."""
    tokenizer, found = Tokenizer.from_file(str(TOKENIZER)), hashlib.sha256()
    for kind in KINDS:
        for array in draw(tokenizer, kind, 0, documents):
            found.update(array.tobytes())
    return found.hexdigest()


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


class Run:
    """One pretraining on its way: model, optimizers, text, and how far it is."""

    def __init__(self, name: str, folder: Path, device: str, shards: Path | None):
        self.recipe, self.folder, self.device = RECIPES[name], folder, device
        self.model = new_model(self.recipe).to(device).train()
        matrices = [p for n, p in self.model.named_parameters() if p.dim() == 2 and "layer" in n]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, lr=self.recipe.adam_lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True)  # fmt: skip
        tokenizer = Tokenizer.from_file(str(TOKENIZER))
        kinds = ("plain",) if self.recipe.encoder else ("main", "late")
        self.text = {
            k: Rows(tokenizer, k, self.recipe.rows, self.recipe.length, folder=shards, device=device)
            for k in kinds
        }
        self.step, self.seconds, self.weighed = 0, 0.0, _weighed
        self.resume()

    def one(self, done: float, bfloat16: bool) -> Tensor:
        """One step of training, when `done` (a share) of the run has passed; returns the loss."""
        recipe, kinds = self.recipe, list(self.text)
        torch.manual_seed(1_000_003 * recipe.seed + self.step)  # masks: the same after a resumption
        no = len(kinds) - 1 if done > 1 - recipe.late else 0
        rows, told = self.text[kinds[no]].next()
        weights = 1.0 + (recipe.inferable[no] - 1.0) * told.float()
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=bfloat16):
            loss = loss_of(self.model, rows, recipe.encoder, weights, self.weighed)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = rate(self.step, done, recipe)
        self.muon.step(recipe.muon_lr * share)
        self.adam.param_groups[0]["lr"] = recipe.adam_lr * share
        self.adam.step()
        self.model.zero_grad()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write everything that `resume` needs, whole or not at all."""
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= {f"muon.{i}": buffer for i, buffer in enumerate(self.muon.buffers)}
        for j, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{j}.{k}": v.clone() for k, v in state.items()}
        taken = {kind: rows.taken for kind, rows in self.text.items()}
        about = json.dumps(
            {"step": self.step, "seconds": self.seconds, "taken": taken, "made_of": self.made_of()}
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.folder / "new.safetensors", metadata={"run": about})
        os.replace(self.folder / "new.safetensors", self.folder / "checkpoint.safetensors")

    def resume(self) -> None:
        """Go on where the last `save` was, if there is one."""
        from safetensors import safe_open

        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        tensors = load_file(path, device=self.device)
        with safe_open(path, "pt") as f:
            about = json.loads(f.metadata().get("run", "{}"))
        if about.get("made_of") != self.made_of():
            raise ValueError(
                f"{path} was made by another recipe or from another text ({about.get('made_of', 'unknown')}); expected "
                f"{self.made_of()}. Remove it, or name another folder with --work."
            )
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(tensors[f"model.{n}"])
        self.muon.buffers = [tensors[f"muon.{i}"] for i in range(len(self.muon.buffers))]
        packed = self.adam.state_dict()
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, j, name = key.split(".", 2)
                packed["state"].setdefault(int(j), {})[name] = value
        self.adam.load_state_dict(packed)
        self.step, self.seconds = about["step"], about["seconds"]
        for kind, taken in about["taken"].items():
            self.text[kind].skip(taken)

    def made_of(self) -> dict[str, object]:
        """What a checkpoint must share with a run that goes on from it, as a file gives it back."""
        return json.loads(json.dumps(asdict(self.recipe) | {"text_sha256": text_sha256()}))

    def facts(self, budget: float | None = None) -> dict[str, object]:
        """What the card of the model says of this run; `budget`: the seconds that it was given."""
        import transformers

        device = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        tokens = self.step * self.recipe.rows * self.recipe.length
        return {"steps": self.step, "tokens": tokens, "seconds": round(self.seconds), "budget": budget, "device": device,
                "shards": {kind: rows.shard_no + 1 for kind, rows in self.text.items()}, "text_sha256": text_sha256(), "recipe": asdict(self.recipe),
                "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip


def train(
    name: str, work: Path, *, device: str = "cpu", seconds: float | None = None, shards: Path | None = None,
    models: Path = MODELS, compiled: bool = True, every: int = 100, save_every: float = 60.0,
) -> None:  # fmt: skip
    """Train one model of RECIPES, checkpointing into `work`/name every `save_every` seconds; then write it to `models`/name.

    seconds: at most so long; the schedule then follows the clock, so that the learning rate has fallen when the time is over.
    shards: a folder that `rows.write_ahead` fills meanwhile. every: steps between two lines on the screen.
    """
    begun, saved = time.monotonic(), time.monotonic()
    bfloat16 = device == "cuda" or fast_bfloat16()
    run = Run(name, work / name, device, shards)
    before, losses = run.seconds, []
    layers = run.model.bert.encoder.layer if run.recipe.encoder else run.model.model.layers
    if compiled:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        run.weighed = torch.compile(_weighed, dynamic=False)
    while (done := max(run.step / run.recipe.steps, run.seconds / (seconds or float("inf")))) < 1:
        losses.append(run.one(done, bfloat16))
        run.seconds = before + time.monotonic() - begun
        if run.step % every == 0:
            loss, losses = torch.stack(losses).mean().item(), []
            print(json.dumps({"model": name, "step": run.step, "loss": round(loss, 4), "s": round(run.seconds)}), flush=True)  # fmt: skip
        if time.monotonic() - saved > save_every:
            run.save()
            saved = time.monotonic()
    run.save()
    for layer in layers:
        layer.__dict__.pop("forward", None)
    facts = run.facts(seconds)
    print(json.dumps({"model": name, **facts}), flush=True)
    export(run, facts, models / name)


def export(run: Run, facts: dict[str, object], folder: Path) -> None:
    """Write the model in float16, its tokenizer and what its card says."""
    corpus.save_tokenizer(Tokenizer.from_file(str(TOKENIZER)), folder)
    run.model.to("cpu", torch.float16).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
