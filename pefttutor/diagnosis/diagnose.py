"""`diagnose`: did it train? One call, one table: what is attached, what moved, what it changes, what would be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pefttutor.data.stopping import stops
from pefttutor.diagnosis.attachment import attached_row, moved_row, saved_row, schedule_rows
from pefttutor.diagnosis.effect import effects, inputs_of
from pefttutor.diagnosis.model import finite_row, flags_row, frozen_row, head_rows, labels_rows, plain_rows
from pefttutor.diagnosis.table import LOOK, OK, WRONG, Diagnosis, Row
from pefttutor.parts.attachment import attachments

__all__ = ["Diagnosis", "diagnose"]

PROMPTS = 16


def diagnose(
    model: nn.Module,
    examples: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    base: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[Any] = (),
) -> Diagnosis:
    """Did it train? A table of what is attached, what has moved, what it changes, and what else may be wrong.

    >>> from pefttutor import LoRA
    >>> model = LoRA(r=1, target_modules=("0",)).attach(nn.Sequential(nn.Linear(2, 2)))
    >>> diagnose(model)["moved"]                                        # before any training
    moved       wrong        none of 2 tensors has moved from its start
                             → train it: pefttutor.fit(model, …); else look whether the optimizer has these tensors

    examples: what `fit` got, or a batch. The first eight show whether each attachment changes the output; without
        them three tokens of the model's own do, where it reads tokens.
    base: the model before training, such as pefttutor.models.load(name)[0]; then each frozen value is compared.
        Without it, 8 values of each tensor are, as they were noted when the first method was attached.
    tokenizer, rows: rows with a prompt and its answer; the first 16 show whether the model stops (`data.stops`).

    A row says what was checked, "ok", "look", "wrong" or "not checked", what was found, and what to do. The model stays
    as it is.

    Cost: a pass over the parameters, and two forward passes an attachment.
    Raises: ValueError for a model without values, a base that is no model, a tokenizer without rows, or examples that
        the model can't be called with.
    """
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("this model has no weights yet (it is on the meta device): load them first.")
    if base is not None and not isinstance(base, nn.Module):
        raise ValueError(f"base is {base!r}; expected a model: pefttutor.models.load(…)[0]")
    if (tokenizer is None) != (len(rows) == 0):
        raise ValueError(
            "tokenizer and rows go together: give both, to see whether the model stops, or neither."
        )
    inputs = inputs_of(model, examples)
    carried = attachments(model)
    found: list[Row] = []
    if carried is None:
        found += plain_rows(model, base)
    else:
        there = list(carried.by_name.values())
        changes = effects(model, there, inputs, own=examples is None)
        for attachment in there:
            one = [
                attached_row(attachment, there), moved_row(attachment), *schedule_rows(model, attachment),
                *changes[attachment.name], saved_row(model, attachment),
            ]  # fmt: skip
            found += one if len(there) == 1 else [row.of(attachment.name) for row in one]
        found += [flags_row(model, carried), frozen_row(model, carried, base)]
    found += [finite_row(model), *head_rows(model), *labels_rows(inputs)]
    if len(rows):
        found.append(_stops_row(model, tokenizer, rows, examples))
    return Diagnosis(tuple(found))


def _stops_row(model: nn.Module, tokenizer: Any, rows: Sequence[Any], examples: Any) -> Row:
    labelled: list[dict[str, Tensor]] = [] if examples is None or isinstance(examples, Mapping) else examples
    answered = stops(model, tokenizer, [rows[i] for i in range(min(PROMPTS, len(rows)))], examples=labelled)
    verdict = OK if answered.share == 1 and not answered.causes else LOOK if answered.share else WRONG
    return Row("stops", repr(answered).partition("\n")[0], verdict, "; ".join(answered.causes))
