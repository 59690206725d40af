"""Where models come from: the embedded family, an installed package, a folder or the hub (`load`), and whether
their files are whole. What finds, reads or checks a model's files belongs here; what changes a model doesn't."""

from pefttutor.models.loading import HEADS, load, names

__all__ = ["HEADS", "load", "names"]
