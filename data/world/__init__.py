"""The little world: a seeded generator of English text, tasks and one constructed language.

Everything that the embedded models read and every task of the lessons comes from these files:
`lexicon` (words), `facts` (who lives where), `prose`, `reasoning` and `rules` (what pretraining reads),
`domains` and `velan` (what pretraining never sees), `corpus` (the mixture), `pretrain` (the training loop),
`tasks` (the downstream tasks) and `measure` (the table in data/README.md).

Every generator takes a `random.Random` first and draws from nothing else, so a seed fixes the text.
"""
