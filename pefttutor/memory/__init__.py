"""Where the memory goes: `estimate` a training step from a config, `measure` a real one, `compare` the two.

from pefttutor import memory

print(memory.estimate(transformers.LlamaConfig(), pefttutor.LoRA(r=8), weight_dtype="bfloat16"))
"""

from pefttutor.memory.breakdown import GIB, Breakdown, Comparison, compare
from pefttutor.memory.measured import Measured, measure, watch_saved
from pefttutor.memory.serving import estimate_serving
from pefttutor.memory.training import estimate

__all__ = [
    "GIB",
    "Breakdown",
    "Comparison",
    "Measured",
    "compare",
    "estimate",
    "estimate_serving",
    "measure",
    "watch_saved",
]
