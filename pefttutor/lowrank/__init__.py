"""Low-rank methods (chapter 4.4): the change of a weight is made of few values, mostly of thin matrices."""

from pefttutor.lowrank.adalora import AdaLoRA
from pefttutor.lowrank.dora import DoRA
from pefttutor.lowrank.dylora import DyLoRA
from pefttutor.lowrank.loha import LoHa
from pefttutor.lowrank.lokr import LoKr
from pefttutor.lowrank.lora import LoRA
from pefttutor.lowrank.lora_fa import LoRAFA
from pefttutor.lowrank.lora_plus import LoRAPlus
from pefttutor.lowrank.melora import MELoRA
from pefttutor.lowrank.milora import MiLoRA
from pefttutor.lowrank.mora import MoRA
from pefttutor.lowrank.pissa import PiSSA
from pefttutor.lowrank.sora import SoRA
from pefttutor.lowrank.vera import VeRA

__all__ = [
    "AdaLoRA", "DoRA", "DyLoRA", "LoHa", "LoKr", "LoRA", "LoRAFA", "LoRAPlus", "MELoRA", "MiLoRA", "MoRA", "PiSSA",
    "SoRA", "VeRA",
]  # fmt: skip
