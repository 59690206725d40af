"""Write files so that an interruption leaves either the old file or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]) -> Path:
    """Write `content` to `path` through a temporary file in the same folder, then rename it into place.

    `content` is what to write (text becomes UTF-8), or a function that writes to the path it is given; that
    path has the same suffix, because some writers choose their format by it. Missing folders are made.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_atomically(Path(folder, "new", "notes.txt"), "α = 16").read_text(encoding="utf-8")
    'α = 16'

    Raises: whatever writing raises; then the temporary file is gone and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        # It must be on disk before the name points to it, or a power cut leaves it empty.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
