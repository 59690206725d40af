"""The cards: data/README.md with the table, and a README.md beside each model and task, written from what is stored."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from . import measure, tasks
from .pretrain import MODELS, RECIPES, shipped

HERE = Path(__file__).parents[1]
LICENCE = "Apache-2.0, like the rest of the repository; made by its scripts, with no text or weights from elsewhere."

_HEAD = """# The little world

A generated English world (people, towns, trade, weather, food, sport, music, travel), {models} small transformers really
pretrained on its text, and {tasks} tasks and corpora to adapt them to. All of it is made by the scripts in `world/`; nothing is downloaded.

```python
from pefttutor import data, models

# or AutoModelForCausalLM.from_pretrained("data/models/campus-small")
model, tokenizer = models.load("campus-small")
splits = data.load("sentiment", n=64)  # a datasets.DatasetDict; n = 16, 64 or 256 for small-data versions
```

`python data/build.py --check` rebuilds the tasks and compares them, verifies every weight file and measures the models again.
`python data/build.py --help` lists what else it does. The bank, the clinic and Velan (a constructed language) are never seen in
pretraining; prompts of tasks never look like pretraining text, and few-shot blocks in pretraining use label words drawn afresh.

## Before and after adaptation

Scores in percent on the test split: mean ± half the range over three seeds (of the examples shown, or of the order of training; the
new head is drawn from a fixed seed). In-context rows use the first {limit} test examples and no training. The probe trains the head alone
(for tasks answered in words: the untied output matrix), full fine-tuning everything: {examples} examples, {epochs} epochs ({slower}), batch
{batch_size}, AdamW, learning rate {probe_lr:g} (probe) and {full_lr:g} (full). Each number is in `measurements.json`; a dash stands
for what has not been measured yet (`python data/build.py --measure` goes on).

So many steps don't train a probe to the end. What the frozen features really tell is in the second table: a converged head
(`pefttutor.fit_head`, its regularisation chosen on the validation split) beside full fine-tuning ({gap_steps} steps of 16, the best of the
rates {gap_rates} on the validation split of another seed; none chosen lies at the edge), on few examples, which a seed
draws. One seed of search and three of test show where there is room; they don't compare methods.

Learning from the context came with base's last stage, in which two documents of three are drills: examples under labels that hold
in that document only (`world/rules.py`, `drill`). Before it, four examples brought base nothing on sentiment, stars and topic.
But size counts as well: nano after 600 steps of the same drills (`campus-nano-drilled`, not shipped) went from 70 to 78 % on
sentiment and from 31 to 40 % on stars, and gained nothing on topic and entailment.

"""


def _seconds() -> str:
    found = measure.stored()
    name, task = measure.TIMED
    times = [found[k]["train_s"] for s in measure.SEEDS if (k := f"full/{task}/{name}/{s}") in found]
    return (
        f"Full fine-tuning of {name} on {task} took {min(times):.0f} to {max(times):.0f} s on two cores.\n"
        if times
        else ""
    )


def _readme() -> str:
    count = len(shipped())
    head = _HEAD.format(
        models=count,
        tasks=len(tasks.ALL),
        limit=measure.LIMIT,
        probe_lr=measure.PROBE_LR,
        gap_steps=measure.GAP_STEPS,
        gap_rates=", ".join(f"{rate:g}" for rate in measure.GAP_RATES),
        full_lr=measure.FULL_LR,
        **measure.BUDGET,
        slower=", ".join(f"{k} {v}" for k, v in measure.EPOCHS.items()),
    )
    lines = [
        "\n## Tasks\n",
        "| task | kind | train / validation / test | what it asks |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {t.name} | {t.kind} | {' / '.join(map(str, t.sizes))} | {t.description} |" for t in tasks.ALL
    ]
    return head + measure.table() + "\n" + _seconds() + "\n".join(lines) + "\n"


def _stages(name: str) -> list[str]:
    """A model and what it goes on from, first stage first."""
    start = RECIPES[name].start
    return [*(_stages(start) if start else []), name]


def _model_card(name: str) -> str:
    recipe, folder = RECIPES[name], MODELS / name
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    size = (folder / "model.safetensors").stat().st_size
    stages = [
        (n, RECIPES[n], RECIPES[n].steps * RECIPES[n].rows * RECIPES[n].length / 1e6) for n in _stages(name)
    ]
    settings = "\n".join(f"- {k}: {v}" for k, v in asdict(recipe).items())
    objective = "masked tokens (20 %)" if recipe.encoder else "the next token"
    commands = "".join(
        f"python data/build.py --train {n}  # {tokens:.1f} M tokens, seed {r.seed}, world/ of commit {r.generator}\n"
        for n, r, tokens in stages
    )
    grown = (
        "Each stage goes on from the one before, grown where the shape differs (world/grow.py). "
        if recipe.start
        else ""
    )
    return f"""# {name}

{"BertForMaskedLM" if recipe.encoder else "LlamaForCausalLM with biases and tied embeddings"}, float16, {size:,} bytes, sha256 `{digest}`.

Trained to predict {objective} of the little world's text, {sum(tokens for *_, tokens in stages):.1f} M tokens in all, on one CPU core with torch 2.13. {grown}Made by

```
{commands}```

with, in the last of them,

{settings}

Licence: {LICENCE}

Known limits: it has read the little world and nothing else, {recipe.length} tokens at a time; what it can do is in data/README.md.
A stage read the text that the scripts wrote at its commit (14fb006 stands for commits shortly before it, which weren't kept);
today's scripts may write more kinds of text. So the commands give a model of the same kind; the same bits at best at those
commits, on the same processor, with the same number of threads.
"""


def _task_card(task: tasks.Task) -> str:
    about = json.loads((tasks.TASKS / task.name / "task.json").read_text(encoding="utf-8"))
    example = json.loads(json.dumps(tasks.read(task)["train"][0]))
    labels = f"\nLabels: {', '.join(task.labels)}.\n" if task.labels else ""
    return f"""# {task.name}

{task.description} Kind: {task.kind}; metric: {task.metric.replace("_", " ")}; best possible: {100 * task.ceiling:.0f} %.
{labels}
{" / ".join(map(str, task.sizes))} examples in train / validation / test, drawn with seed {task.seed} by `python data/build.py --tasks`.
sha256 of the examples: `{about["fingerprint"]}`. `subsets.json` holds the indices of the small-data versions (16, 64, 256).

The first example:

```json
{json.dumps(example, indent=1, ensure_ascii=False)}
```

Licence: {LICENCE}

Known limits: sentences come from a grammar, so a model can do perfectly here and know nothing of real text.
"""


def write_all() -> None:
    """Write every card from what is stored now."""
    (HERE / "README.md").write_text(_readme(), encoding="utf-8")
    for name in shipped():
        (MODELS / name / "README.md").write_text(_model_card(name), encoding="utf-8")
    for task in tasks.ALL:
        (tasks.TASKS / task.name / "README.md").write_text(_task_card(task), encoding="utf-8")
