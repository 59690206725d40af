"""Lesson 16: ten LoRAs of campus-nano as a language model, each trained alone on one task, and saved.

    python data/lessons/16/train_plugins.py        goes on where it was stopped

Rank 8 at q_proj and v_proj with the factor α/r = 2; 250 steps of 16 at one rate, which wasn't searched. Every task is
asked in words and answered by the language model's own output layer, so that no plug-in needs a head, and all fit
together. A folder of adapters/ holds one of them. compare_ways.py and lesson 16 load these files.

The table, train_plugins.jsonl, says what the base and each plug-in reach on the first 200 test rows of its own task.
"""

import copy
from pathlib import Path

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare

MODEL, STEPS, BATCH, RATE, LIMIT = "campus-nano", 250, 16, 5e-3, 200
UPSTREAM = (
    "sentiment", "stars", "guests", "topic", "pages", "most", "entailment", "clinic", "velan_topic", "question",
)  # fmt: skip
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ("q_proj", "v_proj")}
FOLDER = Path(__file__).with_name("adapters")


def train(task, lr, seed):
    """Train the plug-in of one task, save it, and say how good it is there."""
    base, tokenizer = models.load(MODEL)
    splits, info = data.load(task), data.info(task)
    before = data.score(base, tokenizer, splits["test"], info, limit=LIMIT)
    model = copy.deepcopy(base)
    pefttutor.LoRA(**LORA, init_seed=seed).attach(model, name=task)
    examples = data.encode(splits["train"], tokenizer, kind="generation")
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=RATE, seed=seed)
    pefttutor.save(model, FOLDER / task)
    return {"before": before, "test": data.score(model, tokenizer, splits["test"], info, limit=LIMIT)}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(task,): None for task in UPSTREAM},
        columns=("task",),
        rates=[RATE],
        seeds=[0],
        search_seeds=[],
        model=MODEL,
        tasks=UPSTREAM,
        steps=STEPS,
        batch_size=BATCH,
        rate=RATE,
        looked_at=LIMIT,
    )
