"""Low-rank methods (chapter 4.4): the change of a weight is made of few values, mostly of thin matrices."""

from pefttutor.lowrank.adalora import AdaLoRA
from pefttutor.lowrank.cola import COLA
from pefttutor.lowrank.delta_lora import DeltaLoRA
from pefttutor.lowrank.dora import DoRA
from pefttutor.lowrank.dylora import DyLoRA
from pefttutor.lowrank.dynamic_dora import DynamicDoRA
from pefttutor.lowrank.increlora import IncreLoRA
from pefttutor.lowrank.loha import LoHa
from pefttutor.lowrank.lokr import LoKr
from pefttutor.lowrank.lora import LoRA
from pefttutor.lowrank.lora_fa import LoRAFA
from pefttutor.lowrank.lora_plus import LoRAPlus
from pefttutor.lowrank.lorahub import LoRAHub
from pefttutor.lowrank.lotr import LoTR
from pefttutor.lowrank.melora import MELoRA
from pefttutor.lowrank.milora import MiLoRA
from pefttutor.lowrank.mora import MoRA
from pefttutor.lowrank.mpo import MPO
from pefttutor.lowrank.pissa import PiSSA
from pefttutor.lowrank.relora import ReLoRA
from pefttutor.lowrank.sltrain import SLTrain
from pefttutor.lowrank.sora import SoRA
from pefttutor.lowrank.vera import VeRA

__all__ = [
    "COLA", "MPO", "AdaLoRA", "DeltaLoRA", "DoRA", "DyLoRA", "DynamicDoRA", "IncreLoRA", "LoHa", "LoKr", "LoRA",
    "LoRAFA", "LoRAHub", "LoRAPlus", "LoTR", "MELoRA", "MiLoRA", "MoRA", "PiSSA", "ReLoRA", "SLTrain", "SoRA", "VeRA",
]  # fmt: skip
