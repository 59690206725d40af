"""Lesson 22c: 24 facts in one matrix, LoRA of rank 1 to 8 on the last block's down_proj, over ten seeds.

    python data/lessons/22/fill_matrix.py        goes on where it was stopped

The facts are those of compare_ways.py of lesson 13, which puts them into four such matrices: a seed draws 24 people of
the task memory, each in one sentence, their order, and the factors A. Training takes 240 steps of 8, which are 80
passes, and for two ranks 480, which show whether more would change anything. The factor α/r is 2, and rank r has 480 r
values. `recall` is the share of sentences that the model ends right as a whole, `words` that of the passwords' two
words, each after the right ones before it.

Five other seeds, from other people, try the learning rates of a first window on 1, 2, 5, 10, …, which is widened as
long as the best mean share of words lies at its edge: of whole sentences rank 1 may have none at any rate.
"forgotten" is the rise of the loss on unseen text of the model's world.

Lesson 22c reads the table, fill_matrix.jsonl.
"""

import copy
import runpy
from pathlib import Path

import torch

import pefttutor
from pefttutor import data
from pefttutor.authoring.tables import compare

WAYS = runpy.run_path(str(Path(__file__).parents[1] / "13" / "compare_ways.py"))
MODEL, TASK, PLACE = "campus-nano", "memory", "layers.3.mlp.down_proj"
SEARCH, BATCH, WINDOW = WAYS["SEARCH"], WAYS["BATCH"], (1e-2, 5e-2)
CASES = dict.fromkeys([(240, 1), (240, 2), (240, 4), (240, 8), (480, 1), (480, 2)], WINDOW)  # steps, rank


@torch.no_grad()
def words(model, examples, end):
    """The share of the answers' words that are the model's first choice, the end of the text not among them."""
    batch = data.collate(examples)
    labels = batch["labels"][:, 1:]
    hit = model.eval()(**batch).logits[:, :-1].argmax(-1) == labels
    return hit[(labels != -100) & (labels != end)].float().mean().item()


def train(steps, r, lr, seed):
    """Tell campus-nano the facts of a seed through one matrix; what it recalls, and what it cost."""
    base, tokenizer, before = WAYS["start"]()
    model, examples = copy.deepcopy(base), data.encode(WAYS["facts"](seed), tokenizer, kind="generation")
    pefttutor.LoRA(r=r, lora_alpha=2 * r, target_modules=(PLACE,), init_seed=seed).attach(model)
    pefttutor.fit(model, examples, steps=steps, batch_size=BATCH, lr=lr, seed=seed)
    share = words(model, examples, tokenizer.eos_token_id)
    if seed in SEARCH:
        return {"validation": share, "recall": WAYS["recall"](model, examples)}
    lost = data.held_out_loss(model, tokenizer) - before
    return {"words": share, "recall": WAYS["recall"](model, examples), "forgotten": lost}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        CASES,
        columns=("steps", "r"),
        rates=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[TASK],
        batch_size=BATCH,
        place=PLACE,
    )
