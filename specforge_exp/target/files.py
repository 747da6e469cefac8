"""Reading a model's configuration and tokenizer."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import find_adapter_config_file

from specforge_exp.artifacts import files_of, read_object
from specforge_exp.config import ModelConfig
from specforge_exp.errors import InputError, first_line
from specforge_exp.offline import offline

WEIGHTS = (".safetensors", ".bin")
"""A hub model in the cache that has them is there as a whole."""
SPELLINGS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
"""Files of which one has a tokenizer's tokens."""
LOADED = [
    f"{name}{end}"
    for name in ("model.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
]
"""Files of which transformers opens the first that is there."""
INSTEAD = {
    "snapshots": "it is a folder of the hub's cache: name the folder in its snapshots/, or the id",
    "checkpoint-*": "it holds a training's checkpoints: name one of them",
    "*.gguf": "GGUF is not read: name the model that it was made of",
    "pytorch_model_fsdp_*": "put FSDP's parts together first: accelerate merge-weights",
    "zero_to_fp32.py": "put DeepSpeed's parts together first: zero_to_fp32.py, which lies there",
    "*-of-*.safetensors": "its model.safetensors.index.json is missing",
    "consolidated*": "it is in its maker's own format: name the model in Hugging Face's",
}
"""What folders without one of LOADED hold in its place, and what helps."""


def text_config(cfg: ModelConfig) -> Any:
    """The configuration of the language model; InputError when it cannot be read."""
    config = model_config(cfg).get_text_config()
    if getattr(config, "num_hidden_layers", None) is None:
        raise InputError(f"model.path={cfg.path}: {config.model_type} is no language model")
    return config


def model_config(cfg: ModelConfig) -> Any:
    """A model's whole configuration; InputError when it cannot be read, or says two things."""
    if Path(cfg.path).is_file():  # which transformers would open
        raise InputError(
            f"model.path={cfg.path} is a file; a model is a folder with config.json, or a hub id"
        )
    try:
        adapter = find_adapter_config_file(cfg.path)
        config = None if adapter else AutoConfig.from_pretrained(cfg.path, trust_remote_code=False)
    except Exception as error:  # a damaged config.json raises whatever it meets
        raise InputError(not_loadable(cfg, error)) from None
    if adapter:
        raise InputError(
            f"model.path={cfg.path} has an adapter_config.json: an adapter (LoRA) is no model, and "
            "one beside a model's weights is added to them by some readers and not by others; "
            "merge it (peft's merge_and_unload, then save_pretrained) and name the merged folder, "
            "without adapter_config.json"
        )
    if folder := files_of(cfg.path):
        check_rotary(folder)
        if two_saves(folder):
            raise InputError(
                f"model.path={cfg.path} holds two sets of weights, {' and '.join(LOADED[:2])}: "
                "transformers reads the first, engines read the other; remove one"
            )
    return config


def two_saves(folder: Path) -> bool:
    """Whether a single file of weights lies beside an index of others; some writers (MLX) give the
    single one an index, too."""
    single, index = (folder / name for name in LOADED[:2])
    if not single.exists() or not index.exists():
        return False
    named = read_object(index, "copy it again").get("weight_map", {})
    return not isinstance(named, dict) or {*named.values()} != {single.name}


def quantised(config: Any) -> str:
    """How the weights of a configuration are quantised, as its config.json says; "": they are
    plain."""
    for part in (config, config.get_text_config()):
        if details := getattr(part, "quantization_config", None):
            details = details if isinstance(details, dict) else details.to_dict()
            return f" (its weights are quantised: {details.get('quant_method')})"
    return ""


def plain(config: Any) -> None:
    """Take out of a configuration how the weights of the model that it came with are quantised."""
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)


def check_rotary(folder: Path) -> None:
    """Refuse a config.json whose older and newer description of the rotary embedding differ: each
    reader takes one of them.

    Raises:
        InputError: it names both.
    """
    file = folder / "config.json"
    content = read_object(file) if file.exists() else {}
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        old, new = part.get("rope_scaling") or {}, part.get("rope_parameters") or {}
        said = {"rope_theta": 1e4, "rope_type": old.get("type", "default"), **part, **old}
        if old and any(said.get(key) != value for key, value in new.items()):
            raise InputError(
                f"{file}: rope_scaling={old} with rope_theta={said['rope_theta']} is not "
                f"rope_parameters={new}: leave one out"
            )


def generation_config(path: str) -> GenerationConfig:
    """A model's generation_config.json; where it has none, what its config.json says, as
    transformers and servers take it.

    Raises:
        InputError: it is damaged, or the model is not here, so nobody knows.
    """
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError as error:
        folder = files_of(path)
        if folder and (file := folder / "generation_config.json").exists():
            raise InputError(f"{file} cannot be read: {first_line(error)}") from None
        weights = [file for file in folder.glob("*") if file.suffix in WEIGHTS] if folder else []
        if weights or Path(path).is_dir() or asked_for(path):
            with suppress(InputError):
                return GenerationConfig.from_model_config(model_config(ModelConfig("model", path)))
            return GenerationConfig()
        raise InputError(
            f"model.path={path}: its generation_config.json cannot be read "
            f"({offline() or first_line(error)})"
        ) from None


def asked_for(path: str) -> bool:
    """Whether the hub has said that this model has no generation_config.json."""
    with suppress(ValueError):
        return try_to_load_from_cache(path, "generation_config.json") is _CACHED_NO_EXIST
    return False


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The target's tokenizer; InputError when it is missing, slow, or has no chat template."""
    folder = Path(cfg.path)
    held = (file for pattern in SPELLINGS for file in folder.glob(pattern) if file.is_file())
    if (folder / "config.json").exists() and not any(file.stat().st_size for file in held):
        raise InputError(  # transformers would make an empty one
            f"model.path={cfg.path} has no tokenizer.json; copy it from the model it was made of"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.path, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises whatever it meets
        raise InputError(f"{not_loadable(cfg, error)} (its tokenizer)") from None
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
    if "trust_remote_code" in str(error):
        return (
            f"model.path={cfg.path} needs Python code that comes with it, and such code is "
            "never run here (trust_remote_code stays off); use a checkpoint of an architecture "
            "that the installed transformers has itself"
        )
    if (why := offline()) and kind != "folder" and isinstance(error, OSError):
        return f"{why}, and model.path={cfg.path} is not in the cache, nor a folder here"
    folder, remedy = Path(cfg.path), ""
    if not any((folder / name).exists() for name in LOADED):
        found = (said for pattern, said in INSTEAD.items() if any(folder.glob(pattern)))
        remedy = next((f"; {said}" for said in found), "")
    elif pointers := [file.name for file in folder.glob("*.*") if points(file)]:
        remedy = f"; {pointers[0]} holds only where Git LFS has it: git lfs pull"
    return f"model.path={cfg.path} cannot be loaded as a {kind}: {first_line(error)}{remedy}"


def points(file: Path) -> bool:
    """Whether a file is what `git clone` leaves of a large one without Git LFS."""
    with suppress(OSError), file.open("rb") as content:  # it may be a folder
        return content.read(8) == b"version "
    return False
