"""Stopping `fit` and going on later, bit for bit: what has to be kept, and how it is written.

One safetensors file holds the tensors; its header carries the rest as JSON. One file, because two can't be
replaced at the same moment; no pickle, because opening a file should not be able to run code.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pefttutor.saving.files import write_atomically

FILE_NAME = "fit.safetensors"
FORMAT = "2"
TENSOR = "tensor of this file"  # stands in the JSON with the name of a tensor, where the optimizer has it
SMALL = 1 << 20  # values of a buffer whose copy stays beside it


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the global random generators that dropout draws from.

    >>> rng_state(torch.device("cpu")).keys()
    dict_keys(['cpu'])
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned.

    >>> before, first = rng_state(torch.device("cpu")), torch.rand(3)
    >>> set_rng_state(before, torch.device("cpu"))
    >>> torch.rand(3).equal(first)
    True
    """
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


class Buffers:
    """A model's buffers as they were when last kept: what a step has moved before it broke off can be put back.

    >>> norm = nn.BatchNorm1d(1)
    >>> buffers, _ = Buffers(norm), norm(torch.ones(2, 1))   # a forward in training mode counts its batch
    >>> buffers.put_back()
    >>> norm.num_batches_tracked.item(), norm.running_mean.item()
    (0, 0.0)

    Cost: a copy of the buffers, of large ones (quantized weights) in main memory. Keeping again copies those of floats,
        since BatchNorm changes them past autograd's count, and of the others (places) those that were changed; a GPU
        isn't waited for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[tuple[nn.Module, str], tuple[Tensor, int, Tensor]] = {}
        self.keep()

    def keep(self) -> None:
        """From now on, put back what is there now."""
        now = {(m, key): b for m in self.model.modules() for key, b in m._buffers.items() if b is not None}
        self.kept = {
            place: self.kept[place]
            if self._is_as_kept(place, b)
            else (
                b,
                b._version,
                b.detach().clone() if b.numel() <= SMALL else b.detach().to("cpu", copy=True),
            )
            for place, b in now.items()
        }

    @torch.no_grad()
    def put_back(self) -> None:
        """The same tensors with the same values, also where a new tensor was put in the place of one."""
        for place, (buffer, _, values) in self.kept.items():
            if not self._is_as_kept(place, buffer):
                buffer.copy_(values)
            module, key = place
            module._buffers[key] = buffer

    def _is_as_kept(self, place: tuple[nn.Module, str], buffer: Tensor) -> bool:
        before, version, _ = self.kept.get(place, (None, 0, None))
        return buffer is before and buffer._version == version and not buffer.is_floating_point()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done, so that an update happens as a whole or not at all."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # only the main thread gets signals, and a process may have chosen to ignore them
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def versions(model: nn.Module) -> dict[str, int]:
    """Each parameter's count of in-place changes: shows later which frozen ones were written (ReLoRA merges).

    >>> layer = nn.Linear(1, 1)
    >>> before, _ = versions(layer), nn.init.ones_(layer.weight)
    >>> {name: now - before[name] for name, now in versions(layer).items()}
    {'weight': 1, 'bias': 0}
    """
    return {name: p._version for name, p in model.named_parameters()}


def save_state(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: dict[str, Tensor],
    before: dict[str, int],
    rest: dict[str, Any],
) -> None:
    """Write everything that the next step depends on, to a temporary name first, then renamed.

    >>> from tempfile import TemporaryDirectory
    >>> model = nn.Linear(1, 1)
    >>> with TemporaryDirectory() as folder:
    ...     save_state(folder, model, torch.optim.AdamW(model.parameters()), {}, versions(model), {"done": 3})
    ...     tensors, header = read_state(folder)
    >>> list(tensors), header["rest"]
    (['parameter.bias', 'parameter.weight'], {'done': 3})

    Tensors: parameters that train or were changed since `before`, buffers, the optimizer's, the generators'.
    JSON: whatever else the optimizer's state_dict has, and `rest`.

    Cost: for AdamW 12 bytes a trained float32 parameter.
    Raises: ValueError, before anything is written, for a state_dict that has more than tensors and JSON.
    """
    kept = {n: p for n, p in model.named_parameters() if p.requires_grad or p._version != before.get(n)}
    tensors: dict[str, Tensor] = {f"parameter.{name}": value for name, value in kept.items()}
    tensors |= {f"buffer.{name}": value for name, value in model.named_buffers()}
    tensors |= {f"rng.{name}": value for name, value in rng.items()}
    whole = optimizer.state_dict()
    whole = {**whole, "state": {str(index): values for index, values in whole["state"].items()}}
    header = {"optimizer": _apart(whole, "optimizer", tensors), "rest": rest}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save(plain, metadata={"format": FORMAT, "state": json.dumps(header)})
    write_atomically(folder / FILE_NAME, data)


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of `value`; its tensors go into `tensors`, and their names stand in their places."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, (list, tuple)):
        return [_apart(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _apart(each, f"{name}.{key}", tensors) for key, each in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"the optimizer's state_dict holds {value!r} ({type(value).__name__}) as {name.partition('.')[2]}; expected "
        "tensors, numbers, texts, and lists of these or dicts with texts as keys, since a checkpoint is read without "
        "pickle. Let state_dict() give such values, or train without checkpoint="
    )


def _together(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_apart` took apart."""
    if isinstance(value, list):
        return [_together(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    return {key: _together(each, tensors) for key, each in value.items()}


def read_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON part of a saved state; changes nothing.

    Raises: FileNotFoundError without a state in the folder; ValueError for a damaged or foreign file.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"resume=True, but there is no {FILE_NAME} in {folder}; it is written when a run with "
            f"checkpoint={str(folder)!r} evaluates, ends or is interrupted. Start one with resume=False."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and start with resume=False") from None
    if metadata.get("format") != FORMAT or "state" not in metadata:
        raise ValueError(f"{path} was not written by this version of pefttutor.fit; start with resume=False")
    return tensors, json.loads(metadata["state"])


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], header: dict[str, Any]
) -> dict[str, Tensor]:
    """Copy a read state into the model and the optimizer; returns the generators' state.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> tensors, header = {"parameter.weight": torch.tensor([[7.0]])}, {"optimizer": optimizer.state_dict()}
    >>> _ = restore(model, optimizer, tensors, header)
    >>> model.weight.item()
    7.0

    Raises: ValueError when the saved tensors are not this model's, before anything is changed.
    """
    here: dict[str, Tensor] = {f"parameter.{n}": p for n, p in model.named_parameters()}
    here |= {f"buffer.{n}": b for n, b in model.named_buffers()}
    saved = {name: value for name, value in tensors.items() if name.startswith(("parameter.", "buffer."))}
    trains = {f"parameter.{n}" for n, p in model.named_parameters() if p.requires_grad}
    wrong = sorted(trains - set(saved)) + [
        name for name, value in saved.items() if name not in here or here[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(
            f"the saved state belongs to another model or method: {len(wrong)} tensors differ, first "
            f"{wrong[0].partition('.')[2]!r}. Build the model and attach the method as in the interrupted run."
        )
    whole = _together(header["optimizer"], tensors)
    optimizer.load_state_dict(whole | {"state": {int(i): values for i, values in whole["state"].items()}})
    with torch.no_grad():
        for name, value in saved.items():
            here[name].copy_(value)
    return {name.removeprefix("rng."): value for name, value in tensors.items() if name.startswith("rng.")}
