"""pefttutor: parameter-efficient fine-tuning methods, each in one small file, and what a lesson needs.

    import pefttutor

    method = pefttutor.LoRA(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
    model = method.attach(model)                 # freezes the base, adds what trains
    pefttutor.fit(model, batches, steps=200)
    pefttutor.save(model, "my-adapter")
    pefttutor.detach(model)                      # the base again, bit for bit

Everything is loaded when it is first asked for, so `import pefttutor` alone doesn't even import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Idle OpenMP threads that spin take the cores from those that work; threads that sleep are woken for each operation,
# in some 50 µs. So they spin for a few µs, then sleep. A step of LoRA on campus-nano, two threads on two cores, alone
# and beside another such training: 23 and 60 ms; asleep at once 45 and 37; spinning on 26 and 3,600. It has an effect
# only before torch is imported; whoever has set it keeps their choice. GOMP_ is read by GNU's OpenMP, torch's on Linux.
if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE").upper() == "PASSIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from pefttutor.additive import *  # noqa: F403
    from pefttutor.catalog import methods as methods
    from pefttutor.diagnosis import diagnose as diagnose
    from pefttutor.hybrid import *  # noqa: F403
    from pefttutor.lowrank import *  # noqa: F403
    from pefttutor.method import adapted as adapted
    from pefttutor.method import attached as attached
    from pefttutor.method import detach as detach
    from pefttutor.method import freeze as freeze
    from pefttutor.method import merge as merge
    from pefttutor.method import switch as switch
    from pefttutor.method import trainable as trainable
    from pefttutor.method import unmerge as unmerge
    from pefttutor.parts.cached_prefix import CachedPrefix as CachedPrefix
    from pefttutor.parts.information import fisher_information as fisher_information
    from pefttutor.saving.adapters import load as load
    from pefttutor.saving.adapters import save as save
    from pefttutor.saving.as_lora import as_lora as as_lora
    from pefttutor.saving.peft_files import from_peft as from_peft
    from pefttutor.saving.peft_files import to_peft as to_peft
    from pefttutor.selective import *  # noqa: F403
    from pefttutor.train import History as History
    from pefttutor.train import callback as callback
    from pefttutor.train import evaluate as evaluate
    from pefttutor.train import fit as fit
    from pefttutor.train import fit_head as fit_head

_FUNCTIONS = {
    **dict.fromkeys(
        ("adapted", "attached", "detach", "freeze", "merge", "switch", "trainable", "unmerge"), "method"
    ),
    "CachedPrefix": "parts.cached_prefix",
    "as_lora": "saving.as_lora",
    "fisher_information": "parts.information",
    "from_peft": "saving.peft_files",
    "load": "saving.adapters",
    "diagnose": "diagnosis",
    "save": "saving.adapters",
    "to_peft": "saving.peft_files",
    "History": "train",
    "callback": "train",
    "evaluate": "train",
    "fit": "train",
    "fit_head": "train",
    "methods": "catalog",
}
_MODULES = {
    name: name
    for name in ("bench", "check", "data", "kernels", "memory", "method", "models", "train", "widgets")
} | {"losses": "train.losses"}


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562)."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    else:
        from pefttutor.catalog import methods

        value = methods().get(name)
        if value is None:
            raise AttributeError(f"pefttutor has no {name!r}; it has {', '.join(__dir__())}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from pefttutor.catalog import methods

    return sorted([*_FUNCTIONS, *_MODULES, *methods()])
