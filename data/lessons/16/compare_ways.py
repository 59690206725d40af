"""Lesson 16: an unseen task from sixteen examples, by the ten plug-ins of train_plugins.py and by simpler ways.

    python data/lessons/16/compare_ways.py        goes on where it was stopped

A task is asked in words, and the answer is the label whose first token has the largest logit behind the prompt. A seed
draws sixteen training examples; their loss is the mean of -log softmax over the labels' logits. All that searches or
trains reads the sixteen forty times. The score is that on the first 200 test rows.

    zero-shot       campus-nano as it is                in context, 4       four of the sixteen stand before the prompt
    mean            every plug-in, weight 1/10          in context, 16      all of them
    best single     the plug-in with the least loss     factors, deltas     LoRAHub's two sums; 40 tries of NGOpt
    dealt anew      the weights of "deltas", given to other plug-ins by lot
    scrambled       "deltas" of plug-ins whose numbers are reordered within each tensor
    concatenated    the two plug-ins with the least loss, side by side, two scalars for each matrix, trained
    fine-tuned      a new LoRA, trained

Only the last two have a learning rate: five other seeds choose it on 100 validation rows. "forgotten" is by how much
the loss on 20 unseen texts of the world grows.

Lesson 16 reads the table, compare_ways.jsonl.
"""

import copy
import hashlib
import runpy
import warnings
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare
from pefttutor.parts.searching import search

warnings.filterwarnings("ignore", category=UserWarning, message="COBYLA")
PLUGINS = runpy.run_path(str(Path(__file__).with_name("train_plugins.py")))
MODEL, UPSTREAM, FOLDER = PLUGINS["MODEL"], PLUGINS["UPSTREAM"], PLUGINS["FOLDER"]
SCALING = PLUGINS["LORA"]["lora_alpha"] / PLUGINS["LORA"]["r"]
TASKS, N, TRIES, BOUND, L1 = ("verdicts",), 16, 40, 1.5, 0.05
TEST, VALIDATION, WORLD, SEARCH = 200, 100, 20, range(100, 105)
WAYS = dict.fromkeys(
    ("zero-shot", "in context, 4", "in context, 16", "mean", "best single", "factors", "deltas")
)
WAYS |= dict.fromkeys(("dealt anew", "scrambled")) | {
    "concatenated": (2e-2, 1e-1),
    "fine-tuned": (2e-3, 1e-2),
}


@cache
def start():
    """campus-nano and its tokenizer."""
    return models.load(MODEL)


@cache
def rows(task, split, first=None):
    """The rows of a task, or the first of them."""
    found = data.load(task)[split]
    return found.select(range(first or len(found))).to_list()


def drawn(task, seed):
    """The sixteen rows that a seed draws."""
    order = torch.randperm(len(rows(task, "train")), generator=torch.Generator().manual_seed(seed))
    return [rows(task, "train")[i] for i in order[:N].tolist()]


@cache
def firsts(task):
    """The first token of each label behind a prompt."""
    tokens = [start()[1](f"Answer: {label}")["input_ids"] for label in data.info(task).labels]
    lead = len(start()[1]("Answer:")["input_ids"])
    found = [ids[lead] for ids in tokens]
    assert len(set(found)) == len(found), "two labels begin alike"
    return torch.tensor(found)


def batch_of(some):
    """The prompts, padded on the left, and the numbers of their labels."""
    ids = [torch.tensor(start()[1](row["prompt"].rstrip())["input_ids"]) for row in some]
    batch = data.collate([{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids], 0, "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch, torch.tensor([row["label"] for row in some])


def loss_of(model, task, batch, labels, weights=None):
    """The mean of -log softmax over the labels' logits, with these weights in place of the model's."""
    given = batch | {"logits_to_keep": 1}
    said = functional_call(model, weights, kwargs=given) if weights else model(**given)
    return cross_entropy(said.logits[:, -1, firsts(task)], labels)


@torch.no_grad()
def score(model, task, split, first, before=""):
    """The share of right answers; every prompt stands behind the text `before`, which is read once."""
    tokenizer, right, some = start()[1], 0, rows(task, split, first)
    some = sorted(some, key=lambda row: len(row["prompt"]))
    prefix = torch.tensor([tokenizer(before)["input_ids"]])
    out = model(prefix, use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"  # transformers renamed it in 5.24
    for i in range(0, len(some), 50):
        batch, labels = batch_of(some[i : i + 50])
        if before:
            ids = [
                torch.tensor(tokenizer(row["prompt"].rstrip())["input_ids"][1:]) for row in some[i : i + 50]
            ]
            examples = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
            batch = data.collate(examples, 0, "left")
            seen = torch.ones(len(ids), prefix.shape[1], dtype=torch.long)
            batch["attention_mask"] = torch.cat([seen, batch["attention_mask"]], 1)
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1)[:, prefix.shape[1] :]
            batch[name] = copy.deepcopy(out[name])
            batch[name].batch_repeat_interleave(len(ids))
        said = model(**batch, logits_to_keep=1).logits[:, -1, firsts(task)]
        right += int((said.argmax(-1) == labels).sum())
    return right / len(some)


@cache
def stored(scrambled=False):
    """A (plug-ins, r, in) and B (plug-ins, out, r) by the matrix's name."""
    files, generator = [load_file(FOLDER / t / "adapter.safetensors") for t in UPSTREAM], torch.Generator()
    if scrambled:
        generator.manual_seed(0)
        files = [
            {
                n: t.flatten()[torch.randperm(t.numel(), generator=generator)].view_as(t)
                for n, t in sorted(f.items())
            }
            for f in files
        ]
    paths = [name.removesuffix(".lora_A") for name in files[0] if name.endswith(".lora_A")]
    return {
        f"{p}.weight": tuple(torch.stack([f[f"{p}.lora_{x}"] for f in files]) for x in "AB") for p in paths
    }


def summed(combine, w, scrambled=False):
    """The weights of the matrices with the plug-ins' weighted sum."""
    found, base = {}, start()[0]
    for name, (A, B) in stored(scrambled).items():
        if combine == "factors":
            delta = torch.einsum("n,nor->or", w, B) @ torch.einsum("n,nri->ri", w, A)
        else:
            delta = (w[:, None, None] * B).transpose(0, 1).flatten(1) @ A.flatten(0, 1)
        found[name] = base.get_parameter(name).detach() + SCALING * delta
    return found


@cache
def searched(task, seed, combine, scrambled):
    """The weights that forty tries find for the sixteen, as pefttutor.LoRAHub searches them."""
    w, few = torch.zeros(len(UPSTREAM)), batch_of(drawn(task, seed))

    def cost():
        return float(loss_of(start()[0], task, *few, summed(combine, w, scrambled))) + L1 * float(
            w.abs().mean()
        )

    search(w, cost, steps=TRIES, optimizer="NGOpt", bound=BOUND, seed=seed)
    return w


@cache
@torch.no_grad()
def singles(task, seed):
    """The loss of each plug-in alone on the sixteen."""
    few = batch_of(drawn(task, seed))
    each = torch.eye(len(UPSTREAM))
    return torch.stack([loss_of(start()[0], task, *few, summed("deltas", w)) for w in each])


def concatenated(task, lr, seed):
    """The matrices with the two nearest plug-ins beside each other, behind two trained scalars each."""
    base, near, few = start()[0], singles(task, seed).argsort()[:2], batch_of(drawn(task, seed))
    deltas = {name: SCALING * B[near] @ A[near] for name, (A, B) in stored().items()}
    scalars = torch.full((len(deltas), 2), 0.5, requires_grad=True)
    optimizer = torch.optim.AdamW([scalars], lr=lr, weight_decay=0)

    def weights():
        pairs = zip(scalars, deltas.items(), strict=True)
        return {n: base.get_parameter(n).detach() + torch.einsum("n,nij->ij", c, d) for c, (n, d) in pairs}

    for _ in range(TRIES):
        (scalars.grad,) = torch.autograd.grad(loss_of(base, task, *few, weights()), [scalars])
        optimizer.step()
    return {name: weight.detach() for name, weight in weights().items()}


def tuned(task, lr, seed):
    """The base with a new LoRA that the sixteen trained."""
    model, few = copy.deepcopy(start()[0]), batch_of(drawn(task, seed))
    pefttutor.LoRA(**PLUGINS["LORA"], init_seed=seed).attach(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)
    for _ in range(TRIES):
        optimizer.zero_grad()
        loss_of(model, task, *few).backward()
        optimizer.step()
    return model.eval()


def changed(task, way, lr, seed):
    """The matrices as a way makes them."""
    n = len(UPSTREAM)
    if way == "concatenated":
        return concatenated(task, lr, seed)
    if way == "mean":
        return summed("deltas", torch.full((n,), 1 / n))
    if way == "best single":
        return summed("deltas", torch.eye(n)[singles(task, seed).argmin()])
    if way == "dealt anew":
        lot = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return summed("deltas", searched(task, seed, "deltas", False)[lot])
    combine, scrambled = ("factors" if way == "factors" else "deltas"), way == "scrambled"
    return summed(combine, searched(task, seed, combine, scrambled), scrambled)


def adapted(task, way, lr, seed):
    """The model that a way makes of the sixteen."""
    if way == "fine-tuned":
        return tuned(task, lr, seed)
    model = copy.deepcopy(start()[0])
    for name, weight in changed(task, way, lr, seed).items():
        model.get_parameter(name).data.copy_(weight)
    return model


@cache
def world():
    """Texts of the world that no model has read."""
    return data.encode(rows("world_text", "test", WORLD), start()[1], kind="generation")


@cache
def plain():
    """The loss on them of campus-nano as it is."""
    return pefttutor.evaluate(start()[0], world())["loss"]


@cache
def zero_shot(task):
    """What no example changes."""
    return score(start()[0], task, "test", TEST)


def in_context(task, seed, count):
    """The score behind so many of the sixteen, and how many tokens they take."""
    before = "".join(f"{row['prompt']}{row['answer']}\n\n" for row in drawn(task, seed)[:count])
    tokens = len(start()[1](before)["input_ids"]) - len(start()[1]("")["input_ids"])
    return {"test": score(start()[0], task, "test", TEST, before), "tokens": tokens, "forgotten": 0.0}


def train(task, way, lr, seed):
    """The score of one way, and what goes with it: what it forgot, its loss on the sixteen, its weights, tokens."""
    if way == "zero-shot":
        return {"test": zero_shot(task), "forgotten": 0.0}
    if way.startswith("in context"):
        return in_context(task, seed, int(way.split()[-1]))
    model = adapted(task, way, lr, seed)
    if seed in SEARCH:
        return {"validation": score(model, task, "validation", VALIDATION)}
    with torch.no_grad():
        found = {"loss": float(loss_of(model, task, *batch_of(drawn(task, seed))))}
    found["forgotten"] = pefttutor.evaluate(model, world())["loss"] - plain()
    if way == "best single":
        found["which"] = int(singles(task, seed).argmin())
    if way in ("factors", "deltas", "scrambled"):
        weights = searched(task, seed, "factors" if way == "factors" else "deltas", way == "scrambled")
        found |= dict(zip(UPSTREAM, weights.tolist(), strict=True))
    return {"test": score(model, task, "test", TEST)} | found


def digest():
    """The sha256 of every plug-in's file."""
    files = {task: FOLDER / task / "adapter.safetensors" for task in UPSTREAM}
    return {task: hashlib.sha256(file.read_bytes()).hexdigest() for task, file in files.items()}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(task, way): window for task in TASKS for way, window in WAYS.items()},
        columns=("task", "way"),
        rates=[5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[*TASKS, *UPSTREAM, "world_text"],
        examples=N,
        tries=TRIES,
        looked_at={"test": TEST, "validation": VALIDATION, "world_text": WORLD},
        adapters_sha256=digest(),
    )
