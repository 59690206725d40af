""".gguf files in a form that loads quickly."""

import functools
import tempfile
from pathlib import Path

import torch

_conversions: dict[tuple[Path, int], tempfile.TemporaryDirectory[str]] = {}  # gone when the process ends


def converted(path: Path) -> str:
    """A .gguf file as a temporary folder of safetensors, so that its slow reader runs once a process, not at each load.

    Cost: half a minute for the first load of a file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    key = (path, path.stat().st_mtime_ns)
    if key not in _conversions:
        folder = tempfile.TemporaryDirectory(prefix="pefttutor-")
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        bar = modeling_gguf_pytorch_utils.tqdm  # no setting of transformers silences this one
        modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
            model.hf_quantizer = None  # its weights are plain float32 now, which transformers doesn't know
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(folder.name)
            AutoTokenizer.from_pretrained(**place).save_pretrained(folder.name)
        finally:
            modeling_gguf_pytorch_utils.tqdm = bar
        _conversions[key] = folder
    return _conversions[key].name
