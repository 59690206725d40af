"""Velan, a constructed language that pretraining never reads: its own sounds, endings and word order.

Words are stems of two syllables with endings. Order is subject – object – verb; adjectives follow their noun and copy its ending:
-ik subject, -un object, -ai plural before either; verbs end in -esh (past) or -orr (present); adverbs end in -ilm.
A stem can serve as noun and as verb, so a word's tag is told by its ending and place, not by the stem.
"""

import random
from functools import cache

TAGS = ("SUBJECT", "OBJECT", "ADJECTIVE", "VERB-PAST", "VERB-PRESENT", "ADVERB", "PARTICLE")
TOPICS = ("hunt", "harvest", "sea", "feast")
_ONSETS = "zh kv dz ts vr gl mr sk th q x hr".split()
_VOWELS = "a e i o u ae ou".split()
_CODAS = ["", "", "n", "r", "sh", "m"]
PARTICLES = "vo qa dzi hrem".split()


@cache
def stems() -> dict[str, dict[str, tuple[str, ...]]]:
    """For each topic its own nouns and verbs, and adjectives and adverbs that all topics share (under "")."""
    rng = random.Random(77)
    seen: list[str] = []
    while len(seen) < 200:
        s = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)) + rng.choice(_CODAS)
        if s not in seen:
            seen.append(s)
    out = {}
    for i, topic in enumerate(TOPICS):
        nouns, verbs = seen[i * 30 : i * 30 + 20], seen[i * 30 + 14 : i * 30 + 26]  # six stems serve as both
        out[topic] = {"noun": tuple(nouns), "verb": tuple(verbs)}
    out[""] = {
        "adjective": tuple(seen[130:160]),
        "adverb": tuple(seen[160:176]),
        "noun": tuple(seen[176:200]),
    }
    return out


def sentence(rng: random.Random, topic: str) -> tuple[list[str], list[str]]:
    """Words and tags of one sentence on `topic`. Half of the nouns are neutral, so one word often doesn't tell the topic."""
    words, tags = [], []

    def add(word: str, tag: str) -> None:
        words.append(word)
        tags.append(tag)

    def phrase(tag: str, ending: str) -> None:
        noun = rng.choice(stems()[topic]["noun"] if rng.random() < 0.5 else stems()[""]["noun"])
        end = ("ai" if rng.random() < 0.3 else "") + ending
        add(noun + end, tag)
        if rng.random() < 0.4:
            add(rng.choice(stems()[""]["adjective"]) + end, "ADJECTIVE")

    if rng.random() < 0.4:
        add(rng.choice(PARTICLES), "PARTICLE")
    phrase("SUBJECT", "ik")
    if rng.random() < 0.7:
        phrase("OBJECT", "un")
    if rng.random() < 0.4:
        add(rng.choice(stems()[""]["adverb"]) + "ilm", "ADVERB")
    past = rng.random() < 0.5
    add(
        rng.choice(stems()[topic]["verb"]) + ("esh" if past else "orr"),
        "VERB-PAST" if past else "VERB-PRESENT",
    )
    return words, tags


def text(rng: random.Random) -> str:
    """Two to four sentences on one topic."""
    topic = rng.choice(TOPICS)
    return " ".join(" ".join(sentence(rng, topic)[0]) + "." for _ in range(rng.randint(2, 4)))
