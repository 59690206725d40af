"""Parameters added inside of a model: adapters, prefixes, scaling vectors (chapter 4.2.2)."""
