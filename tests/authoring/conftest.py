"""A data folder of one's own."""

import pytest


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A data folder with a model, a task, and an empty folder for lesson 99."""
    monkeypatch.setenv("PEFTTUTOR_DATA", str(tmp_path))
    for folder in ("models/m", "tasks/t", "lessons/99"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models/m/model.safetensors").write_bytes(b"weights")
    (tmp_path / "tasks/t/task.json").write_text('{"fingerprint": "f"}')
    return tmp_path
