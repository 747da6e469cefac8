"""The target's states from a vLLM server of a worker's own: for a target that one GPU cannot hold.

The server runs the conversations of a forward together and takes the outputs of layers as it does
for drafts that are fed by them. They pass through files in the worker's folder, each read once.
What transformers computes of a few tokens has to come out of it, or the worker refuses.

Shape suffixes: T tokens, H hidden, A auxiliary states, K captured layers.
"""

import asyncio
import fcntl
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import torch
from numpy import int32
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from specforge_exp.config import Config
from specforge_exp.errors import InputError, first_line
from specforge_exp.inference.states import Bytes, packed
from specforge_exp.serving import vllm
from specforge_exp.serving.server import Server, connections
from specforge_exp.target import Target

CONNECTOR = Path(__file__).with_name("vllm_connector.py")
MODULE = "specforge_exp_states"
"""Its name there, where nothing else of ours can be imported."""
TRIED = 48
"""Tokens whose states are compared."""
MOST = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Of the states' size that the two may differ by, at the median token."""
ALONE = {
    "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for the one token that it adds
}  # fmt: skip


class ServedStates:
    """A vLLM server, started when states are first asked for and again when it has ended.

    Args:
        cfg: the training's.
        target: the same target on the CPU, for the norm before its head.
        folder: gets its log and, for a moment, the states.
    """

    def __init__(self, cfg: Config, target: Target, folder: Path) -> None:
        self.cfg, self.folder, self.norm = cfg, folder, target.end[0]
        if self.norm is None:
            raise InputError(
                f"target.engine=vllm: {target.text.model_type} has no norm of its own before its "
                "head, so the last states cannot be made of what vLLM gives: target.engine="
                "transformers"
            )
        self.dtype, count = target.model.dtype, target.text.num_hidden_layers
        self.layers = sorted({*(layer + 1 for layer in target.aux_layers), count})
        self.columns = [self.layers.index(layer + 1) for layer in target.aux_layers]
        self.runner = asyncio.Runner()
        self.server: Server | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(CONNECTOR, folder / f"{MODULE}.py")

    def start(self) -> None:
        """Start the server.

        Raises:
            InputError: it does not start, with the end of its log.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path, other = str(self.folder), os.environ.get("PYTHONPATH")
        if other and self.cfg.target.python is None:
            path = f"{path}{os.pathsep}{other}"  # else of another Python
        self.server = Server(
            self.command(port), port, self.folder / "vllm.log", ALONE | {"PYTHONPATH": path}
        )
        self.runner.run(self.server.start(self.cfg.engine.startup_timeout))

    def command(self, port: int) -> list[str]:
        """The server's command line."""
        own = self.cfg.target
        flags = {
            "served_model_name": "target",
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_model_len": self.cfg.max_length + 2,  # what it adds must fit, or states are lost
            "enable_prefix_caching": False,
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {
                    "hf_config": {"eagle_aux_hidden_state_layer_ids": self.layers}
                },
            },
            "kv_transfer_config": {
                "kv_connector": "StatesToFiles",
                "kv_connector_module_path": MODULE,
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": str(self.folder)},
            },
        }
        command = [own.python or sys.executable]
        command += vllm.arguments(self.cfg.model.path, own.tp_size, port)
        for key, value in {**flags, **own.args}.items():
            command += vllm.flag(key, value)
        return command

    def states(self, conversations: list[NDArray[int32]]) -> list[Bytes]:
        """The states of each conversation, run together.

        Raises:
            InputError: the server does not start, or fails on one.
        """
        if self.server is None:
            self.start()
        assert self.server is not None
        try:
            return self.runner.run(self.answers(conversations))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.runner.run(self.server.stop())
            self.server = None
            said = first_line(error) or type(error).__name__
            raise InputError(f"vLLM does not answer ({said}); it is started again") from None

    async def answers(self, conversations: list[NDArray[int32]]) -> list[Bytes]:
        """`states`, of a server that runs."""
        async with connections(self.cfg.engine.timeout, None) as session:
            asked = (self.answer(session, ids.tolist()) for ids in conversations)
            return list(await asyncio.gather(*asked))

    async def answer(self, session: aiohttp.ClientSession, ids: list[int]) -> Bytes:
        """The states of one conversation."""
        assert self.server is not None
        body = {"model": "target", "prompt": ids, "max_tokens": 1, "temperature": 0}
        async with session.post(f"{self.server.url}/v1/completions", json=body) as response:
            text = await response.text()
            answer = await response.json() if response.ok else {}
        if not answer:
            raise InputError(f"vLLM refuses a conversation of {len(ids)} tokens: {text[:300]}")
        file = Path(answer["kv_transfer_params"]["hidden_states_path"])
        kept = await asyncio.to_thread(taken, file)
        if kept["token_ids"].tolist() != ids:
            raise InputError("vLLM gave the states of other tokens than it was asked for")
        return self.parts(kept["hidden_states"])

    @torch.no_grad()
    def parts(self, states_TKH: Tensor) -> Bytes:
        """The auxiliary states as the draft is fed them, and the last ones behind the norm."""
        states_TKH = states_TKH.to(self.dtype)
        aux_TA = states_TKH[:, self.columns].flatten(1)
        return packed(aux_TA, self.norm(states_TKH[:, -1]))

    def agreement(self, target: Target) -> float:
        """How far vLLM's states are from transformers', of their size: the median token's, of the
        layer that differs most.

        Raises:
            InputError: by more than other kernels explain, or some are nearer to another layer's.
        """
        size, count = target.text.vocab_size, target.text.num_hidden_layers
        ids_T = torch.arange(TRIED) * max(1, size // TRIED) % size
        layers = target.aux_layers
        near = sorted(
            {i for layer in layers for i in range(layer - 1, layer + 2)} & {*range(count)}
        )
        parts = replace(target, aux_layers=near).features(ids_T[None])
        own_TKH = torch.cat([x_1TX[0] for x_1TX in parts], -1).unflatten(-1, (len(near) + 1, -1))
        (data,) = self.states([ids_T.numpy().astype(int32)])
        other_TKH = torch.from_numpy(data).view(self.dtype).unflatten(-1, (len(layers) + 1, -1))
        apart, most = [], MOST[self.dtype]
        for column, layer in enumerate([*layers, None]):
            those_T1H = other_TKH[:, column, None].float()
            apart_TK = (own_TKH.float() - those_T1H).norm(dim=-1) / those_T1H.norm(dim=-1)
            apart_K = apart_TK.median(0).values
            place = len(near) if layer is None else near.index(layer)
            apart.append(float(apart_K[place]))
            nearest = int(apart_K[: len(near)].argmin()) if layer is not None else place
            if not apart[-1] <= most or nearest != place:
                raise InputError(
                    f"target.engine=vllm: its states of {target.text.model_type} differ from "
                    f"transformers' by {apart[-1]:.1%}, so the draft would learn another target: "
                    "target.engine=transformers"
                )
        return max(apart)


def taken(file: Path) -> dict[str, Tensor]:
    """What a file holds, as soon as it is whole; it is removed."""
    lock = file.with_name(f"{file.name}.lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        try:
            kept: dict[str, Tensor] = load_file(file)
            return kept
        except OSError as error:
            raise InputError(f"vLLM has not kept the states: {first_line(error)}") from None
        finally:
            file.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
