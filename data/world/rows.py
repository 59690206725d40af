"""The text as rows of tokens: shards drawn as they are needed, or ahead by several processes where one can't keep up."""

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import corpus

TOKENIZER = Path(__file__).parents[1] / "models" / "tokenizer.json"


@dataclass(frozen=True)
class Kind:
    """One mixture: the seed of its first shard, how many shards are written ahead, the documents of a shard, and what
    `corpus.marked_documents` takes; `after`: how many shards of each other kind are written before its first."""

    seed: int
    shards: int
    after: int = 0
    documents: int = 20_000
    plain: bool = False
    drills: float = 0.0


# Causal models read `main`, then `late`, in which every second document is a drill; the encoder reads `plain`.
KINDS = {
    "main": Kind(31_000, 160, drills=0.25),
    "late": Kind(32_000, 140, after=50, drills=0.5),
    "plain": Kind(33_000, 250, documents=40_000, plain=True),
}


def draw(
    tokenizer: Tokenizer, kind: str, no: int, documents: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Shard `no` of a kind, or one of fewer documents: flat token ids, and which of them can be inferred from what stands before."""
    k = KINDS[kind]
    return corpus.shard(tokenizer, k.seed + no, documents or k.documents, plain=k.plain, drills=k.drills)


def _write(job: tuple[Path, str, int]) -> int:
    folder, kind, no = job
    path = folder / kind / f"{no}.npz"
    if path.exists():
        return 0
    flat, told = draw(Tokenizer.from_file(str(TOKENIZER)), kind, no)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(temporary := path.with_name(f".{no}.npz"), flat=flat, told=told)
    os.replace(temporary, path)
    return len(flat)


def write_ahead(folder: Path, workers: int) -> int:
    """Write every shard by `workers` processes, those first that are read first; returns the tokens written."""
    jobs = [(k.after + no, (folder, name, no)) for name, k in KINDS.items() for no in range(k.shards)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return sum(pool.imap(_write, [job for _, job in sorted(jobs)]))


class Rows:
    """Rows of `length` tokens and what of them can be inferred, in a seeded order; calling `next` again and again resumes.

    folder: where another process runs `write_ahead`; a shard that isn't there after `patience` seconds is drawn here.
    """

    def __init__(
        self, tokenizer: Tokenizer, kind: str, rows: int, length: int, *, folder: Path | None = None,
        device: str = "cpu", patience: float = 20.0,
    ):  # fmt: skip
        self.tokenizer, self.kind, self.n, self.length = tokenizer, kind, rows, length
        self.folder, self.device, self.patience = folder, device, patience
        self.shard_no, self.at, self.taken = -1, 0, 0
        self.rows = self.told = torch.zeros(0, length)

    def _shard(self) -> tuple[np.ndarray, np.ndarray]:
        if self.folder is not None and self.shard_no < KINDS[self.kind].shards:
            path, until = self.folder / self.kind / f"{self.shard_no}.npz", time.monotonic() + self.patience
            while not path.exists() and time.monotonic() < until:
                time.sleep(0.02)
            if path.exists():
                with np.load(path) as found:
                    return found["flat"], found["told"]
        return draw(self.tokenizer, self.kind, self.shard_no)

    def next(self) -> tuple[Tensor, Tensor]:
        """Token ids and a mask of the inferable, each (rows, length)."""
        while self.at + self.n > len(self.rows):
            self.shard_no, self.at = self.shard_no + 1, 0
            flat, told = self._shard()
            order = np.random.default_rng(self.shard_no).permutation(len(flat) // self.length)
            flat, told = (a[: len(order) * self.length].reshape(-1, self.length)[order] for a in (flat, told))
            self.rows = torch.from_numpy(flat.astype(np.int32)).to(self.device)
            self.told = torch.from_numpy(told).to(self.device)
        chosen = slice(self.at, self.at + self.n)
        self.at, self.taken = self.at + self.n, self.taken + 1
        return self.rows[chosen].long(), self.told[chosen]

    def skip(self, taken: int) -> None:
        """Go on behind the first `taken` calls of `next`."""
        while self.taken < taken:
            self.next()
