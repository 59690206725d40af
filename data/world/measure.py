"""What the embedded models can do before and after adaptation: the table in data/README.md.

For each task: chance, zero-shot and four-shot in context (every model), a linear probe and full fine-tuning (one model),
over three seeds. Every number is stored in measurements.json with its seed, so that a stopped run goes on where it was.
"""

import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from statistics import mean

from torch import nn

import pefttutor as pt
from pefttutor import data, models

from . import tasks
from .pretrain import RECIPES, held_out_loss, shipped

HERE = Path(__file__).parents[1]
STORE = HERE / "measurements.json"
CAUSAL = ("campus-nano", "campus-small", "campus-base")
TUNED, SEEDS = "campus-nano", (0, 1, 2)
TIMED = (
    "campus-small",
    "sentiment",
)  # the claim that a larger model, too, is fine-tuned in less than a minute
LIMIT = 200  # test examples for the in-context rows; the tuned rows use the whole test split
BUDGET = dict(examples=1000, epochs=2, batch_size=16)
# slower to learn
EPOCHS = {"entailment": 8, "paraphrase": 24, "question": 4, "instruct": 5, "register": 10, "sorting": 8, "bank_sql": 4, "memory": 60,
          "clinic": 4}  # fmt: skip
PROBE_LR, FULL_LR = 5e-3, 1e-3
# Where adapting inside can show what it is good for: examples of each task at which the gap is measured.
GAPS = {"velan_topic": 256, "verdicts": 256, "guests": 256, "better": 256, "animals": 256, "topic": 64}
GAP_MODELS, GAP_STEPS, GAP_RATES, SEARCH_SEED = ("campus-nano",), 375, (3e-4, 1e-3, 3e-3, 1e-2), 100


def _task(name: str) -> tasks.Task:
    return next(t for t in tasks.ALL if t.name == name)


def chance(task: tasks.Task) -> float:
    """The best score without looking at the input: the most frequent class, tag or answer of the training split."""
    splits = data.load(task.name)
    if task.kind == "tagging":
        tags = [t for row in splits["test"]["tags"] for t in row]
        return Counter(tags).most_common(1)[0][1] / len(tags)
    key = "label" if task.kind == "classification" else "answer"
    best = Counter(splits["train"][key]).most_common(1)[0][0]
    return mean(value == best for value in splits["test"][key])


def in_context(model_name: str, task: tasks.Task, shots: int, seed: int) -> float | None:
    """Score with `shots` examples of the training split in front of each prompt; nothing is trained."""
    if task.kind == "tagging" or task.metric == "perplexity":
        return None
    model, tokenizer = models.load(model_name)
    splits, rng = data.load(task.name), random.Random(seed)
    rows = splits["test"].select(range(min(LIMIT, len(splits["test"])))).to_list()
    train = splits["train"].to_list()
    for row in rows:
        shown = rng.sample(train, shots)
        row["prompt"] = "".join(f"{r['prompt']}{r['answer']}\n\n" for r in shown) + row["prompt"]
    return data.score(model, tokenizer, rows, data.info(task.name))


def _head_only(model: nn.Module) -> None:
    """Freeze all but the head; a language model's head is first untied from its embeddings."""
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else model.score
    if hasattr(model, "lm_head"):
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.requires_grad_(False)
    head.requires_grad_(True)


def tuned(task: tasks.Task, seed: int, name: str = TUNED, *, probe: bool = False) -> dict[str, float]:
    """Train the head alone (`probe`) or everything; returns the test score and the seconds of training."""
    head = {"classification": "classification", "tagging": "tagging"}.get(task.kind, "lm")
    labels = {} if head == "lm" else {"labels": list(task.labels or ())}
    model, tokenizer = models.load(name, head=head, **labels)
    splits = data.load(task.name)
    n = min(BUDGET["examples"], len(splits["train"]))
    train = data.encode(splits["train"].select(range(n)), tokenizer, kind=task.kind)
    if probe:
        _head_only(model)
    start = time.perf_counter()
    pt.fit(
        model,
        train,
        epochs=EPOCHS.get(task.name, BUDGET["epochs"]),
        batch_size=BUDGET["batch_size"],
        lr=PROBE_LR if probe else FULL_LR,
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - start
    return {
        "score": data.score(model, tokenizer, splits["test"], data.info(task.name)),
        "train_s": round(seconds, 1),
    }


def _few(name: str, task: tasks.Task, seed: int) -> tuple[nn.Module, object, dict[str, list]]:
    """A classifier, its tokenizer, and the encoded splits with GAPS' number of training examples, drawn by the seed."""
    model, tokenizer = models.load(name, head="classification", labels=list(task.labels or ()))
    splits = data.load(task.name)
    chosen = random.Random(seed).sample(range(len(splits["train"])), GAPS[task.name])
    rows = splits["train"].select(chosen), splits["validation"], splits["test"]
    names = ("train", "validation", "test")
    return model, tokenizer, {k: data.encode(r, tokenizer) for k, r in zip(names, rows, strict=True)}


def converged(name: str, task: tasks.Task, seed: int) -> float:
    """Accuracy of the frozen model with a head that is trained to the end."""
    model, _, few = _few(name, task, seed)
    pt.fit_head(model, few["train"], few["validation"])
    return pt.evaluate(model, few["test"])["accuracy"]


def full(name: str, task: tasks.Task, seed: int, lr: float, split: str = "test") -> float:
    """Accuracy after full fine-tuning at a learning rate."""
    model, _, few = _few(name, task, seed)
    pt.fit(model, few["train"], steps=GAP_STEPS, batch_size=16, lr=lr, seed=seed, progress=False)
    return pt.evaluate(model, few[split])["accuracy"]


def searched(name: str, task: tasks.Task) -> float:
    """The learning rate of full fine-tuning with the best validation on a seed of its own."""
    scores = [full(name, task, SEARCH_SEED, lr, "validation") for lr in GAP_RATES]
    return GAP_RATES[scores.index(max(scores))]


def _keys() -> list[str]:
    """Everything that the table needs, as `what/task/model/seed`, quick rows first."""
    scored = [t.name for t in tasks.ALL if t.metric != "perplexity"]
    keys = [f"chance/{t}//0" for t in scored] + [f"held_out//{m}/0" for m in shipped()]
    keys += [f"{what}/{t}/{TUNED}/{s}" for s in SEEDS for t in scored for what in ("full", "probe")]
    spoken = [t for t in scored if _task(t).kind != "tagging"]
    keys += [
        f"shots{k}/{t}/{m}/{s}"
        for m in CAUSAL
        for s in SEEDS
        for t in spoken
        for k in ((0, 4) if s == 0 else (4,))
    ]
    keys += [f"full/{TIMED[1]}/{TIMED[0]}/{s}" for s in SEEDS]
    for m in GAP_MODELS:
        for t in GAPS:
            keys += [
                f"rate/{t}/{m}/{SEARCH_SEED}",
                *(f"{what}/{t}/{m}/{s}" for s in SEEDS for what in ("few_head", "few_full")),
            ]
    return keys + [
        f"domain/{t.name}/{TUNED}/{s}"
        for t in tasks.ALL
        if t.metric == "perplexity" and t.name != "world_text"
        for s in SEEDS
    ]


def compute(key: str) -> object:
    what, name, model, seed = key.split("/")
    if what == "held_out":
        return _held_out(model)
    if what == "chance":
        return chance(_task(name))
    if what.startswith("shots"):
        return in_context(model, _task(name), int(what[5:]), int(seed))
    if what == "rate":
        return searched(model, _task(name))
    if what == "few_head":
        return converged(model, _task(name), int(seed))
    if what == "few_full":
        return full(model, _task(name), int(seed), stored()[f"rate/{name}/{model}/{SEARCH_SEED}"])
    if what == "domain":
        return _domain(name, model, int(seed))
    return tuned(_task(name), int(seed), model, probe=what == "probe")


def _held_out(name: str) -> float:
    from tokenizers import Tokenizer

    model, _ = models.load(name)
    return held_out_loss(model, Tokenizer.from_file(str(HERE / "models" / "tokenizer.json")), RECIPES[name])


def _domain(name: str, model_name: str, seed: int) -> dict[str, float]:
    """Perplexity on a domain's test split before and after one pass over 500 of its texts."""
    model, tokenizer = models.load(model_name)
    splits = data.load(name)
    before = data.score(model, tokenizer, splits["test"], data.info(name))
    train = data.encode(splits["train"].select(range(500)), tokenizer, kind="lm")
    pt.fit(model, train, epochs=1, batch_size=8, lr=FULL_LR, seed=seed, progress=False)
    return {"before": before, "after": data.score(model, tokenizer, splits["test"], data.info(name))}


def run(only: str = "", *, part: int = 0, parts: int = 1) -> None:
    """Compute what is not stored yet (keys that start with `only`; with `parts`, every parts-th of them)."""
    for key in [k for k in _keys() if k.startswith(only)][part::parts]:
        if key in stored():
            continue
        start = time.time()
        value = compute(key)
        rest = stored() | {key: value}
        temporary = STORE.with_suffix(f".{part}.tmp")
        temporary.write_text(json.dumps(dict(sorted(rest.items())), indent=0) + "\n")
        temporary.replace(STORE)
        print(f"{key}: {value} ({time.time() - start:.0f} s)", flush=True)


def stored() -> dict[str, object]:
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def _mean_spread(values: list[float]) -> str:
    """`83 ± 2`: mean and half the range, in percent."""
    return (
        f"{100 * mean(values):.0f} ± {50 * (max(values) - min(values)):.0f}"
        if len(values) > 1
        else f"{100 * values[0]:.0f}"
    )


def table() -> str:
    """The measurements as Markdown."""
    found = stored()

    def get(what: str, task: str, model: str) -> str:
        values = [found[k] for s in SEEDS if (k := f"{what}/{task}/{model}/{s}") in found]
        values = [v["score"] if isinstance(v, dict) else v for v in values]
        return _mean_spread(values) if values else "–"

    lines = ["| task | metric | best possible | chance | " + " | ".join(f"{m[7:]} 0-shot | {m[7:]} 4-shot" for m in CAUSAL)
             + f" | probe ({TUNED[7:]}) | full fine-tuning ({TUNED[7:]}) |", "|---" * 12 + "|"]  # fmt: skip
    for task in tasks.ALL:
        if task.metric == "perplexity":
            continue
        cells = [f"{100 * task.ceiling:.0f}", get("chance", task.name, "")]
        for model in CAUSAL:
            cells += [get("shots0", task.name, model), get("shots4", task.name, model)]
        cells += [get("probe", task.name, TUNED), get("full", task.name, TUNED)]
        lines.append(f"| {task.name} | {task.metric.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += ["", "| task, examples | " + " | ".join(f"{m[7:]}: converged head | full fine-tuning | rate" for m in GAP_MODELS) + " |",
              "|---" * (1 + 3 * len(GAP_MODELS)) + "|"]  # fmt: skip
    for name, n in GAPS.items():
        cells = [f"{name}, {n}"]
        for model in GAP_MODELS:
            rate = found.get(f"rate/{name}/{model}/{SEARCH_SEED}")
            cells += [
                get("few_head", name, model),
                get("few_full", name, model),
                "–" if rate is None else f"{rate:g}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| model | parameters | perplexity on unseen text of the world |", "|---|---|---|"]
    for name in shipped():
        if (loss := found.get(f"held_out//{name}/0")) is not None:
            kind = " (of masked tokens)" if RECIPES[name].encoder else ""
            lines.append(
                f"| {name} | {sum(p.numel() for p in models.load(name)[0].parameters()):,} | {math.exp(loss):.3f}{kind} |"
            )
    lines += [
        "",
        f"| domain never read | perplexity of {TUNED} | after one pass over 500 texts |",
        "|---|---|---|",
    ]
    for task in tasks.ALL:
        pairs = [v for s in SEEDS if (v := found.get(f"domain/{task.name}/{TUNED}/{s}"))]
        if pairs:
            after = [p["after"] for p in pairs]
            lines.append(
                f"| {task.name} | {pairs[0]['before']:.1f} | {mean(after):.2f} ± {(max(after) - min(after)) / 2:.2f} |"
            )
    return "\n".join(lines) + "\n"
