"""Some cells of a lesson with no more of the rest than they need: what runs elsewhere anyway needn't run again."""

from __future__ import annotations

import ast
import symtable
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

__all__ = ["needed", "real_section"]


def real_section(cells: Sequence[Any]) -> list[int]:
    """Where a lesson's section on real models has its code: from the heading before it to the next of that rank.

    Shapes: → the places of code cells, none where no cell asks for PEFTTUTOR_REAL.
    """
    asks = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and "PEFTTUTOR_REAL" in cell.source]
    heads = [
        i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and cell.source.startswith("## ")
    ]
    if not asks:
        return []
    first = max([i for i in heads if i < asks[0]], default=0)
    end = min([i for i in heads if i > asks[-1]], default=len(cells))
    return [i for i in range(first, end) if cells[i].cell_type == "code"]


def needed(sources: Sequence[str], wanted: Collection[int]) -> list[int]:
    """The wanted pieces of code, and for each name that one reads the last piece before it that binds the name.

    Whatever else changes what a name stands for (a method that is called, an entry that is set) isn't seen.

    >>> needed(["import math", "r = 2", "print(r)", "def area(): return math.pi * r**2", "area()"], wanted=[4])
    [0, 1, 3, 4]
    """
    names = [_names(source) for source in sources]
    kept, left = set(wanted), list(wanted)
    while left:
        place = left.pop()
        for name in names[place][1]:
            source = max((i for i in range(place) if name in names[i][0]), default=None)
            if source is not None and source not in kept:
                kept.add(source)
                left.append(source)
    return sorted(kept)


def _names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell binds, and those that it takes from cells before it."""
    bound: set[str] = set()
    read: set[str] = set()
    later: set[str] = set()  # by functions, which read when they are called
    for statement in _in_order(ast.parse(TransformerManager().transform_cell(source)).body):
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        symbols = table.get_symbols()
        here = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
        reads = {s.get_name() for s in symbols if s.is_referenced()}
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            reads.add(statement.target.id)  # Python's table doesn't call a += 1 reading
        read |= reads - bound
        later |= _global_reads(table)
        bound |= here
    return bound, read | (later - bound)


def _in_order(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Simple statements, and what heads the others as assignments and expressions, each before what is in it."""
    for statement in body:
        match statement:
            case ast.For(target=target, iter=values):
                yield ast.Assign([target], values, lineno=1)
            case ast.With(items=items):
                for item in items:
                    expression = item.context_expr
                    into = item.optional_vars
                    yield ast.Assign([into], expression, lineno=1) if into else ast.Expr(expression)
            case ast.If(test=test) | ast.While(test=test):
                yield ast.Expr(test)
            case ast.Try(handlers=handlers):
                yield from _in_order(statement.body)
                for handler in handlers:
                    yield from _in_order(handler.body)
                yield from _in_order([*statement.orelse, *statement.finalbody])
                continue
            case _:
                yield statement
                continue
        yield from _in_order([*statement.body, *getattr(statement, "orelse", [])])


def _global_reads(table: symtable.SymbolTable) -> set[str]:
    found: set[str] = set()
    for inner in table.get_children():
        found |= {s.get_name() for s in inner.get_symbols() if s.is_global() and s.is_referenced()}
        found |= _global_reads(inner)
    return found
