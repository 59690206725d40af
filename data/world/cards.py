"""The cards: data/README.md with the table, and a README.md beside each model and task, written from what is stored."""

import hashlib
import json
from pathlib import Path

from . import measure, tasks
from .pretrain import MODELS, RECIPES, shipped, text_sha256

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
new head is drawn from a fixed seed). In-context rows use the first {limit} test examples and no training. Full fine-tuning: {examples} examples,
{epochs} epochs ({slower}), batch {batch_size}, AdamW, learning rate {full_lr:g}. Each number is in `measurements.json`; a dash stands
for what has not been measured yet (`python data/build.py --measure` goes on).

What the frozen features already tell stands in the tables of gaps: a converged head (`pefttutor.fit_head`, its regularisation chosen
on the validation split) beside full fine-tuning ({gap_steps} steps of 16{longer}, the best of the rates {gap_rates} on the
validation split of another seed), on as many examples as the name says, which a seed draws. Three
rates are tried, and more while the best lies at their edge; it is marked where it lies at the last of all. One seed of search and three of test show where there is room; they don't
compare methods. Another draw of the examples moves a mean by several points (`lessons/03/longer_small.jsonl` has five more of
campus-small's animals@256). Where ± is large, a seed decides whether the task is learnt at all, as on paraphrase. The tasks were chosen by the
converged head; the head by least squares asks the same features again in another way: in closed form, against the classes as 0 and 1,
with the penalty that has the least leave-one-out error. A task of generation has the language model's own output layer as its head,
untied from the embeddings, and is scored by answers that are right as a whole.

Capacity is what memory asks for: 160 pairs that follow from nothing. LoRA (on every linear layer, scaling 1, each rank with a
learning rate searched as above) needs more than rank 1 for it, and the frozen features alone recall none.

The in-context rows but those of pages and most, and campus-small's full fine-tuning on animals, velan_topic and verdicts, were
measured on one H200 in float32; of the rows of memory, question, better and the heads by least squares some on one H100; everything
else on a CPU.

The three causal sizes read the same two mixtures: first documents of the world of which every fourth is a drill, then such of which
every second is one (`world/rules.py`, `drill`: examples under labels that hold in that document only). They didn't read equally
much: {tokens}, the first two and the encoder in 150 seconds (small reached the end of its recipe before), base in 320.
The second mixture began when half of that time had passed; as a run starts slowly, it is more than half of the tokens, most of all for
small (44 of 69 shards; nano 53 of 94, base 117 of 227). So what base does beyond nano and small isn't due to size alone.

"""


def _seconds() -> str:
    found = measure.stored()
    name, task = measure.TIMED
    times = [found[k]["train_s"] for s in measure.SEEDS if (k := f"full/{task}/{name}/{s}") in found]
    return (
        f"Full fine-tuning of {name} on {task} took {min(times):.0f} to {max(times):.0f} s on one core.\n"
        if times
        else ""
    )


def _readme() -> str:
    count = len(shipped())
    read = {
        name: json.loads((MODELS / name / "training.json").read_text())["tokens"] for name in measure.CAUSAL
    }
    head = _HEAD.format(
        tokens=", ".join(f"{name[7:]} {tokens / 1e6:.0f} million tokens" for name, tokens in read.items()),
        models=count,
        tasks=len(tasks.ALL),
        limit=measure.LIMIT,
        gap_steps=measure.GAP_STEPS,
        longer="".join(f", {steps} on {task}" for task, steps in measure.LONGER.items()),
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


def _model_card(name: str) -> str:
    recipe, folder = RECIPES[name], MODELS / name
    weights = (folder / "model.safetensors").read_bytes()
    facts = json.loads((folder / "training.json").read_text())
    causal_only = ("late", "inferable") if recipe.encoder else ()
    settings = "\n".join(f"- {k}: {v}" for k, v in facts["recipe"].items() if k not in causal_only)
    objective = "masked tokens (20 %)" if recipe.encoder else "the next token"
    shards = " and ".join(f"{n} shards of `{kind}`" for kind, n in facts["shards"].items())
    limit = f" --seconds {facts['budget']:g}" if facts["budget"] else ""
    text = (
        "It is what today's scripts write."
        if facts["text_sha256"] == text_sha256()
        else "Today's scripts write another text."
    )
    return f"""# {name}

{"BertForMaskedLM" if recipe.encoder else "LlamaForCausalLM with biases and tied embeddings"}, float16, {len(weights):,} bytes, sha256 `{hashlib.sha256(weights).hexdigest()}`.

Trained from random weights to predict {objective} of the little world's text: {facts["steps"]:,} steps, {facts["tokens"] / 1e6:.0f} M tokens,
in {facts["seconds"]} s on one {facts["device"]} (nano, small and the encoder ran side by side, base alone), with torch {facts["torch"]} and
transformers {facts["transformers"]}. Made by

```
python data/build.py --shards /dev/shm/shards --workers 12 &
python data/build.py --train {name} --device cuda{limit} --shards /dev/shm/shards
```

It read {shards} (`world/rows.py`), each drawn from its own seed. A sample of all mixtures has the sha256
`{facts["text_sha256"]}`. {text}

{settings}

Licence: {LICENCE}

Known limits: it has read the little world and nothing else, {recipe.length} tokens at a time; what it can do is in data/README.md. Where the
clock ends a run before its steps, the schedule follows the clock: another machine gives a model of the same kind, not the same bits. Without a GPU
the same command with `--device cpu` gives a model that has read less in the same time.
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
