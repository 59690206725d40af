"""What the embedded models can do before and after adaptation: the table in data/README.md.

For each task: chance, zero-shot and four-shot in context (every causal model), full fine-tuning (one model); for the tasks with
room a converged head beside it (two models); over three seeds. Every number is stored in measurements.json with its seed, so that a stopped run goes on where it was.
"""

import json
import math
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean

import torch
from torch import nn

import pefttutor as pt
from pefttutor import data, models
from pefttutor.data.batches import collator
from pefttutor.saving.files import write_atomically
from pefttutor.train.features import arriving, output_layer

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
FULL_LR = 1e-3
# Where adapting inside can show what it is good for: tasks, and examples of each at which the gap is measured.
GAPS = {
    "campus-nano": ("animals@256", "most@512", "velan_topic@256", "paraphrase@128", "pages@128", "better@64", "verdicts@64", "guests@64",
                    "memory@480"),
    "campus-small": ("animals@256", "most@512", "velan_topic@256", "paraphrase@64", "pages@128", "verdicts@64", "paraphrase@128",
                     "better@64", "question@128"),
}  # fmt: skip
GAP_STEPS, LONGER, SEARCH_SEED = 375, {"memory": 900}, 100
# Where capacity is what counts: LoRA on every linear layer.
RANKED, RANKS = ("campus-nano", "memory@480"), (1, 4)
GAP_RATES, WINDOW = (
    (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    (2, 4),
)  # the window is widened while the best lies at its edge
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _classified(gap: str) -> bool:
    return _task(gap.split("@")[0]).kind == "classification"


def _task(name: str) -> tasks.Task:
    return next(t for t in tasks.ALL if t.name == name)


def _loaded(name: str, **how: object) -> tuple[nn.Module, object]:
    model, tokenizer = models.load(name, **how)
    return model.to(DEVICE), tokenizer


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
    model, tokenizer = _loaded(model_name)
    splits, rng = data.load(task.name), random.Random(seed)
    rows = splits["test"].select(range(min(LIMIT, len(splits["test"])))).to_list()
    train = splits["train"].to_list()
    for row in rows:
        shown = rng.sample(train, shots)
        row["prompt"] = "".join(f"{r['prompt']}{r['answer']}\n\n" for r in shown) + row["prompt"]
    return data.score(model, tokenizer, rows, data.info(task.name))


def tuned(task: tasks.Task, seed: int, name: str = TUNED) -> dict[str, float]:
    """Train everything; returns the test score and the seconds of training."""
    head = {"classification": "classification", "tagging": "tagging"}.get(task.kind, "lm")
    labels = {} if head == "lm" else {"labels": list(task.labels or ())}
    model, tokenizer = _loaded(name, head=head, **labels)
    splits = data.load(task.name)
    n = min(BUDGET["examples"], len(splits["train"]))
    train = data.encode(splits["train"].select(range(n)), tokenizer, kind=task.kind)
    start = time.perf_counter()
    pt.fit(
        model,
        train,
        epochs=EPOCHS.get(task.name, BUDGET["epochs"]),
        batch_size=BUDGET["batch_size"],
        lr=FULL_LR,
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - start
    return {
        "score": data.score(model, tokenizer, splits["test"], data.info(task.name)),
        "train_s": round(seconds, 1),
    }


def _few(name: str, gap: str, seed: int) -> tuple[nn.Module, dict[str, list], Callable[[str], float]]:
    """The model of a gap (`task@n`), its encoded splits, with n training examples that the seed draws, and a split's score."""
    task, n = _task(gap.split("@")[0]), int(gap.split("@")[1])
    written = task.kind != "classification"
    how = {} if written else {"head": "classification", "labels": list(task.labels or ())}
    model, tokenizer = _loaded(name, **how)
    splits = data.load(task.name)
    chosen = random.Random(seed).sample(range(len(splits["train"])), n)
    rows = {
        "train": splits["train"].select(chosen),
        "validation": splits["validation"],
        "test": splits["test"],
    }
    few = {split: data.encode(some, tokenizer, kind=task.kind) for split, some in rows.items()}

    def score(split: str) -> float:
        if written:  # by what the model writes: the right answer, whole
            return data.score(model, tokenizer, rows[split], data.info(task.name))
        return pt.evaluate(model, few[split])["accuracy"]

    return model, few, score


def converged(name: str, gap: str, seed: int) -> float:
    """Score of the frozen model with a head that is trained to the end, a language model's too."""
    model, few, score = _few(name, gap, seed)
    if not _classified(gap):  # a head of its own: the embeddings stay as they are
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    pt.fit_head(model, few["train"], few["validation"])
    return score("test")


def by_least_squares(name: str, gap: str, seed: int) -> float:
    """The same question asked otherwise: a head by least squares on the classes as 0 and 1, in closed form.

    No search by gradients, another loss, and the penalty with the least leave-one-out error instead of the best validation.
    """
    model, few, _ = _few(name, gap, seed)
    stack = collator(model)
    head, layer = output_layer(model, stack(few["train"][:1]), None)
    x, y = arriving(model, layer, head, stack, few["train"], batch_size=64)
    seen, answers = arriving(model, layer, head, stack, few["test"], batch_size=64)
    centre, scale = x.mean(0), x.std(0).clamp_min(1e-12)
    x, seen, wanted = (x - centre) / scale, (seen - centre) / scale, nn.functional.one_hot(y).double()
    offset = wanted.mean(0)
    left, singular, right = torch.linalg.svd(x, full_matrices=False)

    def left_out(penalty: float) -> float:
        kept = singular.square() / (singular.square() + penalty)
        fitted = left * kept @ left.T
        rest = wanted - offset - fitted @ (wanted - offset)
        return float((rest / (1 - 1 / len(x) - fitted.diagonal())[:, None]).square().mean())

    penalty = min((10.0**k * len(x) for k in range(-4, 3)), key=left_out)
    weight = right.T * (singular / (singular.square() + penalty)) @ left.T @ (wanted - offset)
    return float(((seen @ weight + offset).argmax(-1) == answers).double().mean())


def adapted(name: str, gap: str, seed: int, lr: float, split: str = "test", r: int = 0) -> float:
    """Score after full fine-tuning at a learning rate, or with LoRA of rank r on every linear layer."""
    model, few, score = _few(name, gap, seed)
    if r:
        pt.LoRA(r=r, lora_alpha=r, target_modules="all-linear").attach(model)
    steps = LONGER.get(gap.split("@")[0], GAP_STEPS)
    pt.fit(model, few["train"], steps=steps, batch_size=16, lr=lr, seed=seed, progress=False)
    return score(split)


def searched(gap: str, model: str, way: str = "") -> tuple[list[str], float | None]:
    """The runs that the search for a way's learning rate needs so far, and its answer once all are there.

    way: "" is full fine-tuning, "lora4x" LoRA of rank 4. The best validation on a seed of its own decides.
    """
    found, (low, high) = stored(), WINDOW
    while True:
        keys = [f"try{way}{lr:g}/{gap}/{model}/{SEARCH_SEED}" for lr in GAP_RATES[low : high + 1]]
        scores = [found.get(key) for key in keys]
        if None in scores:
            return keys, None
        best = low + scores.index(max(scores))
        if best == low > 0:
            low -= 1
        elif best == high < len(GAP_RATES) - 1:
            high += 1
        else:
            return keys, GAP_RATES[best]


def _keys() -> list[str]:
    """Everything that the table needs, as `what/task/model/seed`, quick rows first."""
    scored = [t.name for t in tasks.ALL if t.metric != "perplexity"]
    keys = [f"chance/{t}//0" for t in scored] + [f"held_out//{m}/0" for m in shipped()]
    keys += [f"full/{t}/{TUNED}/{s}" for s in SEEDS for t in scored]
    spoken = [t for t in scored if _task(t).kind != "tagging"]
    keys += [
        f"shots{k}/{t}/{m}/{s}"
        for m in CAUSAL
        for s in SEEDS
        for t in spoken
        for k in ((0, 4) if s == 0 else (4,))
    ]
    keys += [f"full/{TIMED[1]}/{TIMED[0]}/{s}" for s in SEEDS]
    for m, gaps in GAPS.items():
        keys += [f"few_head/{gap}/{m}/{s}" for gap in gaps for s in SEEDS]
        keys += [f"few_squares/{gap}/{m}/{s}" for gap in gaps for s in SEEDS if _classified(gap)]
        for gap in gaps:
            for way in ("", *(f"lora{r}x" for r in RANKS)) if (m, gap) == RANKED else ("",):
                tries, lr = searched(gap, m, way)
                keys += tries
                keys += [f"few{way}{lr:g}/{gap}/{m}/{s}" for s in SEEDS if lr is not None]
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
    if what == "few_head":
        return converged(model, name, int(seed))
    if what == "few_squares":
        return by_least_squares(model, name, int(seed))
    if what.startswith(("try", "few")):
        rank, _, lr = what[3:].removeprefix("lora").rpartition("x")
        split = "validation" if what.startswith("try") else "test"
        return adapted(model, name, int(seed), float(lr), split, int(rank or 0))
    if what == "domain":
        return _domain(name, model, int(seed))
    return tuned(_task(name), int(seed), model)


def _held_out(name: str) -> float:
    from tokenizers import Tokenizer

    model, _ = models.load(name)
    return held_out_loss(model, Tokenizer.from_file(str(HERE / "models" / "tokenizer.json")), RECIPES[name])


def _domain(name: str, model_name: str, seed: int) -> dict[str, float]:
    """Perplexity on a domain's test split before and after one pass over 500 of its texts."""
    model, tokenizer = _loaded(model_name)
    splits = data.load(name)
    before = data.score(model, tokenizer, splits["test"], data.info(name))
    train = data.encode(splits["train"].select(range(500)), tokenizer, kind="lm")
    pt.fit(model, train, epochs=1, batch_size=8, lr=FULL_LR, seed=seed, progress=False)
    return {"before": before, "after": data.score(model, tokenizer, splits["test"], data.info(name))}


def _timed(key: str) -> tuple[object, float]:
    start = time.time()
    return compute(key), time.time() - start


def run(only: str = "", *, workers: int = 1) -> None:
    """Compute what is not stored yet (keys that start with `only`) by so many processes, and store each as it comes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        # What a search has found may ask for more.
        while missing := [k for k in _keys() if k.startswith(only) and k not in stored()]:
            asked = {pool.submit(_timed, key): key for key in missing}
            for done in as_completed(asked):
                value, seconds = done.result()
                _store(stored() | {asked[done]: value})
                print(f"{asked[done]}: {value} ({seconds:.0f} s)", flush=True)
    known = set(_keys())
    _store({key: value for key, value in stored().items() if key in known})


def _store(found: dict[str, object]) -> None:
    write_atomically(STORE, json.dumps(dict(sorted(found.items())), indent=0) + "\n")


def stored() -> dict[str, object]:
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def _mean_spread(values: list[float]) -> str:
    """`83 ± 2`: mean and half the range, in percent."""
    return (
        f"{100 * mean(values):.0f} ± {50 * (max(values) - min(values)):.0f}"
        if len(values) > 1
        else f"{100 * values[0]:.0f}"
    )


def _rate(gap: str, model: str, way: str = "") -> str:
    """The chosen learning rate, marked where it is the smallest or the largest tried."""
    _, chosen = searched(gap, model, way)
    edge = " (edge)" if chosen in (GAP_RATES[0], GAP_RATES[-1]) else ""
    return "–" if chosen is None else f"{chosen:g}{edge}"


def table() -> str:
    """The measurements as Markdown."""
    found = stored()

    def get(what: str, task: str, model: str) -> str:
        values = [found[k] for s in SEEDS if (k := f"{what}/{task}/{model}/{s}") in found]
        values = [v["score"] if isinstance(v, dict) else v for v in values]
        return _mean_spread(values) if values else "–"

    lines = ["| task | metric | best possible | chance | " + " | ".join(f"{m[7:]} 0-shot | {m[7:]} 4-shot" for m in CAUSAL)
             + f" | full fine-tuning ({TUNED[7:]}) |", "|---" * 11 + "|"]  # fmt: skip
    for task in tasks.ALL:
        if task.metric == "perplexity":
            continue
        cells = [f"{100 * task.ceiling:.0f}", get("chance", task.name, "")]
        for model in CAUSAL:
            cells += [get("shots0", task.name, model), get("shots4", task.name, model)]
        cells.append(get("full", task.name, TUNED))
        lines.append(f"| {task.name} | {task.metric.replace('_', ' ')} | {' | '.join(cells)} |")
    for model, gaps in GAPS.items():
        lines += [
            "",
            f"| {model}: task@examples | converged head | head by least squares | full fine-tuning | rate |",
            "|---|---|---|---|---|",
        ]
        for gap in gaps:
            _, lr = searched(gap, model)
            cells = (get(what, gap, model) for what in ("few_head", "few_squares", f"few{lr or 0:g}"))
            lines.append(f"| {gap} | {' | '.join(cells)} | {_rate(gap, model)} |")
    model, gap = RANKED
    lines += ["", f"| {model}, {gap} | exact match | rate |", "|---|---|---|"]
    for name, way in [*((f"LoRA, r = {r}", f"lora{r}x") for r in RANKS), ("full fine-tuning", "")]:
        _, lr = searched(gap, model, way)
        lines.append(f"| {name} | {get(f'few{way}{lr or 0:g}', gap, model)} | {_rate(gap, model, way)} |")
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
