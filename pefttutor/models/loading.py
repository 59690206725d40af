"""`load`: a model and its tokenizer from the embedded family, an installed package, a folder or the hub."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from pefttutor.models.carriers import MODELS, closest, embedded_names, not_found, root
from pefttutor.models.gguf import converted
from pefttutor.models.integrity import verify

HEADS = ("lm", "classification", "tagging", "none")
NEW_HEAD_SEED = 0  # a drawn head is the same in every process, whatever was drawn before


def names() -> list[str]:
    """The names of the embedded models.

    >>> "campus-small" in names()
    True
    """
    return embedded_names("models")


def load(
    name_or_path: str | Path,
    *,
    head: str = "lm",
    num_labels: int | None = None,
    labels: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """Load a model, in eval mode, and its tokenizer; prints nothing and leaves the random generators alone.

        model, tokenizer = load("campus-small", head="classification", labels=["bad", "good"])

    >>> load("campus-small", head="poem")
    Traceback (most recent call last):
    ValueError: head='poem', expected one of lm, classification, tagging, none

    name_or_path: an embedded model (`names()`), "smollm2-135m-instruct" or "all-minilm-l6-v2" when the package
        that carries it is installed, the path of a folder or .gguf file, or the id of a model on the hub.
    head: "lm" (predicts tokens), "classification" (one of num_labels classes a text), "tagging" (one a token) or
        "none" (hidden states only). What the files don't hold is drawn from N(0, initializer_range) with a fixed
        seed; biases are 0.
    num_labels: of the head; 1 is a regression, whose labels are numbers. labels: the names of the classes; then
        num_labels may be left out.

    Cost: a .gguf is converted once a process, into a temporary folder; that takes half a minute.
    Raises: FileNotFoundError, with every way to get one, when there is no such model; ValueError for a damaged
        embedded file, a head that doesn't exist, or labels that don't fit.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r}, expected one of {', '.join(HEADS)}")
    settings = _label_settings(head, num_labels, labels)
    source = _find(str(name_or_path))
    with _quiet(), torch.random.fork_rng(devices=[]):
        if source.endswith(".gguf"):
            source = converted(Path(source))
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(source, **settings)
            tokenizer = AutoTokenizer.from_pretrained(source)
            model, report = _auto_class(head, config).from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True
            )
        except OSError as error:
            why = str(error).splitlines()[0]
            raise not_found(str(name_or_path), "models", MODELS, f" ({why})") from error
        except SafetensorError as error:
            raise ValueError(f"the weights of {str(name_or_path)!r} are damaged: {error}") from error
    _draw_missing(model, report["missing_keys"], head, str(name_or_path))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # a Llama classifier finds the last word by it
    return model.eval(), tokenizer


def _label_settings(head: str, num_labels: int | None, labels: list[str] | None) -> dict[str, Any]:
    count = num_labels if labels is None else len(labels)
    if head in ("lm", "none"):
        if count is not None:
            raise ValueError(
                f"head={head!r} has no classes; num_labels and labels go with head='classification'"
            )
        return {}
    if count is None:
        raise ValueError(f"head={head!r} needs num_labels=, or labels= with the names of the classes")
    if num_labels not in (None, count):
        raise ValueError(
            f"num_labels={num_labels} and labels={labels}: expected the same number, or labels= alone"
        )
    regression = head == "classification" and labels is None and count == 1
    if count < 2 and not regression:
        given = f"num_labels={num_labels}" if labels is None else f"{labels=}"
        raise ValueError(
            f"head={head!r} has {count} label{'s' * (count != 1)} ({given}), expected at least 2"
            + (", or num_labels=1 for a regression" if head == "classification" else "")
        )
    words = labels or [f"LABEL_{i}" for i in range(count)]
    return {
        "num_labels": count,
        "id2label": dict(enumerate(words)),
        "label2id": {w: i for i, w in enumerate(words)},
        **({"problem_type": "regression"} if regression else {}),
    }


def _find(name: str) -> str:
    """The folder, .gguf file or hub id that a name stands for."""
    if name in names():
        folder = root() / "models" / name
        verify(folder)
        return str(folder)
    path = MODELS[name].find() if name in MODELS else Path(name).expanduser()
    if path is not None and path.suffix == ".gguf" and path.is_file():
        if find_spec("gguf") is None:
            raise not_found(
                name, "models", MODELS, ": its file is here, but reading it needs `pip install gguf`"
            )
        return str(path)
    if path is not None and path.is_dir():
        if not (path / "config.json").is_file():
            raise not_found(name, "models", MODELS, f": the folder {path} has no config.json")
        return str(path)
    if name in MODELS or Path(name).is_absolute() or name.startswith("."):
        raise not_found(name, "models", MODELS)
    if "/" not in name and closest(name, names()):
        raise not_found(name, "models", MODELS)  # a slip of the pen should not cost a trip to the hub
    return name


def _auto_class(head: str, config: Any) -> Any:
    import transformers as hf

    written = (config.architectures or [""])[0]
    if head == "lm":
        if config.is_encoder_decoder:
            return hf.AutoModelForSeq2SeqLM
        masked = written.endswith("MaskedLM") or type(config) not in hf.MODEL_FOR_CAUSAL_LM_MAPPING
        return hf.AutoModelForMaskedLM if masked else hf.AutoModelForCausalLM
    return {
        "classification": hf.AutoModelForSequenceClassification,
        "tagging": hf.AutoModelForTokenClassification,
        "none": hf.AutoModel,
    }[head]


@torch.no_grad()
def _draw_missing(model: nn.Module, missing: set[str], head: str, name: str) -> None:
    """Draw what the files don't hold, in the order of the model, so that the same seed gives the same head."""
    if missing and head == "lm":
        raise ValueError(
            f"{name!r} has no language-model head ({', '.join(sorted(missing)[:3])} …); "
            "use head='classification', 'tagging' or 'none'"
        )
    generator = torch.Generator().manual_seed(NEW_HEAD_SEED)
    std = getattr(model.config, "initializer_range", 0.02)
    for key, parameter in model.named_parameters():
        if key in missing and parameter.ndim > 1:
            drawn = torch.empty(parameter.shape).normal_(std=std, generator=generator)
            parameter.copy_(drawn)
        elif key in missing and key.endswith("bias"):
            parameter.zero_()
    # For `pefttutor.diagnose`: what is still as drawn was never trained.
    vars(model)["_drawn"] = {key: p.clone() for key, p in model.named_parameters() if key in missing}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence for transformers' warnings and bars: stored notebooks compare what is printed."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
