"""Hybrid methods: several kinds of change, trained together as one method, each made of the parts of its kind."""

from pefttutor.hybrid.mam import MAM
from pefttutor.hybrid.unipelt import UniPELT

__all__ = ["MAM", "UniPELT"]
