"""Selection methods (chapter 4.3): train some of the model's own parameters, chosen by a rule or from data."""

from pefttutor.selective.auto_freeze import AutoFreeze
from pefttutor.selective.bitfit import BitFit
from pefttutor.selective.child import ChildTuningD, ChildTuningF
from pefttutor.selective.diff_pruning import DiffPruning
from pefttutor.selective.fish import FishMask
from pefttutor.selective.fish_dip import FishDip
from pefttutor.selective.layers import LastLayers
from pefttutor.selective.lt_sft import LTSFT
from pefttutor.selective.masking import Masking
from pefttutor.selective.norms import LayerNormTuning
from pefttutor.selective.pafi import PaFi
from pefttutor.selective.probe import LinearProbe
from pefttutor.selective.second_order import SecondOrderMask
from pefttutor.selective.sparse import SparseFineTuning

__all__ = [
    "LTSFT",
    "AutoFreeze",
    "BitFit",
    "ChildTuningD",
    "ChildTuningF",
    "DiffPruning",
    "FishDip",
    "FishMask",
    "LastLayers",
    "LayerNormTuning",
    "LinearProbe",
    "Masking",
    "PaFi",
    "SecondOrderMask",
    "SparseFineTuning",
]
