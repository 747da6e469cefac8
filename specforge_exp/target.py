"""The frozen target model: hidden states and logits for training and verification.

Shape suffixes: B batch, T tokens, H hidden, A auxiliary states, V vocabulary, N rows.
"""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from specforge_exp.config import Config, ModelConfig
from specforge_exp.config.machine import own_overrides
from specforge_exp.errors import InputError, first_line
from specforge_exp.sharding import whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def set_up_torch(cfg: Config) -> torch.device:
    """Set the number of CPU threads and return the device that `device=` means.

    Processes of one machine share its cores evenly unless `threads` says otherwise.

    Raises:
        InputError: there is no GPU to use.
    """
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cfg.threads or together > 1:
        torch.set_num_threads(cfg.threads or max(1, torch.get_num_threads() // together))
    name = cfg.device
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda, but torch sees no GPU; use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_gpus(cfg: Config, stage: str, processes: int = 1) -> None:
    """Refuse a machine that is too small for the model, before anything is read.

    Raises:
        InputError: the model asks for a GPU and there is none, or for more than there are.
    """
    here = torch.cuda.device_count() if cfg.device != "cpu" else processes
    if not here and cfg.model.gpu:
        options = own_overrides()
        away = shlex.join(["python", f"{stage}.py", "-m", *options])
        local = shlex.join(["python", f"{stage}.py", *options, "device=cpu"])
        raise InputError(
            f"model={cfg.model.name} is for a GPU (model.gpu={cfg.model.gpu}) and torch sees none; "
            f"on Modal: {away}; or here, very slowly: {local}"
        )
    if 0 < here < processes:
        even = max(n for n in range(1, here + 1) if cfg.trainer.batch_size % n == 0)
        raise InputError(
            f"trainer.gpus={processes}, but this machine has {here}; use trainer.gpus={even}"
        )


def aux_layer_ids(
    layers: int, chosen: list[int] | None, feeds: Callable[[int], list[int]] | None
) -> list[int]:
    """The 0-based layers whose outputs feed the draft: the chosen ones, or what the draft wants.

    Raises:
        InputError: a chosen layer does not exist, or the draft finds too few.
    """
    if chosen is not None:
        if any(not 0 <= layer < layers for layer in chosen):
            raise InputError(f"model.aux_layers={chosen}: this target has layers 0..{layers - 1}")
        return list(chosen)
    return feeds(layers) if feeds else []


@dataclass
class Target:
    """A loaded target. `features` and `step` run without gradients."""

    model: Any
    aux_layers: list[int]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def embed_VH(self) -> Tensor:
        """Input embeddings."""
        return whole(self.model.get_input_embeddings().weight)

    @property
    def head_weight_VH(self) -> Tensor:
        """Output embeddings."""
        return whole(self.model.get_output_embeddings().weight)

    @property
    def final_norm_H(self) -> Tensor:
        """Weight of the norm before the head."""
        return whole(self.model.base_model.norm.weight)

    @property
    def parameters(self) -> int:
        """Weights that a token passes through, for FLOP counts: all but the embeddings."""
        embeddings: int = self.model.get_input_embeddings().weight.numel()
        counted: int = self.model.base_model.num_parameters() - embeddings
        return counted

    @property
    def last_layer(self) -> dict[str, Tensor]:
        """Weights of the last layer, by name."""
        return {n: whole(w) for n, w in self.model.base_model.layers[-1].named_parameters()}

    def forget_layers(self) -> None:
        """Free the layers; embeddings, norm and head stay."""
        self.model.base_model.layers = None

    @torch.no_grad()
    def head(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] of post-norm hidden states."""
        logits: Tensor = self.model.get_output_embeddings()(hidden_NH)
        return logits

    @torch.no_grad()
    def features(self, ids_BT: Tensor, cache: DynamicCache | None = None) -> tuple[Tensor, Tensor]:
        """Auxiliary hidden states [B, T, A] and post-norm last hidden states [B, T, H].

        Args:
            ids_BT: tokens; padding belongs on the right, where causal attention hides it.
            cache: keys and values of the tokens before these; extended in place.
        """
        captured: dict[int, Tensor] = {}
        layers = self.model.base_model.layers

        def keep(index: int) -> Any:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                captured[index] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [layers[i].register_forward_hook(keep(i)) for i in self.aux_layers]
        try:
            out = self.model.base_model(ids_BT, past_key_values=cache, use_cache=cache is not None)
        finally:
            for handle in handles:
                handle.remove()
        last_BTH: Tensor = out.last_hidden_state
        aux = [captured[i] for i in self.aux_layers]
        return torch.cat(aux, -1) if aux else last_BTH[..., :0], last_BTH


def load_target(
    cfg: ModelConfig,
    device: torch.device,
    dtype: str = "auto",
    processes: int = 1,
    feeds: Callable[[int], list[int]] | None = None,
) -> Target:
    """Load the target's weights, frozen.

    Args:
        cfg: which model.
        device: where to.
        dtype: "auto" takes float32 on a CPU and bfloat16 on a GPU.
        processes: share each layer among so many (transformers' tensor parallelism); all of them
            must then run the same inputs.
        feeds: which of so many layers feed the draft; None: none do.

    Raises:
        InputError: it cannot be found or read, or has too few layers.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    try:
        shared = {"distributed_config": DistributedConfig(tp_size=processes)}
        model = AutoModelForCausalLM.from_pretrained(
            cfg.path, dtype=DTYPES[dtype], **(shared if processes > 1 else {})
        )
    except (OSError, ValueError) as error:
        raise InputError(not_loadable(cfg, error)) from None
    model.requires_grad_(False).eval().to(device)
    layers = model.config.get_text_config().num_hidden_layers
    return Target(model, aux_layer_ids(layers, cfg.aux_layers, feeds))


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The target's tokenizer; InputError when it is missing, slow, or has no chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.path)
    except (OSError, ValueError) as error:
        raise InputError(not_loadable(cfg, error)) from None
    if not tokenizer.is_fast:
        raise InputError(f"{cfg.path}: its tokenizer has no tokenizer.json; a fast one is needed")
    if not tokenizer.chat_template:
        raise InputError(
            f"{cfg.path}: its tokenizer has no chat template, so conversations cannot be rendered; "
            "add a chat_template.jinja to the folder or use the instruction-tuned model"
        )
    return tokenizer


def not_loadable(cfg: ModelConfig, error: Exception) -> str:
    """One line on why a model cannot be loaded and what to do."""
    kind = "folder" if Path(cfg.path).is_dir() else "hub id or folder"
    reason = first_line(error)
    return f"model.path={cfg.path} cannot be loaded as a {kind}: {reason}"
