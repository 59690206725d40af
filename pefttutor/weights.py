"""Weight files: whether an embedded one is whole, and .gguf files in a form that loads quickly."""

import functools
import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path

import torch


def verify(folder: Path) -> None:
    """Compare the files of an embedded model with SHA256SUMS; each file once a process.

    Raises: ValueError that names a missing, truncated or altered file and the commands that restore it.
    """
    restore = f"`git checkout -- data/models/{folder.name}` or `python data/build.py --train {folder.name}`"
    sums = folder.parent / "SHA256SUMS"
    if not sums.is_file():
        raise ValueError(f"{sums} is missing; restore it with `git checkout -- data/models/SHA256SUMS`")
    lines = [line.split(maxsplit=1) for line in sums.read_text().splitlines() if line.strip()]
    listed = {name: digest for digest, name in lines if Path(name).parts[0] == folder.name}
    if not listed:
        raise ValueError(f"{sums} lists no file of {folder.name}; restore it with {restore}")
    for name, digest in listed.items():
        path = folder.parent / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; restore it with {restore}")
        size = path.stat().st_size
        found = _sha256(path, size, path.stat().st_mtime_ns)
        if found != digest:
            raise ValueError(
                f"{path} is truncated or altered: its {size:,} bytes have sha256 {found[:12]}…, expected "
                f"{digest[:12]}…; restore it with {restore}"
            )


@lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_conversions: dict[tuple[Path, int], tempfile.TemporaryDirectory[str]] = {}  # gone when the process ends


def converted(path: Path) -> str:
    """A .gguf file as a temporary folder of safetensors: its slow reader runs once a process, not at each load."""
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
