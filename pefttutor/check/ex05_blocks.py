"""Notebook 05, all adapters of a model: the right answers, and those that learners write instead, with their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Block = Callable[[Tensor, Any], Tensor]
PER_BLOCK = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}

# ---- the reference solutions


def adapter_count(width: int, m: int, blocks: int, placement: str, norm_values: int) -> int:
    """blocks · adapters a block · (2md + m + d) + norm_values."""
    return blocks * PER_BLOCK[placement] * (2 * m * width + m + width) + norm_values


def for_all_tasks(
    x: Tensor, blocks: Sequence[Block], tasks: Mapping[str, Sequence[Any]], skip: int
) -> dict[str, Tensor]:
    """The first `skip` blocks run once and without adapters, the others once for each task with its own."""
    for block in blocks[:skip]:
        x = block(x, None)
    results = {}
    for name, adapters in tasks.items():
        h = x
        for block, adapter in zip(blocks[skip:], adapters[skip:], strict=True):
            h = block(h, adapter)
        results[name] = h
    return results


# ---- what learners write instead


def _count(
    each: Callable[[int, int], int] = lambda m, d: 2 * m * d + m + d,
    per_block: Mapping[str, int] = PER_BLOCK,
    total: Callable[[int, int, int], int] = lambda blocks, inside, norms: blocks * inside + norms,
) -> Callable[..., int]:
    return lambda width, m, blocks, placement, norm_values: total(
        blocks, per_block[placement] * each(m, width), norm_values
    )


COUNT_MISTAKES = {
    "the biases are forgotten": _count(lambda m, d: 2 * m * d),
    "the bias of d values, b_u, is forgotten": _count(lambda m, d: 2 * m * d + m),
    "the bias of m values, b_d, is forgotten": _count(lambda m, d: 2 * m * d + d),
    "both biases are counted with d values; b_d has m": _count(lambda m, d: 2 * m * d + 2 * d),
    "one matrix is counted; there are two": _count(lambda m, d: m * d + m + d),
    "Houlsby's blocks have two adapters": _count(per_block=PER_BLOCK | {"houlsby": 1}),
    "Pfeiffer's blocks have one adapter": _count(per_block=PER_BLOCK | {"pfeiffer": 2}),
    "a parallel adapter stands beside the feed-forward alone: one a block": _count(
        per_block=PER_BLOCK | {"parallel": 2}
    ),
    "this is one block; the model has several": _count(total=lambda blocks, inside, norms: inside + norms),
    "the norms are forgotten": _count(total=lambda blocks, inside, norms: blocks * inside),
    "norm_values is counted in every block; it holds those of the whole model": _count(
        total=lambda blocks, inside, norms: blocks * (inside + norms)
    ),
    "a number with a fraction; a count is whole": lambda **inputs: float(adapter_count(**inputs)),
}


def _drop(
    *,
    first: Callable[[int, int], int] = lambda skip, n: skip,
    given: Callable[[int, int, Sequence[Any]], Any] = lambda i, skip, adapters: adapters[i],
    shared: bool = True,
    leaves_out: bool = False,
    leaks: bool = False,
) -> Callable[..., dict[str, Tensor]]:
    """first: the first block that has adapters. given: which adapter a later block gets."""

    def wrong_drop(
        x: Tensor, blocks: Sequence[Block], tasks: Mapping[str, Sequence[Any]], skip: int
    ) -> dict[str, Tensor]:
        begin, results = first(skip, len(blocks)), {}

        def below(h: Tensor) -> Tensor:
            for block in [] if leaves_out else blocks[:begin]:
                h = block(h, None)
            return h

        common = below(x) if shared else x
        for name, adapters in tasks.items():
            h = common if shared else below(x)
            for i in range(begin, len(blocks)):
                h = blocks[i](h, given(i, skip, adapters))
            results[name] = h
            common = h if leaks else common
        return results

    return wrong_drop


def _dropped_last(
    x: Tensor, blocks: Sequence[Block], tasks: Mapping[str, Sequence[Any]], skip: int
) -> dict[str, Tensor]:
    kept = len(blocks) - skip
    return _drop(first=lambda *_: 0, given=lambda i, _, adapters: adapters[i] if i < kept else None)(
        x, blocks, tasks, skip
    )


def _of_one_task(
    x: Tensor, blocks: Sequence[Block], tasks: Mapping[str, Sequence[Any]], skip: int
) -> dict[str, Tensor]:
    one = next(iter(tasks.values()))
    return for_all_tasks(x, blocks, dict.fromkeys(tasks, one), skip)


DROP_MISTAKES: dict[str, Callable[..., Any]] = {
    "the lower blocks run once for each task; what they give is the same for all": _drop(shared=False),
    "nothing is skipped: the lower adapters run, too": _drop(first=lambda skip, n: 0),
    "one block too many is skipped": _drop(first=lambda skip, n: skip + 1),
    "one block too few is skipped": _drop(first=lambda skip, n: skip - 1),
    "the last adapters are left out; AdapterDrop leaves out the first": _dropped_last,
    "whole blocks are left out; only their adapters go": _drop(leaves_out=True),
    "no block has its adapter any more": _drop(given=lambda i, skip, adapters: None),
    "the later blocks get the first blocks' adapters": _drop(
        given=lambda i, skip, adapters: adapters[i - skip]
    ),
    "every later block gets the same adapter": _drop(given=lambda i, skip, adapters: adapters[skip]),
    "a task goes on where the one before ended": _drop(leaks=True),
    "every task gets the first task's adapters": _of_one_task,
    "the lower blocks run with the first task's adapters": lambda x, blocks, tasks, skip: {
        name: for_all_tasks(
            for_all_tasks(x, blocks[:skip], {"": next(iter(tasks.values()))[:skip]}, 0)[""],
            blocks[skip:],
            {name: adapters[skip:]},
            0,
        )[name]
        for name, adapters in tasks.items()
    },
}
