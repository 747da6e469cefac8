"""How answers are asked for: options of the run over the model's generation config."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from specforge_exp.artifacts import cached, model_digest
from specforge_exp.config import Config, ModelConfig
from specforge_exp.data.blocks import make_chat
from specforge_exp.data.chat import prompt_ids, readable, warn_of_thinking
from specforge_exp.data.turns import end_of_answers
from specforge_exp.errors import InputError
from specforge_exp.generation.engine import Message, Sampling
from specforge_exp.generation.regenerate import Record, Rules
from specforge_exp.serving.command import answering
from specforge_exp.serving.gpus import marks_of
from specforge_exp.target.files import generation_config, load_tokenizer

log = logging.getLogger(__name__)

OF_THE_MODEL = ("temperature", "top_p", "top_k", "repetition_penalty")
"""Options of regen that are the generation config's where they are null."""


def sampling_of(cfg: Config) -> Sampling:
    """regen's own settings; where they are null, the model's generation config.

    Raises:
        InputError: some are null, and that config is not to be had; or several answers to a prompt
            are asked for, and nothing is sampled.
    """
    own, known = cfg.regen, True
    try:
        model = generation_config(cfg.model.path)
    except InputError as error:
        model, known = GenerationConfig(), False
        lacking = [f"regen.{name}=..." for name in OF_THE_MODEL if vars(own)[name] is None]
        if lacking:
            raise InputError(f"{error}, so give what it would say: {' '.join(lacking)}") from None

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    penalty = first(own.repetition_penalty, model.repetition_penalty, 1.0)
    top_k = first(own.top_k, model.top_k, 0)
    switched_on = {"top_k": model.top_k, "repetition_penalty": model.repetition_penalty}
    unwanted = {"top_k": top_k == 0, "repetition_penalty": penalty == 1}
    if not known:  # a server that knows may be told
        unwanted["min_p"] = True
        switched_on = dict.fromkeys(unwanted, 1)
    own_temperature = 0.0 if model.do_sample is False else model.temperature
    temperature = first(own.temperature, own_temperature, 1.0)
    if temperature == 0 and own.samples_per_prompt > 1:
        raise InputError(
            f"regen.samples_per_prompt={own.samples_per_prompt}: at temperature 0 all answers to a "
            "prompt are the same; give regen.temperature=0.7, or one answer each"
        )
    return Sampling(
        temperature=temperature,
        top_p=first(own.top_p, model.top_p, 1.0),
        top_k=top_k,
        min_p=first(model.min_p, 0.0),
        max_tokens=own.max_tokens,
        repetition_penalty=penalty,
        off=tuple(name for name, value in switched_on.items() if value and unwanted[name]),
    )


def rules_of(cfg: Config) -> Rules:
    """Everything that `regenerate` has to know."""
    sampling = sampling_of(cfg)
    thinking = cfg.regen.thinking
    kwargs = dict(cfg.model.chat_template_kwargs)
    if thinking != "model":
        kwargs["enable_thinking"] = thinking != "off"
        if revision(cfg.model.path):  # what is on a hub alone is not fetched for this
            with suppress(InputError):
                warn_of_thinking(f"regen.thinking={thinking}", load_tokenizer(cfg.model), kwargs)
    made_by = {
        "model": cfg.model.path,
        "revision": revision(cfg.model.path),
        "engine": cfg.engine.name,
        **{name: vars(sampling)[name] for name in "temperature top_p top_k max_tokens".split()},
        "thinking": thinking,
        "seed": cfg.seed,
    }
    if sampling.repetition_penalty != 1:
        made_by["repetition_penalty"] = sampling.repetition_penalty
    made_by |= answering(cfg.engine)
    attempts = cfg.engine.retries + 1 if sampling.temperature else 1
    return Rules(
        sampling, cfg.max_length, counter(cfg.model, kwargs), kwargs, thinking,
        cfg.regen.truncated, cfg.seed, attempts, made_by, tuple(marks_of(cfg.model)),
    )  # fmt: skip


def warn_of_end(cfg: Config) -> None:
    """Say so where a server does not stop at what the chat template writes behind an answer, as
    with a base model's configuration: every answer then runs on to regen.max_tokens."""
    if not revision(cfg.model.path):  # what is on a hub alone is not fetched for this
        return
    with suppress(InputError):
        chat = make_chat(cfg)
        if (end := end_of_answers(chat)) not in (None, *chat.stops):
            log.warning(
                "regen: the chat template ends answers with %s, at which a server of this model "
                "does not stop: eos_token_id in its generation_config.json should name it, or "
                "answers run on to regen.max_tokens",
                end,
            )


def counter(model: ModelConfig, kwargs: dict[str, Any]) -> Callable[[Record, list[Message]], int]:
    """`Rules.count`; the tokenizer is loaded for the first conversation that may be too long."""

    @cache
    def tokenizer() -> Any:
        return load_tokenizer(model)

    def count(record: Record, messages: list[Message]) -> int:
        shown = [readable(message, "in") for message in messages]
        return len(prompt_ids(tokenizer(), shown, kwargs, record.get("tools")))

    return count


def revision(path: str) -> str | None:
    """Commit of a hub model in the cache, or digest of a local one; None where neither is here."""
    if Path(path).is_dir():
        return model_digest(path)[:16]
    folder = cached(path)
    return folder.name if folder else None
