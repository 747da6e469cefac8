"""Loading a target's weights, all of them and nothing else."""

import sys
from collections.abc import Callable
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from specforge_exp.artifacts import files_of
from specforge_exp.config import Config, ModelConfig, locate
from specforge_exp.errors import InputError
from specforge_exp.target.anatomy import PLAIN
from specforge_exp.target.files import model_config, not_loadable, quantised, text_config
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
    config, packed = model_config(cfg), ""
    try:
        packed = quantised(config)
        if device.type != "cpu" and "distributed_config" not in options:
            options = {**options, "device_map": {"": device}}
        text = type(config) in AutoModelForCausalLM._model_mapping
        kind = AutoModelForCausalLM if text else AutoModelForImageTextToText
        if type(config) not in kind._model_mapping:
            raise ValueError(f"{config.model_type} is no causal language model of transformers")
        model, report = kind.from_pretrained(
            cfg.path, trust_remote_code=False, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # damaged files raise whatever they meet
        lacks_room = isinstance(error, MemoryError | RuntimeError) and not packed
        if lacks_room and "PytorchStreamReader" not in str(error):
            raise
        if isinstance(error, UnpicklingError):  # whose words advise to run what is in it
            error = ValueError("a .bin file of it is damaged, or holds more than tensors")
        raise InputError(not_loadable(cfg, error) + packed) from None
    if packed and getattr(model, "hf_quantizer", None) is None:  # it is unpacked
        check_blocks(cfg, getattr(config, "quantization_config", {}).get("weight_block_size"))
        even(model, options["dtype"])
    check_numbers(cfg, model)
    return model, report


def check_blocks(cfg: ModelConfig, block: list[int] | None) -> None:
    """Refuse packed weights whose last block is a smaller one: transformers unpacks them as if all
    were of one size, so that scales meet other numbers than theirs."""
    folder = files_of(cfg.path)
    for file in folder.glob("*.safetensors") if folder and block else ():
        with safe_open(file, "pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in [*weights.keys()]}
        for name, shape in shapes.items():
            grid = shapes.get(f"{name}_scale_inv", [])
            sides = zip(shape, grid, block or [], strict=False)
            if any(count > 1 and side != count * size for side, count, size in sides):
                raise InputError(
                    f"model.path={cfg.path}: {name} is {shape} numbers, which blocks of {block} do "
                    "not fill: transformers unpacks its scales wrongly; name the model that it was "
                    "made of, or use a GPU that runs it packed"
                )


def even(model: Any, dtype: torch.dtype) -> None:
    """Give the weights that stood beside packed ones the type that those were unpacked to: they are
    read as they are in the file, and products of two types fail. What is kept wider stays so."""
    for weight in model.parameters():
        if weight.dtype in PLAIN and weight.dtype.itemsize <= dtype.itemsize:
            weight.data = weight.data.to(dtype)


def check_numbers(cfg: ModelConfig, model: Any) -> None:
    """Refuse weights that are no numbers, and a head that its files have and its config.json has
    not: engines take the embeddings in its place.

    Raises:
        InputError: it names them.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False) and head is not None
    if tied and head.weight is not embeddings.weight:
        raise InputError(
            f"model.path={cfg.path}: config.json says tie_word_embeddings=true, and its files hold "
            "a head that is not the embeddings: engines read those, transformers reads the head; "
            "give it tie_word_embeddings=false, or remove the head's tensor"
        )
    for name, weight in model.named_parameters():
        if weight.dtype in PLAIN and weight.numel() and not weight.is_meta:
            ends = torch.stack(torch.aminmax(getattr(weight, "_local_tensor", weight).detach()))
            if not ends.isfinite().all():
                raise InputError(f"model.path={cfg.path}: {name} holds NaN or infinite numbers")


def check_weights(cfg: ModelConfig, report: dict[str, Any]) -> None:
    """Refuse weights that are missing, of another shape or not used: the model is another one.

    Raises:
        InputError: it names them.
    """
    unused = report["unexpected_keys"]
    scales = [
        key for key in unused
        if (stem := key.partition("_scale")[0]) != key
        and stem.endswith(("weight", "_proj"))
        and stem not in unused
    ]  # fmt: skip
    if scales:
        raise InputError(
            f"model.path={cfg.path}: its weights are quantised in a way that transformers does not "
            f"read: {len(scales)} scales are not used ({sorted(scales)[0]}, ...), without which "
            "the weights are other numbers; name the model that it was made of"
        )
    problems = {
        "missing (transformers fills them with noise)": report["missing_keys"],
        "of another shape": [key[0] for key in report["mismatched_keys"]],
        "not used": [] if cfg.unused_weights else unused,
    }
    said = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:5])}{', ...' * (len(keys) > 5)}"
        for what, keys in problems.items()
        if keys
    ]
    if said:
        remedy = ""
        if len(said) == 1 and problems["not used"]:
            remedy = "; model.unused_weights=true when those are not needed"
        raise InputError(
            f"model.path={cfg.path}: its files are not the weights of its config.json: "
            f"{'; '.join(said)}{remedy}"
        )
