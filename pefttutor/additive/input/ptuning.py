"""P-tuning: virtual tokens that a small network makes, so that they know of each other while they are trained.

P = head(LSTM(table))        [P; E(x)]        table, LSTM and head train
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.network import Itself, Network, settle
from pefttutor.parts.placeholders import put_in_places
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole
from pefttutor.parts.streams import token_table
from pefttutor.parts.virtual_tokens import put_before

__all__ = ["PTuning"]

BEFORE = "PTuning stands before a text's"
KEY = "ptuning"


@dataclass(frozen=True, kw_only=True)
class PTuning:
    """Train virtual tokens through a prompt encoder, which is dropped after training.

    P = W₂ relu(W₁ [h→; h←] + b₁) + b₂,    h→, h← = LSTM(table)        f([P; E(x)])

    >>> from pefttutor.models import load
    >>> method = PTuning(num_virtual_tokens=4)
    >>> model = method.attach(load("campus-nano")[0])
    >>> model = method.drop_encoder(model)                                     # trained: only what it makes is kept
    >>> tuple(model.model.ptuning.shape) == (4, model.config.hidden_size)
    True

    num_virtual_tokens: how many, P.
    encoder: "lstm", two layers and both directions, then two linear layers; "mlp", three linear layers; "none", the
        virtual tokens themselves, as `drop_encoder` leaves them.
    encoder_hidden_size: the width h inside of it, of each direction; None is d. The authors' code for LAMA has d / 2.
    encoder_num_layers, encoder_dropout: of the LSTM.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").
    placeholder_token_id: None puts the virtual tokens before each text. The id of a token puts them where this token
        stands, anywhere in a template: each text has it P times, and no text gets longer. One after these is a word.
    init_seed: fixes what is drawn, whatever the device.

    Before a text, the model sees the virtual tokens as with `PromptTuning`. In the paper's experiments on SuperGLUE the
    model itself is trained as well; here it is frozen, as in those on LAMA.

    Shapes: table (P, d), P (P, d), d the width of the token embeddings.
    Cost: it trains P d + 46 d² + 35 d values with an LSTM of h = d, P d + 3 (d² + d) with an MLP (`count`); once
        dropped, P d are left. The encoder runs once a step, not once a text.
    Raises: ValueError for a model that reads no tokens; in a call, for a cache that was filled without the prompt,
        and for a text that has the placeholder less than P times.
    Source: Liu et al. 2021, arXiv:2103.10385, section 2.2. The three layers of the MLP, and heads of width 2 h, are
        those of HF PEFT; the authors' have two layers, and 2 h → h.
    """

    num_virtual_tokens: int = 20
    encoder: str = "lstm"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    modules_to_save: Collection[str] = ()
    placeholder_token_id: int | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "num_virtual_tokens")
        check_choice(self, "encoder", ("lstm", "mlp", "none"))
        if self.encoder_hidden_size is not None:
            check_whole(self, "encoder_hidden_size")
        check_whole(self, "encoder_num_layers")
        check_number(self, "encoder_dropout", least=0, below=1)
        if self.placeholder_token_id is not None:
            check_whole(self, "placeholder_token_id", least=0)
        check_whole(self, "init_seed", least=0)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, let it read the encoder's virtual tokens before each text, and return it.

        Raises: ValueError if the name is in use, or the model can't read virtual tokens. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            table = token_table(model, BEFORE)
            key, network = added_key(KEY, name), self._network(table.shape[1], name)
            tensors = network.drawn(table)
            make: Itself | Network = network
            if self.encoder == "none":
                make, tensors = Itself(key), {key: next(iter(tensors.values()))}
            for part in self._parts(model, key, make, tensors):
                new.add(part)
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def drop_encoder(self, model: nn.Module, *, name: str | None = None) -> nn.Module:
        """After training: keep what the encoder makes, P · d values, in its place. The model says what it said.

        name: the attachment's, where there are several. Raises: ValueError if it has no encoder.
        """
        return settle(model, name, KEY, lambda method: replace(method, encoder="none"))

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: table and encoder, and modules_to_save."""
        width = token_table(model, BEFORE).shape[1]
        fully, _ = fully_trained(model, self.modules_to_save)
        whole = sum(model.get_parameter(name).numel() for name in fully)
        return whole + (
            self.num_virtual_tokens * width
            if self.encoder == "none"
            else self._network(width, DEFAULT).count()
        )

    def _parts(
        self, model: nn.Module, key: str, make: Itself | Network, tensors: dict[str, Tensor]
    ) -> list[Any]:
        count, token = self.num_virtual_tokens, self.placeholder_token_id
        if token is None:
            return put_before(model, count, make, tensors, note=key, what=BEFORE)
        return put_in_places(
            model, count, make, tensors, placeholder=token, note=key, what="PTuning stands among a text's"
        )

    def _network(self, width: int, name: str) -> Network:
        return Network(
            key=KEY,
            name=name,
            kind="relu" if self.encoder == "mlp" else "lstm",
            rows=self.num_virtual_tokens,
            width=width,
            hidden=self.encoder_hidden_size or width,
            out=width,
            layers=self.encoder_num_layers,
            dropout=self.encoder_dropout,
            init_seed=self.init_seed,
        )
