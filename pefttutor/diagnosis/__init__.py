"""Diagnosis: did it train? What is attached, what moved, what it changes, and what would be saved, in one table.

It looks at a model and leaves it as it is. Rows are about one attachment or about the whole model, never about a
method: what a method is made of is asked of its parts.
"""

from pefttutor.diagnosis.diagnose import diagnose
from pefttutor.diagnosis.table import Diagnosis

__all__ = ["Diagnosis", "diagnose"]
