"""The frozen target model: hidden states and logits for training and verification.

Shape suffixes: B batch, T tokens, H hidden, A auxiliary states, V vocabulary, N rows.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.utils import is_flash_attn_2_available

from specforge_exp.errors import InputError
from specforge_exp.sharding import whole
from specforge_exp.target import packing
from specforge_exp.target.anatomy import (
    CACHE,
    few_tokens,
    find_layers,
    layer_weights,
    norm_weight,
    one_line,
    outputs_of,
    read_end,
    visited,
)
from specforge_exp.target.head import Head

KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
"""Layers of a cache of transformers that keep nothing else."""


def apart(states: Tensor, expected: Tensor) -> float:
    """Length of the difference of states, relative to that of the expected ones."""
    return float((states - expected).norm() / expected.norm())


def tolerance(states: Tensor) -> float:
    """By how much the same states may be apart: narrower numbers than fp32 add up errors."""
    return 1e-3 if states.dtype == torch.float32 else 0.2


@contextmanager
def running(forwards: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Modules run with these forwards meanwhile, and with their own again afterwards: what looks
    into a module must not find it compiled."""
    own = [(module, module.forward) for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in own:
            module.forward = forward


@dataclass
class Target:
    """A loaded target. `features` and `step` run without gradients."""

    model: Any
    aux_layers: list[int]
    tokens: int | None = None
    """How many ids the tokenizer has; None: as many as the model."""
    documents: bool = False
    """Whether its attention is `packing.by_document`."""
    compiled: list[tuple[Any, Callable[..., Any]]] = field(default_factory=list)
    """Its layers and how texts without a cache run them; []: as they are."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def text(self) -> Any:
        """Configuration of its language model."""
        return self.model.config.get_text_config()

    @cached_property
    def decoder(self) -> Any:
        """What turns tokens into last hidden states."""
        return find_layers(self.model)[0]

    @cached_property
    def layers(self) -> Any:
        """Its layers."""
        decoder, name = find_layers(self.model)
        return getattr(decoder, name)

    @cached_property
    def end(self) -> tuple[Any, Head]:
        """The norm before the head (None where it is part of something else), and the head.

        Raises:
            InputError: the model's logits cannot be reproduced.
        """
        return read_end(self.model, self.decoder)

    @property
    def head(self) -> Head:
        """Post-norm last hidden states [N, H] -> the logits [N, V] that it serves."""
        return replace(self.end[1], tokens=self.tokens)

    @property
    def embed_VH(self) -> Tensor:
        """Input embeddings."""
        return whole(self.model.get_input_embeddings().weight)

    @property
    def head_weight_VH(self) -> Tensor:
        """Output embeddings."""
        return whole(self.model.get_output_embeddings().weight)

    @property
    def tied(self) -> bool:
        """Whether both are one tensor."""
        return self.head_weight_VH.data_ptr() == self.embed_VH.data_ptr()

    @property
    def parameters(self) -> float:
        """Numbers in its layers that a token is multiplied with, for FLOP counts."""
        return sum(visited(layer, self.text) for layer in self.layers)

    def final_norm(self) -> tuple[Tensor, bool]:
        """Weight [H] of the norm before the head as an RMS norm's, and whether it is one."""
        ones_H = torch.ones(self.text.hidden_size)
        return norm_weight(self.end[0], len(ones_H)) or (ones_H, False)

    def last_layers(self, number: int) -> list[dict[str, Tensor]]:
        """Weights of the last layers, by Llama's names."""
        return [layer_weights(self.model, self.decoder, layer) for layer in self.layers[-number:]]

    def forget_layers(self) -> None:
        """Free the layers; embeddings, norm and head stay."""
        decoder, name = find_layers(self.model)
        _ = self.end, self.decoder
        self.__dict__.pop("layers", None)
        self.compiled = []
        setattr(decoder, name, None)

    @torch.no_grad()
    def features(self, ids_BT: Tensor, cache: DynamicCache | None = None) -> tuple[Tensor, Tensor]:
        """Auxiliary hidden states [B, T, A] and post-norm last hidden states [B, T, H].

        Args:
            ids_BT: tokens; padding belongs on the right, where causal attention hides it.
            cache: keys and values of the tokens before these; extended in place.
        """
        compiled = self.compiled if cache is None else []
        with self.captured() as captured, running(compiled):
            out = self.decoder(ids_BT, use_cache=cache is not None, **{CACHE: cache})
        last_BTH: Tensor = out.last_hidden_state
        return self.joined(captured, last_BTH), last_BTH

    def captured(self) -> AbstractContextManager[dict[int, Tensor]]:
        """What the layers that feed the draft put out meanwhile, by their numbers."""
        return outputs_of({index: self.layers[index] for index in self.aux_layers})

    def joined(self, captured: dict[int, Tensor], last: Tensor) -> Tensor:
        """Auxiliary states [..., A] of what was captured beside last states [..., H]."""
        aux = [captured[index].view_as(last) for index in self.aux_layers]
        return torch.cat(aux, -1) if aux else last[..., :0]

    def take_packing(self) -> None:
        """Use an attention that keeps packed conversations apart.

        Raises:
            InputError: it has none.
        """
        own: str = self.text._attn_implementation
        names = [packing.NAMES.get(own, own), own]
        if self.device.type == "cuda" and is_flash_attn_2_available():
            names.insert(0, "flash_attention_2")
        name = packing.first_that_follows(self.model, self.decoder, list(dict.fromkeys(names)))
        if name is None:
            raise InputError(
                f"{self.text.model_type} does not keep packed conversations apart (attention: "
                f"{', '.join(names)}); target.pack_tokens=null runs them one by one"
            )
        self.documents = name in packing.NAMES.values()

    def compile_layers(self) -> None:
        """Compile its layers for `features` of texts of any length without a cache.

        The first text is always the same, so that what is compiled does not depend on the data.

        Raises:
            InputError: they cannot be compiled here, or give other states then.
        """
        ids_1T = few_tokens(self.model)
        expected_1TH = self.features(ids_1T)[1]
        self.compiled = [(x, torch.compile(x.forward, dynamic=True)) for x in self.layers]
        try:
            last_1TH = self.features(ids_1T)[1]
        except packing.FAILURES as error:
            raise InputError(
                f"target.compile=true: the layers of {self.text.model_type} cannot be compiled "
                f"here ({one_line(error)}); target.compile=false runs them as they are"
            ) from None
        if (difference := apart(last_1TH, expected_1TH)) > tolerance(last_1TH):
            raise InputError(
                f"target.compile=true: the states of {self.text.model_type} differ by "
                f"{difference:.1%} then; target.compile=false"
            )

    @torch.no_grad()
    def states(
        self, texts: list[Tensor], most: int | None = None, compiled: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """`features` of conversations [T], each seeing itself alone: [T, A] and [T, H].

        Args:
            texts: their tokens.
            most: tokens of those in one forward, after `take_packing`; None: one by one.
            compiled: `compile_layers` first, where they are not.
        """
        if compiled and not self.compiled:
            self.compile_layers()
        if most is None:
            pairs = [self.features(ids_T[None].to(self.device)) for ids_T in texts]
            return [(aux_1TA[0], last_1TH[0]) for aux_1TA, last_1TH in pairs]
        most = min(most, packing.most_places(self.text) or most)
        sizes = list(map(len, texts))
        states: dict[int, tuple[Tensor, Tensor]] = {}
        for numbers in packing.together(dict(enumerate(sizes)), most):
            lengths = [sizes[n] for n in numbers]
            ids_T = torch.cat([texts[n] for n in numbers]).to(self.device)
            with self.captured() as captured:
                last_TH = packing.last_states(self.decoder, ids_T, lengths, self.documents)
            parts = (x_TH.split(lengths) for x_TH in (self.joined(captured, last_TH), last_TH))
            states |= dict(zip(numbers, zip(*parts, strict=True), strict=True))
        return [states[number] for number in range(len(texts))]

    @torch.no_grad()
    def check_states(self) -> None:
        """Refuse a target whose layers give no states of its width to feed a draft with.

        Raises:
            InputError: they do not.
        """
        ids_1T, size = few_tokens(self.model), self.text.hidden_size
        with self.captured() as captured:
            last_1TH = self.decoder(ids_1T, use_cache=False).last_hidden_state
        count = ids_1T.numel() * size
        alike = (isinstance(x, Tensor) and x.numel() == count for x in captured.values())
        if last_1TH.shape != (*ids_1T.shape, size) or not all(alike):
            raise InputError(
                f"the layers of {self.text.model_type} do not give one state of {size} numbers per "
                "token, which a draft is fed"
            )

    @cached_property
    def crops(self) -> bool:
        """Whether tokens can be taken out of what every layer keeps."""
        layers = DynamicCache(config=self.text).layers
        return all(type(layer).__name__ in KEYS_AND_VALUES for layer in layers)

    def new_cache(self) -> DynamicCache:
        """For the keys and values of one text.

        Raises:
            InputError: some layer keeps another state.
        """
        if not self.crops:
            raise InputError("some of its layers keep more than keys and values")
        return DynamicCache()
