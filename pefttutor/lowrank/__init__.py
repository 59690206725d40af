"""Low-rank methods (chapter 4.4): the change of a weight is a product of two thin matrices."""

from pefttutor.lowrank.adalora import AdaLoRA
from pefttutor.lowrank.dora import DoRA
from pefttutor.lowrank.lora import LoRA
from pefttutor.lowrank.lora_fa import LoRAFA
from pefttutor.lowrank.lora_plus import LoRAPlus
from pefttutor.lowrank.pissa import PiSSA
from pefttutor.lowrank.vera import VeRA

__all__ = ["AdaLoRA", "DoRA", "LoRA", "LoRAFA", "LoRAPlus", "PiSSA", "VeRA"]
