"""What a saved state holds, and how it is read."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pefttutor.kernels.sparse_adamw import SparseAdamW, SparseSGD
from pefttutor.train import checkpoint as resume
from pefttutor.train import fit
from tests.tiny import language_examples, llama, weights


def partly_frozen() -> Any:
    model = llama().requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.requires_grad_(True)
    return model


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / resume.FILE_NAME, framework="pt") as file:
        return set(file.keys())


def test_only_what_trains_is_kept(tmp_path: Path) -> None:
    fit(partly_frozen(), language_examples(), steps=2, checkpoint=tmp_path)
    kept = {name.removeprefix("parameter.") for name in names_in(tmp_path) if name.startswith("parameter.")}
    assert kept == {f"model.layers.1.self_attn.q_proj.{end}" for end in ("weight", "bias")}


def test_frozen_weights_and_buffers_that_a_method_writes_are_kept_too(tmp_path: Path) -> None:
    class Merge:  # as ReLoRA does now and then
        def after_step(self, model: Any, step: int) -> None:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(0.01)
            model.counter += 1

        def after_backward(self, model: Any, step: int) -> None:
            if step == stop_at:
                raise KeyboardInterrupt

    def run(**settings: Any) -> Any:
        model = partly_frozen()
        model.register_buffer("counter", torch.zeros(()))
        fit(model, language_examples(), method=Merge(), steps=6, **settings)
        return model

    stop_at = -1
    expected = run()
    stop_at = 3
    run(checkpoint=tmp_path)
    stop_at = 5  # a second interruption must still keep what the first run changed
    run(checkpoint=tmp_path, resume=True)
    stop_at = -1
    model = run(checkpoint=tmp_path, resume=True)
    assert model.counter == expected.counter == 6
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(model).items())


def test_the_rest_is_json_and_nothing_is_pickled(tmp_path: Path) -> None:
    fit(llama(), language_examples(), steps=2, checkpoint=tmp_path)
    tensors, header = resume.read_state(tmp_path)
    assert header["rest"]["history"]["steps"] == [1, 2]
    assert header["optimizer"]["param_groups"][0]["weight_decay"] == 0.01
    assert tensors["optimizer.state.0.step"] == 2
    with safe_open(tmp_path / resume.FILE_NAME, framework="pt") as file:
        assert json.loads(file.metadata()["state"]) == header
    assert "pickle" not in Path(resume.__file__).read_text().split('"""')[2]


def test_a_damaged_file_a_foreign_file_and_another_model(tmp_path: Path) -> None:
    data: Any = language_examples()
    fit(llama(), data, steps=2, checkpoint=tmp_path)
    path = tmp_path / resume.FILE_NAME
    whole = path.read_bytes()
    other = llama(num_hidden_layers=1)
    before = weights(other)
    with pytest.raises(ValueError, match=r"belongs to another model or method: .*'model.layers.1"):
        fit(other, data, steps=2, checkpoint=tmp_path, resume=True)
    wider = llama(intermediate_size=32)
    with pytest.raises(ValueError, match=r"another model or method: 10 tensors differ"):
        fit(wider, data, steps=2, checkpoint=tmp_path, resume=True)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"fit.safetensors is damaged"):
        fit(other, data, steps=2, checkpoint=tmp_path, resume=True)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"was not written by this version"):
        fit(other, data, steps=2, checkpoint=tmp_path, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())


def test_a_failed_save_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = language_examples()
    fit(llama(), data, steps=2, checkpoint=tmp_path)
    before = (tmp_path / resume.FILE_NAME).read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        fit(llama(), data, steps=3, checkpoint=tmp_path)
    assert (tmp_path / resume.FILE_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [resume.FILE_NAME]


class Remembering(torch.optim.SGD):
    """Keeps lists, numbers and a last update beside what torch keeps, and moves by all of them."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=torch.tensor(lr), momentum=0.9, foreach=False)
        self.seen: dict[str, Any] = {"steps": 0, "names": ["a", None], "last": []}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        super().step()
        self.seen["steps"] += 1
        now = self.param_groups[0]["params"]
        with torch.no_grad():
            for p, last in zip(now, self.seen["last"], strict=False):
                p.add_(last, alpha=0.1 / self.seen["steps"])
        self.seen["last"] = [p.detach() - old for p, old in zip(now, before, strict=True)]
        self.state[now[0]]["norms"] = [self.seen["last"][0].norm(), 1.5]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seen = state_dict["seen"]
        assert len(self.state_dict()["state"][0]["norms"]) == 2


def sparse(make: Any, **settings: Any) -> Any:
    """An optimizer on every third entry of each tensor."""
    return lambda parameters, lr: make(
        [(p, torch.arange(0, p.numel(), 3)) for p in parameters], lr, **settings
    )


@pytest.mark.parametrize(
    "make",
    [torch.optim.NAdam, sparse(SparseAdamW), sparse(SparseSGD, momentum=0.9), Remembering],
    ids=["NAdam", "SparseAdamW", "SparseSGD", "Remembering"],
)
def test_optimizer_state_of_any_kind_survives(tmp_path: Path, make: Any) -> None:
    class Own:
        def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
            return make(model.parameters(), lr=lr)

        def after_backward(self, model: nn.Module, step: int) -> None:
            if step == self.stop:
                raise KeyboardInterrupt

        stop = -1

    data, method = language_examples(), Own()
    expected = llama()
    fit(expected, data, method=method, steps=5)
    method.stop = 2
    fit(llama(), data, method=method, steps=5, checkpoint=tmp_path)
    method.stop = -1
    model = llama()
    fit(model, data, method=method, steps=5, checkpoint=tmp_path, resume=True)
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("kept", [{1, 2}, {3: "a"}, [torch.float32]])
def test_optimizer_state_that_is_neither_tensors_nor_json_is_named(tmp_path: Path, kept: Any) -> None:
    model = nn.Linear(1, 1)
    optimizer = Remembering(model.parameters(), lr=0.1)
    optimizer.seen["own"] = kept
    with pytest.raises(
        ValueError, match=r"the optimizer's state_dict holds .* as seen\.own.*expected tensors"
    ):
        resume.save_state(tmp_path, model, optimizer, {}, {}, {})
    assert not list(tmp_path.iterdir())


def test_ctrl_c_waits_for_the_end_of_an_update_and_an_error_in_it_goes_first() -> None:
    done = []

    def update() -> None:
        with resume.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    def broken_update() -> None:
        with resume.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt):
        update()
    assert done == [True]
    with pytest.raises(ZeroDivisionError):
        broken_update()
