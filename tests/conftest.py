"""Small real things that tests share; torch is loaded by those that use it."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU Triton's kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
# Programs of the tests start as a user's do: what was compiled once is read.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import warm
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from modal_local import client as modal_local

from hydra_sweeps.reading import read_once
from specforge_exp.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    PathsConfig,
    Source,
)
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.paths import tokens_dir

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from specforge_exp.data.tokens import TokenSet
    from specforge_exp.generation.local.transformers_engine import TransformersEngine
    from specforge_exp.target import Target

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background jobs:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs of the tests inherit it
# Hydra copies its store for every composition. Here as in the scripts there is one per process.
vars(ConfigStore.instance())["__deepcopy__"] = lambda memo: ConfigStore.instance()
gc.disable()  # while tests are collected nearly nothing becomes garbage


def pytest_collection_finish() -> None:
    """No test looks for garbage in what was imported: that is a tenth of what a tier takes.

    Nor every 700 new objects, of which a composed configuration has some ten thousand.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


PLANTED = "s3cr3t-that-no-file-may-hold"
REPOSITORY = Path(__file__).resolve().parent.parent
CONF = REPOSITORY / "conf"
FILES_OF_CONF: dict[Any, Any] = {}
"""Read by the first test that composes them."""
TINY = ModelConfig(name="tiny", path=str(REPOSITORY / "assets" / "tiny_target"))


def composed(*words: str, whole: bool = False) -> DictConfig:
    """conf/ with some words of a command line; `whole`: with Hydra's own node."""
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra: Any = GlobalHydra.instance().hydra
        hydra.config_loader = read_once(hydra.config_loader, FILES_OF_CONF)
        return compose("config", list(words), return_hydra_config=whole)


def engine_over(cfg: Config, target: Target, tokenizer: Any, cache_mb: int) -> TransformersEngine:
    """The engine of this process over a target that is loaded already."""
    from specforge_exp.generation.local import transformers_engine as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_target", lambda *_: target)
        patch.setattr(module, "load_tokenizer", lambda _: tokenizer)
        return module.TransformersEngine(cfg, cache_mb=cache_mb)


def small_target(
    vocabulary: int = 64, hidden: int = 16, seed: int = 0, head_dim: int = 8
) -> Target:
    """A random Qwen3 of 8 layers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from specforge_exp.target import Target

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=24, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    return Target(model, [1, 3, 4])


@pytest.fixture
def by_kernels() -> Iterator[Callable[[bool], None]]:
    """Turns the training's few kernels on for a CPU, where Triton interprets them, or off."""
    from specforge_exp.drafts import kernels, layers

    if os.environ["TRITON_INTERPRET"] == "0":
        pytest.skip("kernels are compiled here, for a GPU")

    def use(on: bool) -> None:
        layers.IN_ORDER["cpu"] = not on
        (kernels.USED.add if on else kernels.USED.discard)("cpu")

    use(True)
    yield use
    use(False)


@pytest.fixture
def random_target() -> Target:
    return small_target()


@pytest.fixture(scope="session")
def tiny_target() -> Target:
    import torch

    from specforge_exp.drafts.eagle3 import Eagle3
    from specforge_exp.target import load_target

    return load_target(
        TINY, torch.device("cpu"), feeds=partial(Eagle3.target_layers, Eagle3Config())
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    from specforge_exp.target import load_tokenizer

    return load_tokenizer(TINY)


SMALL = [
    "data.name=small", 'data.train=[{path:"synthetic:train",limit:12}]',
    'data.eval=[{path:"synthetic:eval",limit:4}]',
]  # fmt: skip
"""What a command says of the data of `make_config`."""


def make_config(folder: Path) -> Config:
    """A configuration over the tiny target whose artifacts live in `folder`."""
    return Config(
        run_name="test",
        lr=1e-3,
        epochs=1,
        max_length=256,
        device="cpu",
        model=replace(TINY),
        data=DataConfig(
            name="small",
            train=[Source(path="synthetic:train", limit=12)],
            eval=[Source(path="synthetic:eval", limit=4)],
        ),
        loss=LossConfig(name="baseline", lambda_ce=1.0),
        draft=Eagle3Config(name="eagle3", draft_vocab_size=512, ttt_length=3),
        paths=PathsConfig(str(folder / "datasets"), str(folder / "checkpoints")),
    )


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """`make_config` in tmp_path."""
    return make_config(tmp_path)


@pytest.fixture(scope="session")
def made_tokens(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of what `tokens` copies."""
    from specforge_exp.stages.prep import prep
    from specforge_exp.stages.preprocess import preprocess

    cfg = make_config(tmp_path_factory.mktemp("tokens"))
    cfg.preprocess.source = "prep"
    prep(cfg)
    preprocess(cfg)
    return cfg


@pytest.fixture
def tokens(cfg: Config, made_tokens: Config) -> Path:
    """Token shards of the synthetic corpus with its own answers; returns their folder."""
    cfg.preprocess.source = "prep"
    shutil.copytree(made_tokens.paths.datasets, cfg.paths.datasets, dirs_exist_ok=True)
    return tokens_dir(cfg)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def conversation_set(turns: list[list[int]]) -> TokenSet:
    """Conversations with these turns and rising ids."""
    import torch

    from specforge_exp.data.tokens import TokenSet, TokenShard

    ids = [torch.arange(len(t), dtype=torch.int32) for t in turns]
    offsets = torch.tensor([0, *(len(t) for t in turns)]).cumsum(0)
    numbers = torch.tensor([n for t in turns for n in t], dtype=torch.int16)
    return TokenSet([TokenShard(Path("none"), torch.cat(ids), numbers, offsets)])


@pytest.fixture(scope="session")
def shared_with_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that containers of `control_plane` see as it is here."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def held(shared_with_jobs: Path, tmp_path: Path) -> Path:
    """A folder: a job of tests/modal_app whose `hold` it is stands still while a file with its name
    is there, after as many steps as the file says."""
    folder = shared_with_jobs / tmp_path.name
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def control_plane(shared_with_jobs: Path) -> Iterator[modal_local.LocalModal]:
    """A local Modal for everything in this process: modal's client keeps its first address."""
    with local_modal_of_forks([shared_with_jobs], max_containers=4, retry_delay_scale=0) as local:
        yield local


def local_modal_of_forks(share: Sequence[Path], **options: object) -> modal_local.LocalModal:
    """A local Modal whose containers are forks of a process that has imported what they import."""
    kinds = {"forks": "containers", "torch_forks": "torch-containers"}
    if sys.platform != "linux":
        kinds = {}
    return modal_local.start(
        options={name: warm.server(kind) for name, kind in kinds.items()} | options,
        secrets={"planted": {"PLANTED": PLANTED}},
        share=share,
        env={"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def cold_containers(control_plane: modal_local.LocalModal) -> Iterator[None]:
    """Containers of `control_plane` start as they do on Modal: by an interpreter of their own."""
    control_plane.cold(True)
    yield
    control_plane.cold(False)


@pytest.fixture
def on_local_modal(
    control_plane: modal_local.LocalModal, monkeypatch: pytest.MonkeyPatch
) -> modal_local.LocalModal:
    """This process, and those it starts, talk to the local Modal; our plugin is found by all."""
    for name, value in control_plane.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return control_plane


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks and syncs of folders, as some of a network are."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def files_only(descriptor: int, sync: Any = os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(os, "fsync", files_only)
