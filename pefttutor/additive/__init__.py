"""Additive methods (chapter 4.2): new parameters on the input, inside of the model, or on its output."""

from pefttutor.additive.input.invertible import InvertibleAdapter
from pefttutor.additive.input.prompt import PromptTuning
from pefttutor.additive.input.ptuning import PTuning
from pefttutor.additive.inside.adamix import AdaMix
from pefttutor.additive.inside.adapter import Adapter
from pefttutor.additive.inside.adapter_bias import AdapterBias
from pefttutor.additive.inside.ciat import CIAT
from pefttutor.additive.inside.compacter import Compacter
from pefttutor.additive.inside.fusion import AdapterFusion
from pefttutor.additive.inside.ia3 import IA3
from pefttutor.additive.inside.llama_adapter import LLaMAAdapter
from pefttutor.additive.inside.lst import LST
from pefttutor.additive.inside.pasta import PASTA
from pefttutor.additive.inside.prefix import PrefixTuning
from pefttutor.additive.inside.sparse_adapter import SparseAdapter
from pefttutor.additive.inside.ssf import SSF
from pefttutor.additive.output.proxy import ProxyTuning

__all__ = [
    "CIAT",
    "IA3",
    "LST",
    "PASTA",
    "SSF",
    "AdaMix",
    "Adapter",
    "AdapterBias",
    "AdapterFusion",
    "Compacter",
    "InvertibleAdapter",
    "LLaMAAdapter",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "ProxyTuning",
    "SparseAdapter",
]
