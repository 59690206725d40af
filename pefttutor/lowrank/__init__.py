"""Low-rank methods (chapter 4.4): the change of a weight is a product of two thin matrices."""

from pefttutor.lowrank.adalora import AdaLoRA
from pefttutor.lowrank.dora import DoRA
from pefttutor.lowrank.lora import LoRA

__all__ = ["AdaLoRA", "DoRA", "LoRA"]
