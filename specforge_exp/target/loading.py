"""Loading a target's weights, all of them and nothing else."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from specforge_exp.config import Config, ModelConfig, locate
from specforge_exp.errors import InputError
from specforge_exp.target.files import model_config, not_loadable, text_config
from specforge_exp.target.machine import DTYPES
from specforge_exp.target.model import Target


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


def fed_by(cfg: Config) -> list[int]:
    """`aux_layer_ids` of a run, by the target's config.json alone.

    Raises:
        InputError: as there, or config.json cannot be read.
    """
    feeds = partial(locate(cfg.draft._target_).target_layers, cfg.draft)
    return aux_layer_ids(text_config(cfg.model).num_hidden_layers, cfg.model.aux_layers, feeds)


def load_target(
    cfg: ModelConfig,
    device: torch.device,
    dtype: str = "auto",
    processes: int = 1,
    feeds: Callable[[int], list[int]] | None = None,
) -> Target:
    """Load the target's weights, frozen, and find its parts.

    Args:
        cfg: which model.
        device: where to.
        dtype: "auto" takes float32 on a CPU and bfloat16 on a GPU.
        processes: share each layer among so many (transformers' tensor parallelism); all of them
            must then run the same inputs.
        feeds: which of so many layers feed the draft; None: none do.

    Raises:
        InputError: it cannot be found or read, weights of it are missing, it has too few layers, or
            its states and logits cannot be followed.
    """
    no_bars_in_logs()
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    aux_layers = aux_layer_ids(text_config(cfg).num_hidden_layers, cfg.aux_layers, feeds)
    shared = {"distributed_config": DistributedConfig(tp_size=processes)} if processes > 1 else {}
    options = {"dtype": DTYPES[dtype], "output_loading_info": True, **shared}
    model, report = from_files(cfg, device, options)
    check_weights(cfg, report)
    model.requires_grad_(False).eval()
    if getattr(model, "hf_quantizer", None) is None or model.device.type != device.type:
        model.to(device)
    target = Target(model, aux_layers)
    try:
        _ = target.end
        target.check_states()
    except InputError as error:
        raise InputError(f"model.path={cfg.path}: {error}") from None
    return target


def no_bars_in_logs() -> None:
    """Let transformers draw progress bars on a terminal alone."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def from_files(
    cfg: ModelConfig, device: torch.device, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' report; InputError when it cannot be loaded.

    Weights go to their device as they are read: what is converted on the way there (experts that
    are put together, numbers of another type) would be a copy in each process's own memory, and
    quantised ones of some kinds cannot be moved later.
    """
    quantised, config = "", model_config(cfg)
    try:
        details = getattr(config, "quantization_config", None)
        if details:
            details = details if isinstance(details, dict) else details.to_dict()
            quantised = f" (its weights are quantised: {details.get('quant_method')})"
        if device.type != "cpu" and "distributed_config" not in options:
            options = {**options, "device_map": {"": device}}
        text = type(config) in AutoModelForCausalLM._model_mapping
        kind = AutoModelForCausalLM if text else AutoModelForImageTextToText
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            cfg.path, trust_remote_code=False, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not quantised:
            raise
        raise InputError(not_loadable(cfg, error) + quantised) from None
    return loaded


def check_weights(cfg: ModelConfig, report: dict[str, Any]) -> None:
    """Refuse weights that are missing, of another shape or not used: the model is another one.

    Raises:
        InputError: it names them.
    """
    problems = {
        "missing (transformers fills them with noise)": report["missing_keys"],
        "of another shape": [key[0] for key in report["mismatched_keys"]],
        "not used": [] if cfg.unused_weights else report["unexpected_keys"],
    }
    said = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:5])}{', ...' * (len(keys) > 5)}"
        for what, keys in problems.items()
        if keys
    ]
    if said:
        remedy = ""
        if problems["not used"]:
            remedy = "; model.unused_weights=true when those are not needed"
        raise InputError(
            f"model.path={cfg.path}: its files are not the weights of its config.json: "
            f"{'; '.join(said)}{remedy}"
        )
