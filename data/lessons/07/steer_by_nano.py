"""Lesson 07: campus-small and campus-base steered by campus-nano, tuned and plain, on two tasks, over ten seeds.

    python data/lessons/07/steer_by_nano.py        goes on where it was stopped

A seed draws the training examples and their order, and campus-nano is tuned on them, every weight. It is scored alone,
and as the expert in s = s_M + α (s_M⁺ − s_M⁻) for M = small and base and each α. Each of these ways has a learning rate
of its own, which five other seeds choose by that way's mean score on the validation split: the expert that answers best
needn't steer best. An answer is right if each of its tokens has the largest logit behind the right ones before it, as
a greedy answer is; a line's end closes it, too. "Forgotten" is by how much the loss on unseen text of the world grows
over that of plain M, or of plain nano where it is alone.

Lesson 07 reads the table, steer_by_nano.jsonl, and those of tune_small.py and tune_base.py, which go the same way.
"""

import copy
from functools import cache

import torch
from torch.nn.functional import cross_entropy

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare

STEPS, BATCH = {"question": 20, "instruct": 30}, 16
CASES = [("question", 16), ("instruct", 128)]  # task, examples
RATES = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
LOOKED_AT = {"train": None, "validation": 100, "test": 300}  # examples of a task
WORLD = 40  # unseen texts
SEARCH_SEEDS = range(100, 105)
ABOVE = {"nano": ("small", "base"), "small": ("base",), "base": ()}  # what a pair of each size steers


@cache
def plain(size):
    """A pretrained model, and the tokenizer that all have."""
    return models.load(f"campus-{size}")


@cache
def examples(task, split):
    """Encoded examples of a task, or texts of the world."""
    rows = data.load(task)[split]
    first = WORLD if task == "world_text" else LOOKED_AT[split] or len(rows)
    return data.encode(rows.select(range(first)), plain("nano")[1], kind="generation")


@torch.no_grad()
def logits(model, task, split):
    """(tokens, vocabulary) behind which a label stands, the labels (tokens), and of which example each is."""
    found, order = (
        {},
        sorted(range(len(examples(task, split))), key=lambda i: len(examples(task, split)[i]["labels"])),
    )
    for start in range(0, len(order), 20):
        batch = data.collate([examples(task, split)[i] for i in order[start : start + 20]])
        labels = batch.pop("labels")
        said = model.eval()(**batch).logits
        for i, row, wanted in zip(order[start : start + 20], said, labels, strict=True):
            (places,) = (wanted[1:] >= 0).nonzero(as_tuple=True)
            found[i] = row[places].clone(), wanted[places + 1]
    rows = torch.cat([torch.full((len(found[i][1]),), i) for i in order])
    return *(torch.cat([found[i][part] for i in order]) for part in (0, 1)), rows


@cache
def said_before(size, task, split):
    """What `logits` says of a pretrained model."""
    return logits(plain(size)[0], task, split)


@cache
def closing():
    """For each token whether an answer of one line ends with it."""
    words = plain("nano")[1]
    ends = [i == words.eos_token_id or words.decode([i]).startswith("\n") for i in range(len(words))]
    return torch.tensor(ends), words.eos_token_id


def right(said, labels, rows):
    """The share of examples whose tokens all have the largest logit."""
    ends, end = closing()
    best = said.argmax(-1)
    good = (best == labels) | ((labels == end) & ends[best])
    wrong = torch.zeros(int(rows.max()) + 1).index_add_(0, rows, (~good).float())
    return float((wrong == 0).float().mean())


def measured(model, size, task, splits):
    """The scores of a tuned model alone, and of the larger ones that it steers, and what each has forgotten."""
    found = {}
    for split in splits:
        expert, labels, rows = logits(model, task, split)
        found[split] = right(expert, labels, rows)
        anti = said_before(size, task, split)[0]
        for large in ABOVE[size]:
            own = said_before(large, task, split)[0]
            found[f"{split}, plain {large}"] = right(own, labels, rows)
            for alpha in ALPHAS:
                found[f"{split}, {large} at {alpha}"] = right(own + alpha * (expert - anti), labels, rows)
    if "test" in splits:
        expert, labels, _ = logits(model, "world_text", "test")
        before = {name: said_before(name, "world_text", "test")[0] for name in (size, *ABOVE[size])}
        own = {name: float(cross_entropy(said, labels)) for name, said in before.items()}
        found["forgotten"] = float(cross_entropy(expert, labels)) - own[size]
        for large in ABOVE[size]:
            found[f"plain {size}'s loss over {large}'s"] = own[size] - own[large]
            for alpha in ALPHAS:
                steered = before[large] + alpha * (expert - before[size])
                found[f"forgotten, {large} at {alpha}"] = float(cross_entropy(steered, labels)) - own[large]
    return found


def tuned(size, task, n, lr, seed):
    """A model of this size after full fine-tuning on the n examples that a seed draws."""
    model, all_of_them = copy.deepcopy(plain(size)[0]).requires_grad_(True), examples(task, "train")
    order = torch.randperm(len(all_of_them), generator=torch.Generator().manual_seed(seed))
    drawn = [all_of_them[i] for i in order[:n].tolist()]
    pefttutor.fit(model, drawn, steps=STEPS[task], batch_size=BATCH, lr=lr, seed=seed)
    return model


@cache
def scored(size, task, n, lr, seed):
    """What `measured` says of it; of a seed of the search on the validation split alone."""
    splits = ("validation",) if seed in SEARCH_SEEDS else ("validation", "test")
    return measured(tuned(size, task, n, lr, seed), size, task, splits)


def ways(size):
    """A tuned model alone, and what it steers, by how much."""
    return ("alone", *(f"{large} at {alpha}" for large in ABOVE[size] for alpha in ALPHAS))


def row(size, task, n, way, lr, seed):
    """One way's scores, and on the test split those of its plain model, and what it has forgotten."""
    found = scored(size, task, n, lr, seed)
    if way == "alone":
        return {name: found[name] for name in ("validation", "test", "forgotten") if name in found}
    scores = {split: found[f"{split}, {way}"] for split in ("validation", "test") if split in found}
    if "test" not in scores:
        return scores
    plain_score = found[f"test, plain {way.split()[0]}"]
    return scores | {"plain": plain_score, "forgotten": found[f"forgotten, {way}"]}


def train(task, n, way, lr, seed):
    """A tuned campus-nano's scores, or those of a larger model that it steers."""
    return row("nano", task, n, way, lr, seed)


def table(script, size, window, seeds, search_seeds, run):
    """Train the table of one size; the largest steers nothing, so its cases are the tasks."""
    several = [(*case, way) for case in CASES for way in ways(size)]
    compare(
        script,
        run,
        dict.fromkeys(several if ABOVE[size] else CASES, window),
        columns=("task", "n", "way") if ABOVE[size] else ("task", "n"),
        rates=RATES,
        seeds=seeds,
        search_seeds=search_seeds,
        model=f"campus-{size}",
        tasks=[*(task for task, _ in CASES), "world_text"],
        steps=STEPS,
        batch_size=BATCH,
        alphas=ALPHAS,
        looked_at=LOOKED_AT | {"world_text": WORLD},
    )


if __name__ == "__main__":
    table(__file__, "nano", (3e-4, 3e-3), range(10), SEARCH_SEEDS, train)
