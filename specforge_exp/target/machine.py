"""The device and the machine that a target needs."""

import os
from dataclasses import replace

import torch
from torch import nn

from specforge_exp.config import Config
from specforge_exp.config.machine import command
from specforge_exp.config.rehearsal import offers
from specforge_exp.errors import InputError

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


def take_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Round a module's weights. What is none stays as it was made: a rotary embedding with rounded
    frequencies turns position 1,000 by 0.1 rad too far, which no engine does."""
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)


def take_what_is_there(cfg: Config) -> Config:
    """The configuration with the number that trainer.gpus=auto means on this machine.

    Where torchrun has started this process it is torchrun's.
    """
    if cfg.trainer.gpus != "auto":
        return cfg
    here = torch.cuda.device_count() - lent(cfg) if cfg.device != "cpu" else 0
    gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or most_even(cfg.trainer.batch_size, here)
    return replace(cfg, trainer=replace(cfg.trainer, gpus=gpus))


def lent(cfg: Config) -> int:
    """GPUs of this machine that workers have and no trainer."""
    here = cfg.target.placement == "ray" and not os.environ.get("RAY_ADDRESS")
    return cfg.target.gpus if here else 0


def most_even(batch_size: int, gpus: int) -> int:
    """The largest number of these GPUs that shares a batch evenly; 1 without any."""
    return max((n for n in range(1, gpus + 1) if batch_size % n == 0), default=1)


def check_gpus(cfg: Config, stage: str, processes: int = 1) -> None:
    """Refuse a machine that is too small for the model, before anything is read.

    Raises:
        InputError: the model asks for a GPU and there is none, or for more than there are.
    """
    here = torch.cuda.device_count() if cfg.device != "cpu" else processes
    if not here and cfg.model.gpu:
        raise InputError(
            f"model={cfg.model.name} is for a GPU (model.gpu={cfg.model.gpu}) and torch sees none; "
            f"on Modal: {command(stage)}; here, very slowly: "
            f"{command(stage, 'device=cpu', away=False)}; or with a tiny target:{offers(stage)}"
        )
    workers = lent(cfg) if stage == "train" and "LOCAL_RANK" not in os.environ else 0
    if workers and cfg.device != "cpu" and 0 < here < processes + workers:
        fewer = min(workers, here - 1) // cfg.target.tp_size
        left = here - fewer * cfg.target.tp_size
        fit = f"trainer.gpus={most_even(cfg.trainer.batch_size, left)}"
        alone = "target.placement=inprocess"
        if cfg.target.engine != "transformers":
            alone = "a machine with more, or a smaller target.tp_size"
        remedy = f"{fit} target.workers={fewer}" if fewer else alone
        raise InputError(
            f"trainer.gpus={processes} and target.workers={cfg.target.workers} of "
            f"target.tp_size={cfg.target.tp_size} need {processes + workers} GPUs, but this "
            f"machine has {here}: {remedy}"
        )
    if 0 < here < processes:
        even = most_even(cfg.trainer.batch_size, here)
        raise InputError(
            f"trainer.gpus={processes}, but this machine has {here}; use trainer.gpus={even}, the "
            f"most that share trainer.batch_size={cfg.trainer.batch_size} evenly, or "
            "trainer.gpus=auto"
        )
