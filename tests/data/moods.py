"""A small task in words, with prompts of different lengths and label words of one and of several tokens."""

from pefttutor.data import TaskInfo
from tests.tiny import tokenizer

TOKENIZER = tokenizer()
MOOD = TaskInfo(name="mood", kind="classification", labels=("no", "yes", "unbreakable"))
ROWS = [
    {
        "text": text,
        "label": i % 3,
        "prompt": f"{text} Answer: ",
        "answer": MOOD.labels[i % 3] if MOOD.labels else "",
    }
    for i, text in enumerate(
        ["A bad day", "The baker likes the good bread", "At the bank", "SELECT", "It is a day", "t"]
    )
]
