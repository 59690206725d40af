"""Whether an embedded model's files are whole."""

import hashlib
from functools import lru_cache
from pathlib import Path


def verify(folder: Path) -> None:
    """Compare the files of an embedded model with SHA256SUMS; each file is read once a process.

    >>> verify(Path("nowhere") / "campus-small")
    Traceback (most recent call last):
    ValueError: nowhere/SHA256SUMS is missing; restore it with `git checkout -- data/models/SHA256SUMS`

    Raises: ValueError that names a missing, truncated or altered file and the command that restores it.
    """
    restore = f"`git checkout -- data/models/{folder.name}`"
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
        computed = _sha256(path, size, path.stat().st_mtime_ns)
        if computed != digest:
            raise ValueError(
                f"{path} is truncated or altered: its {size:,} bytes have sha256 {computed[:12]}…, expected "
                f"{digest[:12]}…; restore it with {restore}"
            )


@lru_cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
