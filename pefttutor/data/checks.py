"""What an example may be: refused before the first step, with what was given and what was expected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from pefttutor.data.targets import IGNORED, predicts_next

MAKE = "Make them with pefttutor.data.encode(split, tokenizer)."


def check_counts(**given: int | None) -> None:
    """Raise ValueError for a setting that isn't a whole number of at least 1; None was not given.

    >>> check_counts(batch_size=8, max_new_tokens=None, max_length=0)
    Traceback (most recent call last):
    ValueError: max_length=0, expected a whole number of at least 1
    """
    for name, value in given.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and value >= 1):
            raise ValueError(f"{name}={value!r}, expected a whole number of at least 1")


def check_examples(model: nn.Module, examples: Sequence[Any], name: str, *, needs_labels: bool) -> None:
    """Raise ValueError for what is no data set of examples, and for labels that the model can't be trained on.

    >>> check_examples(nn.Linear(2, 1), [{"x": Tensor([1, 2])}], "train", needs_labels=True)
    Traceback (most recent call last):
    ValueError: train[0] has no labels, only x; or give loss=

    Cost: one pass over the labels, and a few forwards on one example, once a model (`predicts_next`).
    """
    _check_kind(examples, name)
    _check_example(examples[0], f"{name}[0]")
    if not needs_labels:
        return
    known = _Labels.of(model, examples[0])
    lengths = set()
    for i in range(len(examples)):
        example, where = examples[i], f"{name}[{i}]"
        if "labels" not in example:
            raise ValueError(f"{where} has no labels, only {', '.join(example)}; or give loss=")
        labels, ids = example["labels"], example.get("input_ids")
        if ids is not None:
            lengths.add(len(ids))
            _check_range(ids, known.words, f"{where}: input_ids", "tokens in the model's vocabulary")
        if labels.is_floating_point() or labels.ndim == 0 or known.per_text:
            known.check_answer(labels, where)
        else:
            known.check_targets(labels, ids, where)
    known.check_padding(lengths, name)


def _check_kind(examples: Any, name: str) -> None:
    """Whether these can be counted and picked one by one."""
    kind = type(examples).__name__
    if isinstance(examples, DataLoader):
        raise ValueError(
            f"{name} is a DataLoader; expected the examples themselves, which are batched here: give loader.dataset, "
            f"with batch_size={examples.batch_size} and, where they need a collate_fn of their own, collate=it"
        )
    if isinstance(examples, Mapping):
        how = (
            "give one split: " + ", ".join(f"data[{key!r}]" for key in list(examples)[:3])
            if all(hasattr(value, "column_names") for value in examples.values())
            else "one dict an example: [{key: torch.as_tensor(data[key][i]) for key in data} for i in range(n)]"
        )
        raise ValueError(
            f"{name} is a {kind} of {', '.join(map(str, examples))}; expected a sequence. Make it {how}"
        )
    if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__"):
        raise ValueError(f"{name} is a {kind}, which can't be read twice; expected a sequence: list(…)")
    if len(examples) == 0:
        raise ValueError(f"{name} is empty; expected at least one example")


def _check_example(first: Any, where: str) -> None:
    kind = type(first).__name__
    if not isinstance(first, dict):
        how = (
            "Make it one: {k: torch.as_tensor(v) for k, v in x.items()}."
            if isinstance(first, Mapping)
            else MAKE
        )
        raise ValueError(f"{where} is a {kind}; expected a dict of tensors. {how}")
    for key, value in first.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{where} is {sorted(first)} with a {type(value).__name__} as {key!r}; expected a dict of tensors. "
                f"{MAKE} A datasets.Dataset of numbers gives tensors after with_format('torch')."
            )
    ids = first.get("input_ids")
    if ids is not None and ids.ndim != 1:
        raise ValueError(
            f"{where}: input_ids have the shape {tuple(ids.shape)}; expected one sequence, (seq,). Is there a batch "
            "dimension in front (return_tensors='pt')? Take it off: x[0]"
        )


@dataclass
class _Labels:
    """What the model and its config say about labels; None where they don't say."""

    classes: int | None  # of a model that answers once a text or once a token
    words: int | None
    problem: str | None
    pad: int | None
    shifted: bool
    per_text: bool
    per_token: bool  # a class for each token, rather than a word
    lengths_differ: bool  # labels may be more or fewer than tokens

    @classmethod
    def of(cls, model: nn.Module, example: Mapping[str, Tensor]) -> "_Labels":
        config, kind = getattr(model, "config", None), type(model).__name__
        row = {key: value.unsqueeze(0) for key, value in example.items()}
        return cls(
            classes=getattr(config, "num_labels", None) if kind.endswith("Classification") else None,
            words=getattr(config, "vocab_size", None),
            problem=getattr(config, "problem_type", None),
            pad=getattr(config, "pad_token_id", None),
            shifted="labels" in row and predicts_next(model, row),
            per_text=kind.endswith("ForSequenceClassification"),
            per_token=kind.endswith("ForTokenClassification"),
            lengths_differ=getattr(config, "is_encoder_decoder", False),
        )

    def check_answer(self, labels: Tensor, where: str) -> None:
        """The label of a whole text: a class, a number, or a yes or no for each class."""
        n, problem = self.classes, self.problem
        if n is None:
            return
        if n == 1 or problem == "regression":
            fits, expected = labels.numel() == n, f"{n} number{'s' if n > 1 else ''}, for a regression"
        elif labels.ndim == 0 and not labels.is_floating_point() and problem != "multi_label_classification":
            _check_range(labels, n, f"{where}: the label", "classes of the model")
            return
        elif problem == "single_label_classification" or labels.ndim == 0:
            fits, expected = False, f"one class, a whole number from 0 to {n - 1}"
            if problem == "multi_label_classification":
                expected = f"{n} numbers 0.0 or 1.0"
        else:
            fits = labels.is_floating_point() and labels.shape == (n,)
            expected = f"{n} numbers 0.0 or 1.0, one a class, as floats"
        if not fits:
            raise ValueError(
                f"{where}: the label is {labels.tolist()} ({labels.dtype}), expected {expected}. (The model has "
                f"num_labels={n} and problem_type={problem!r}; a regression needs num_labels=1.)"
            )

    def check_targets(self, labels: Tensor, ids: Tensor | None, where: str) -> None:
        """A label for each token."""
        if ids is not None and labels.shape != ids.shape and not self.lengths_differ:
            raise ValueError(
                f"{where}: labels have the length {len(labels)}, input_ids {len(ids)}; "
                f"expected one label a token ({IGNORED} where none counts) or a single class"
            )
        highest = self.classes if self.per_token else self.words
        _check_range(labels[labels != IGNORED], highest, f"{where}: a label", "outputs of the model")
        if not (labels[1:] if self.shifted else labels).ne(IGNORED).any():
            raise ValueError(
                f"{where} has no label to learn from: all are {IGNORED}"
                f"{' after the first position, which has no prediction' if self.shifted else ''}"
            )

    def check_padding(self, lengths: set[int], name: str) -> None:
        """A decoder that classifies finds a text's end by its padding."""
        if self.per_text and len(lengths) > 1 and self.pad is not None and self.pad < 0:
            raise ValueError(
                f"the texts of {name} differ in length, and the model's pad_token_id is {self.pad}, which is no token: "
                "it couldn't tell where a text ends. Set model.config.pad_token_id = tokenizer.pad_token_id"
            )


def _check_range(values: Tensor, high: int | None, what: str, of_what: str) -> None:
    if high is None or values.numel() == 0:
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < 0 or largest >= high:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"{what} is {wrong}, expected 0 to {high - 1} (there are {high} {of_what})")
