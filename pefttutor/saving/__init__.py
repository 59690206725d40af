"""Adapters as files: `save` what a method has learned, `load` it onto its base again, and files that are whole.

Formats of other libraries are read and written here too. Whatever is read is checked before a model changes.
"""
