"""Run, store and lint the lessons: `python -m pefttutor.authoring store|run|lint NB…`.

A lesson is committed as it ran: in a fresh kernel, in one fixed environment, in one canonical form. `store` makes that
form, `lint` reads it as a document, and `pytest --nbval` runs it again and compares. Nobody stores a hand-run notebook.

    environment.py   the environment that kernels get, here and under pytest
    document.py      a notebook as the other files read it, and its canonical text
    store.py         run in a fresh kernel, clean, write
    form.py          lint: is this what `store` writes, and can it be compared strictly?
    lesson.py        lint: is it a lesson? anatomy, links, budget
    practice.py      lint: exercises, hints, solutions, self-check questions
"""
