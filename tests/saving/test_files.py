"""An interrupted write leaves the former file; a finished one leaves nothing else."""

from __future__ import annotations

import os

import pytest

from pefttutor.saving.files import write_atomically


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x00\xff", b"\x00\xff"),
        ("Ωmega\n", "Ωmega\n".encode()),
        (lambda path: path.write_bytes(b"by hand"), b"by hand"),
    ],
)
def test_writes_bytes_text_or_what_a_function_writes(tmp_path, content, expected):
    path = tmp_path / "new" / "folder" / "file.bin"
    assert write_atomically(str(path), content) == path
    assert path.read_bytes() == expected
    assert os.listdir(path.parent) == ["file.bin"]


def test_replaces_a_longer_file_wholly(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("something much longer")
    write_atomically(path, "short")
    assert path.read_text() == "short"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interruption_leaves_the_former_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("former")

    def half(temporary):
        temporary.write_text("ha")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, half)
    assert path.read_text() == "former"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("former")

    def look(temporary):
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "former"

    write_atomically(path, look)
    assert path.read_text() == "new"


def test_a_new_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
