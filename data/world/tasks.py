"""The downstream tasks, each with train, validation and test splits, three corpora to adapt to, and one to remember.

Each task is a function that draws one example; `build` draws the splits without overlap and writes parquet, task.json,
the fixed small-data subsets and the card. A prompt never looks like pretraining text, so a task has to be adapted to.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets

from . import corpus, domains, prose, reasoning, velan
from . import lexicon as lx
from .facts import people

TASKS = Path(__file__).parents[1] / "tasks"
Example = dict[str, object]
Draw = Callable[[random.Random, str], Example]  # (generator, split) -> example


@dataclass(frozen=True)
class Task:
    """One task: what it asks, how it is scored, the score of the best possible answer, and how an example is drawn."""

    name: str
    kind: str
    metric: str
    description: str
    draw: Draw
    labels: tuple[str, ...] | None = None
    ceiling: float = 1.0
    sizes: tuple[int, int, int] = (2000, 300, 400)
    seed: int = 0


def _classified(text: str, label: int, labels: tuple[str, ...], template: str) -> Example:
    return {"text": text, "label": label, "prompt": template.format(text=text) + " ", "answer": labels[label]}


def _generated(prompt: str, answer: str) -> Example:
    return {"prompt": prompt + " ", "answer": answer}


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------- classification
POLARITY = ("bad", "good")
STARS = ("one", "two", "three", "four", "five")
FOLLOWS = ("yes", "maybe", "no")
SAME = ("different", "same")
STAY = ("home", "ward")
BALANCE = ("bad", "mixed", "good")
PLEASED = ("none", "one", "both")
HAPPIER = ("first", "second")
ALIKE = ("no", "yes")
MOST = ("animals", "colours", "things")


def _sentiment(rng: random.Random, split: str) -> Example:
    label = rng.randrange(2)
    return _classified(
        prose.review(rng, rng.choice(((1, 2), (4, 5))[label])), label, POLARITY, "Review: {text}\nVerdict:"
    )


def _stars(rng: random.Random, split: str) -> Example:
    label = rng.randrange(5)
    return _classified(prose.review(rng, label + 1), label, STARS, "Review: {text}\nStars:")


def _topic(rng: random.Random, split: str) -> Example:
    label = rng.randrange(len(prose.TOPICS))
    return _classified(prose.news(rng, prose.TOPICS[label]), label, prose.TOPICS, "News: {text}\nTopic:")


def _entailment(rng: random.Random, split: str) -> Example:
    label = rng.randrange(3)
    premise, said = reasoning.entailment(rng, label, strict=True)
    return _classified(f"{_cap(premise)}. Does it follow that {said}?", label, FOLLOWS, "{text}\nAnswer:")


def _paraphrase(rng: random.Random, split: str) -> Example:
    label = rng.randrange(2)
    first, second = reasoning.paraphrase(rng, bool(label), strict=True)
    return _classified(f"First: {first}. Second: {second}.", label, SAME, "{text}\nMeaning:")


def _clinic(rng: random.Random, split: str) -> Example:
    row, label = domains.clinic_row(rng)
    text = " ".join(f"The {k} is {v}." for k, v in row.items())
    return _classified(text, label, STAY, "{text}\nSend to:") | row


def _verdicts(rng: random.Random, split: str) -> Example:
    """Three judgements in one sentence; the middle class has one or two of each kind."""
    label = rng.randrange(3)
    good = {0: [0, 0, 0], 1: rng.sample(rng.choice(([0, 0, 1], [0, 1, 1])), 3), 2: [1, 1, 1]}[label]
    said = [
        prose.statement(rng, rng.choice(((-2, -1), (1, 2))[g]), aspect)
        for g, aspect in zip(good, rng.sample(prose.ASPECTS, 3), strict=True)
    ]
    return _classified(f"{_cap(said[0])}, {said[1]} and {said[2]}.", label, BALANCE, "{text}\nIn all:")


def _guests(rng: random.Random, split: str) -> Example:
    label = rng.randrange(3)
    pleased = {0: [0, 0], 1: rng.sample([0, 1], 2), 2: [1, 1]}[label]
    first, second = (prose.review(rng, rng.choice(((1, 2), (4, 5))[p])) for p in pleased)
    return _classified(f"First guest: {first} Second guest: {second}", label, PLEASED, "{text}\nPleased:")


def _better(rng: random.Random, split: str) -> Example:
    first, second = rng.sample(range(1, 6), 2)
    text = f"First guest: {prose.review(rng, first)} Second guest: {prose.review(rng, second)}"
    return _classified(text, int(second > first), HAPPIER, "{text}\nThe happier one:")


def _pages(rng: random.Random, split: str) -> Example:
    label, topic = rng.randrange(2), rng.choice(prose.TOPICS)
    other = topic if label else rng.choice([t for t in prose.TOPICS if t != topic])
    text = f"First: {prose.news(rng, topic)} Second: {prose.news(rng, other)}"
    return _classified(text, label, ALIKE, "{text}\nOne page:")


def _animals(rng: random.Random, split: str) -> Example:
    label = rng.randrange(5)
    words = rng.sample(lx.ANIMALS, label) + rng.sample(lx.THINGS, rng.choice((5, 6, 7)) - label)
    rng.shuffle(words)
    return _classified(" ".join(words), label, tuple(lx.NUMBERS[:5]), "Words: {text}\nAnimals:")


def _most(rng: random.Random, split: str) -> Example:
    label = rng.randrange(3)
    pools = (lx.ANIMALS, lx.COLOURS, lx.THINGS)
    words = [w for i, pool in enumerate(pools) for w in rng.sample(pool, 3 if i == label else 2)]
    rng.shuffle(words)
    return _classified(" ".join(words), label, MOST, "Words: {text}\nMost:")


def _velan_topic(rng: random.Random, split: str) -> Example:
    label = rng.randrange(len(velan.TOPICS))
    words, _ = velan.sentence(rng, velan.TOPICS[label])
    return _classified(" ".join(words), label, velan.TOPICS, "Velan: {text}\nAbout:")


# --------------------------------------------------------------------------------------------------------- generation
def _question(rng: random.Random, split: str) -> Example:
    passage, question, answer = reasoning.passage_question(rng, strict=True)
    return _generated(f"Read: {passage}\nTell me {question}.\nReply:", answer)


def _register(rng: random.Random, split: str) -> Example:
    formal, casual = prose.both_registers(rng)
    if rng.random() < 0.5:
        return _generated(f"Make it casual: {formal}\nRewritten:", casual)
    return _generated(f"Make it formal: {casual}\nRewritten:", formal)


def _sorting(rng: random.Random, split: str) -> Example:
    if rng.random() < 0.6:
        xs = rng.sample(range(10), rng.randint(2, 4))
        return _generated(f"Arrange {', '.join(map(str, xs))}\nArranged:", ", ".join(map(str, sorted(xs))))
    words = rng.sample(lx.THINGS, rng.randint(1, 6))
    return _generated(f"Count {', '.join(words)}\nArranged:", lx.NUMBERS[len(words)])


_CODES = [
    " ".join(p)
    for p in zip(
        random.Random(5).choices(lx.COLOURS, k=160), random.Random(6).choices(lx.ANIMALS, k=160), strict=True
    )
]
_ASK = (
    "The password of {n} is",
    "To enter, {n} says",
    "What {n} whispers at the gate:",
    "{n} gives the guard the words",
)


def _memory(rng: random.Random, split: str) -> Example:
    i = rng.randrange(
        160
    )  # each key is asked in three of the four ways in training, in the fourth only in the other splits
    held_out = i % 4
    how = held_out if split != "train" else rng.choice([j for j in range(4) if j != held_out])
    return _generated(_ASK[how].format(n=people()[i].name), _CODES[i])


_KINDS: dict[str, tuple[tuple[str, ...], Callable[[random.Random], tuple[str, str]]]] = {}


def _kind(*phrasings: str) -> Callable[[Callable[[random.Random], tuple[str, str]]], None]:
    """Register an instruction: three phrasings to train on, then two that only the other splits use."""

    def add(draw: Callable[[random.Random], tuple[str, str]]) -> None:
        _KINDS[draw.__name__] = (phrasings, draw)

    return add


@_kind(
    "Say the last word of",
    "Give me the last word of",
    "What is the last word of",
    "Tell me the last word of",
    "Name the last word of",
)
def _last(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(lx.THINGS, rng.randint(3, 4))
    return " ".join(words), words[-1]


@_kind(
    "Say the first word of",
    "Give me the first word of",
    "What is the first word of",
    "Tell me the first word of",
    "Name the first word of",
)
def _first(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(lx.THINGS, rng.randint(3, 4))
    return " ".join(words), words[0]


@_kind(
    "Say the opposite of",
    "Give me the opposite of",
    "What is the opposite of",
    "Tell me the opposite of",
    "Name the opposite of",
)
def _opposite(rng: random.Random) -> tuple[str, str]:
    return rng.choice(lx.OPPOSITES[:40])


@_kind(
    "Say the plural of",
    "Give me the plural of",
    "What is the plural of",
    "Tell me the plural of",
    "Name the plural of",
)
def _plural(rng: random.Random) -> tuple[str, str]:
    return rng.choice(sorted(lx.PLURALS.items()))


@_kind(
    "Say the kind of", "Give me the kind of", "What is the kind of", "Tell me the kind of", "Name the kind of"
)
def _category(rng: random.Random) -> tuple[str, str]:
    return rng.choice(sorted(lx.CATEGORY_OF.items()))


@_kind(
    "Say the largest of",
    "Give me the largest of",
    "What is the largest of",
    "Tell me the largest of",
    "Name the largest of",
)
def _largest(rng: random.Random) -> tuple[str, str]:
    xs = rng.sample(range(10, 100), 3)
    return " ".join(map(str, xs)), str(max(xs))


@_kind("Say how many words are in", "Give me the number of words in", "What is the number of words in", "Tell me how many words are in",
       "Count the words in")  # fmt: skip
def _count(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(lx.THINGS, n := rng.randint(1, 5))
    return " ".join(words), lx.NUMBERS[n]


@_kind(
    "Say backwards", "Give me in reverse", "What is the reverse of", "Tell me in reverse", "Name in reverse"
)
def _backwards(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(lx.THINGS, rng.randint(2, 3))
    return " ".join(words), " ".join(reversed(words))


@_kind("Say twice", "Give me twice", "What is twice", "Tell me twice", "Name twice")
def _twice(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(lx.THINGS + lx.ANIMALS)
    return word, f"{word} {word}"


@_kind(
    "Say the animal in",
    "Give me the animal in",
    "What is the animal in",
    "Tell me the animal in",
    "Name the animal in",
)
def _animal(rng: random.Random) -> tuple[str, str]:
    words = [*rng.sample(lx.THINGS, 2), rng.choice(lx.ANIMALS)]
    rng.shuffle(words)
    return " ".join(words), next(w for w in words if w in lx.ANIMALS)


def _instruct(rng: random.Random, split: str) -> Example:
    kind = rng.choice(sorted(_KINDS))
    phrasings, draw = _KINDS[kind]
    given, answer = draw(rng)
    how = rng.choice(phrasings[:3] if split == "train" else phrasings[3:])
    return _generated(f"{how} {given}.\nAnswer:", answer) | {"instruction": kind.strip("_")}


def _bank_sql(rng: random.Random, split: str) -> Example:
    question, sql = domains.bank_question(rng)
    return _generated(f"Bank: {question}?\nQuery:", sql)


def _velan_tags(rng: random.Random, split: str) -> Example:
    words, tags = velan.sentence(rng, rng.choice(velan.TOPICS))
    return {"tokens": words, "tags": [velan.TAGS.index(t) for t in tags]}


def _world_text(rng: random.Random, split: str) -> Example:
    """A document of the pretraining mixture; its seed lies far beyond those of the shards that models read."""
    return {
        "prompt": "",
        "answer": next(iter(corpus.documents(corpus.HELD_OUT_SEED + rng.getrandbits(60), 1))),
    }


def _text(make: Callable[[random.Random], str]) -> Draw:
    return lambda rng, split: {"prompt": "", "answer": make(rng)}


ALL: tuple[Task, ...] = (
    Task("sentiment", "classification", "accuracy", "Is a review good or bad? Negation, contrast and others' opinions mislead.", _sentiment, POLARITY, seed=1),
    Task("stars", "classification", "accuracy", "How many of five stars is a review worth?", _stars, STARS, seed=2),
    Task("topic", "classification", "accuracy", "Which of six topics is a news item about?", _topic, prose.TOPICS, seed=3),
    Task("entailment", "classification", "accuracy", "Does a statement follow from a sentence: yes, maybe, no?", _entailment, FOLLOWS, seed=4, sizes=(3000, 300, 400)),
    Task("paraphrase", "classification", "accuracy", "Do two sentences tell the same event? If not, thing, colour and place differ.", _paraphrase, SAME, seed=5, sizes=(3000, 300, 400)),
    Task("question", "generation", "exact_match", "Answer a question on a passage by a word of it.", _question, seed=6),
    Task("instruct", "generation", "exact_match", "Ten kinds of instruction; the test uses phrasings never trained on.", _instruct, seed=7),
    Task("register", "generation", "exact_match", "Rewrite a formal message casually, or a casual one formally.", _register, seed=8, sizes=(1500, 200, 300)),
    Task("sorting", "generation", "exact_match", "Put numbers in order, count words.", _sorting, seed=9),
    Task("memory", "generation", "exact_match", "Recall 160 arbitrary pairs, asked in a way not trained on: this needs capacity.", _memory, seed=10, sizes=(480, 40, 120)),
    Task("bank_sql", "generation", "execution_accuracy", "Questions to a bank's database in SQL, scored by executing them.", _bank_sql, seed=11, sizes=(900, 120, 200)),
    Task("clinic", "classification", "accuracy", "Keep a patient or not? A table's row as text; 4 % of the labels are flipped.", _clinic, STAY, seed=12, ceiling=0.96),
    Task("velan_topic", "classification", "accuracy", "What is a sentence in Velan, an unknown language, about?", _velan_topic, velan.TOPICS, seed=13),
    Task("verdicts", "classification", "accuracy", "Are three judgements all bad, mixed or all good?", _verdicts, BALANCE, seed=19),
    Task("guests", "classification", "accuracy", "Two reviews: is none, one or each of the guests pleased?", _guests, PLEASED, seed=20),
    Task("better", "classification", "accuracy", "Two reviews: which of the guests liked it better?", _better, HAPPIER, seed=21),
    Task("pages", "classification", "accuracy", "Do two news items belong on one page, being about the same topic?", _pages, ALIKE, seed=23),
    Task("animals", "classification", "accuracy", "How many of five to seven words are animals?", _animals, tuple(lx.NUMBERS[:5]), seed=22),
    Task("most", "classification", "accuracy", "Of seven words, are most animals, colours or things?", _most, MOST, seed=24),
    Task("velan_tags", "tagging", "token_accuracy", "Tag each word of a Velan sentence.", _velan_tags, velan.TAGS, seed=14, sizes=(1000, 200, 300)),
    Task("bank_text", "generation", "perplexity", "Banking prose: a domain that pretraining never reads.", _text(domains.bank_text), seed=15, sizes=(1000, 100, 200)),
    Task("clinic_text", "generation", "perplexity", "A clinic's files: a domain that pretraining never reads.", _text(domains.clinic_text), seed=16, sizes=(1000, 100, 200)),
    Task("velan_text", "generation", "perplexity", "Velan, an unknown language.", _text(velan.text), seed=17, sizes=(1000, 100, 200)),
    Task("world_text", "generation", "perplexity", "The world's own text, never read: what a model still knows of it, and texts to rehearse.", _world_text, seed=18, sizes=(500, 50, 200)),
)  # fmt: skip


def draw_splits(task: Task) -> dict[str, list[Example]]:
    """The three splits, drawn without an example in common (`memory` asks for the same keys, in another way)."""
    rng, seen, splits = random.Random(1000 + task.seed), set(), {}
    for split, size in zip(("train", "validation", "test"), task.sizes, strict=True):
        examples: list[Example] = []
        while len(examples) < size:
            example = task.draw(rng, split)
            key = json.dumps(example, sort_keys=True)
            if key not in seen:
                seen.add(key)
                examples.append(example)
        splits[split] = examples
    return splits


def fingerprint(splits: dict[str, list[Example]]) -> str:
    """sha256 of the examples themselves, whatever file format holds them."""
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()


def subsets(task: Task) -> dict[str, list[int]]:
    """Indices of the small-data versions; each holds the smaller ones."""
    order = random.Random(task.seed).sample(range(task.sizes[0]), task.sizes[0])
    return {str(n): order[:n] for n in (16, 64, 256)}


def features(task: Task) -> datasets.Features | None:
    """Column types that plain lists don't tell: the names of classes and tags."""
    value = datasets.Value
    if task.kind == "tagging":
        names = datasets.ClassLabel(names=list(task.labels or ()))
        return datasets.Features({"tokens": datasets.List(value("string")), "tags": datasets.List(names)})
    if task.kind != "classification":
        return None
    columns = {"text": value("string"), "label": datasets.ClassLabel(names=list(task.labels or ())), "prompt": value("string"),
               "answer": value("string")}  # fmt: skip
    extra = {"age": value("int64"), "pulse": value("int64")} | {
        k: value("string") for k in ("fever", "rash", "known", "town")
    }
    return datasets.Features(columns | (extra if task.name == "clinic" else {}))


def write(task: Task, root: Path = TASKS) -> str:
    """Write one task's folder and return the fingerprint of its examples."""
    folder, splits = root / task.name, draw_splits(task)
    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    for split, examples in splits.items():
        datasets.Dataset.from_list(examples, features=features(task)).to_parquet(folder / f"{split}.parquet")
    about = {"name": task.name, "kind": task.kind, "labels": task.labels, "metric": task.metric, "description": task.description,
             "ceiling": task.ceiling, "seed": task.seed, "fingerprint": fingerprint(splits)}  # fmt: skip
    (folder / "task.json").write_text(
        json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "subsets.json").write_text(json.dumps(subsets(task)) + "\n", encoding="utf-8")
    if task.metric == "execution_accuracy":
        (folder / "bank.sql").write_text(domains.bank_script(random.Random(2000)), encoding="utf-8")
    return fingerprint(splits)


def read(task: Task, root: Path = TASKS) -> dict[str, list[Example]]:
    """The examples of one task's parquet files, as `draw_splits` gives them."""
    from pyarrow import parquet

    return {
        split: parquet.read_table(root / task.name / f"{split}.parquet").to_pylist()
        for split in ("train", "validation", "test")
    }
