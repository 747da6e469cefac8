"""Reading a model's configuration and tokenizer."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from specforge_exp.artifacts import files_of, read_object
from specforge_exp.config import ModelConfig
from specforge_exp.errors import InputError, first_line
from specforge_exp.offline import offline

WEIGHTS = (".safetensors", ".bin")
"""A hub model in the cache that has them is there as a whole."""
SPELLINGS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
"""Files of which one has a tokenizer's tokens."""


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
        config = AutoConfig.from_pretrained(cfg.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(not_loadable(cfg, error)) from None
    if folder := files_of(cfg.path):
        check_rotary(folder)
    return config


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
    if (folder / "config.json").exists() and not any(map(any, map(folder.glob, SPELLINGS))):
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
    return f"model.path={cfg.path} cannot be loaded as a {kind}: {first_line(error)}"
