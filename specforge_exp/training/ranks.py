"""One process per GPU: starting them, joining them, and adding up what they have.

`trainer.gpus` starts them with torchrun's own launcher; a command started by torchrun itself
(several machines) joins as it is. On a CPU the same code runs over gloo.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from specforge_exp.config import Config
from specforge_exp.errors import InputError
from specforge_exp.interrupt import SIGNALS

log = logging.getLogger(__name__)

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
STORE = "SPECFORGE_EXP_STORE"
"""Environment variable: the file in which the processes that `launch` starts find each other."""


TIMEOUT = timedelta(hours=2)
"""How long a process waits for another, which may load a target, answer a round of rollouts or wait
for workers; NCCL's own limit is ten minutes, as long as `streamed.PATIENCE`, and ends without a
word."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world > 1:
            handles = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for handle in handles:
                handle.wait()

    def gather(self, thing: Any) -> list[Any]:
        """Something small of every process, in order."""
        if self.world == 1:
            return [thing]
        things: list[Any] = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def decided(self, decide: Callable[[], Answer]) -> Answer:
        """What the first process decides, for all of them.

        When it refuses, its InputError is the only line: the others end without a word.
        """
        if self.world == 1:
            return decide()
        message: list[Any] = [None, False]
        refusal = None
        if self.rank == 0:
            try:
                message[0] = decide()
            except InputError as error:
                message[1], refusal = True, error
        dist.broadcast_object_list(message, 0)
        if refusal:
            raise refusal
        if message[1]:
            raise SystemExit(0)  # torchrun would end the first at once, before its line is out
        answer: Answer = message[0]
        return answer

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


def started() -> bool:
    """Whether torchrun, or `launch`, started this process."""
    return "LOCAL_RANK" in os.environ


def by_torchrun() -> bool:
    """Whether torchrun started this process itself: then nobody has decided anything yet."""
    return started() and STORE not in os.environ


def join(device: torch.device) -> Ranks:
    """Meet the other processes; alone unless a launcher started this one."""
    if not started():
        return Ranks()
    if not dist.is_initialized():
        store = os.environ.get(STORE)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=TIMEOUT,
            init_method=f"file://{store}" if store else None,
            rank=int(os.environ["RANK"]) if store else -1,
            world_size=int(os.environ["WORLD_SIZE"]) if store else -1,
        )
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    return Ranks(rank, world)


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process; InputError where the machine has fewer than processes."""
    if device.type == "cuda" and started():
        here, number = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if number >= here:
            raise InputError(
                f"process {number} of this machine finds {here} GPUs; --nproc-per-node={here}"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def launch(stage: Callable[[Config], Any], cfg: Config, *modules: str) -> Any:
    """Run a stage in `trainer.gpus` processes and return what the first of them returns.

    They have imported `modules` when they begin, and are started again `trainer.restarts` times
    when one of them dies; a refusal is final.

    Raises:
        InputError: what a process refused, or that one of them died.
    """
    for left in range(cfg.trainer.restarts, -1, -1):
        try:
            return attempt(stage, cfg, *modules)
        except DeadProcess as death:
            if not left:
                raise InputError(
                    f"{death}; what it printed is above. Run the same command to continue"
                ) from None
            where = "from the newest checkpoint" if cfg.trainer.resume else "over"
            log.warning("%s; all start again %s, %d times more at most", death, where, left)
    return None


class DeadProcess(Exception):
    """A process ended without a word that a user could act on."""


def attempt(stage: Callable[[Config], Any], cfg: Config, *modules: str) -> Any:
    """`launch`, once; raises DeadProcess when one of the processes dies."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Processes report what went wrong themselves; the launcher would add its own tracebacks.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The launcher would open a TCP store on every interface; the processes meet in a file.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # They fork from a process that has imported the stage once, and no more than that.
    multiprocessing.set_forkserver_preload([__name__, *modules])
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    # What is ignored stays so (nohup): the launcher would end by it.
    heard = [number.name for number in SIGNALS if handlers[number] != signal.SIG_IGN]
    with tempfile.TemporaryDirectory() as folder:
        refusal = Path(folder) / "refusal"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=int(cfg.trainer.gpus),
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder) / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            run_id=cfg.run_name,
            max_restarts=0,
            start_method="forkserver",
            monitor_interval=0.1,
            signals_to_handle=",".join(heard),
        )
        try:
            return elastic_launch(config, work)(stage, cfg, refusal, dict(os.environ))[0]
        except SignalException as stop:
            number = stop.sigval
        except ChildFailedError as error:
            if refusal.exists():
                raise InputError(refusal.read_text()) from None
            rank, failure = error.get_first_failure()
            raise DeadProcess(
                f"process {rank} of trainer.gpus={cfg.trainer.gpus} ended with exit code "
                f"{failure.exitcode}"
            ) from None
        finally:
            for caught, handler in handlers.items():
                signal.signal(caught, handler)
    signal.raise_signal(number)
    return None


def work(
    stage: Callable[[Config], Any], cfg: Config, refusal: Path, environment: dict[str, str]
) -> Any:
    """What each process runs; a refusal is left in a file, since only text crosses over.

    Its environment is the launching process's of now, not of when the first one was forked.
    """
    os.environ.update(environment)
    gc.freeze()  # nothing looks for garbage in what was imported before the fork
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ[STORE] = str(refusal.with_name("store"))
    for transport in ("GLOO", "NCCL"):  # one machine: nothing listens beyond loopback
        os.environ.setdefault(f"{transport}_SOCKET_IFNAME", LOOPBACK)
    try:
        result = stage(cfg)
    except InputError as error:
        refusal.with_suffix(f".{os.getpid()}").write_text(str(error))
        refusal.with_suffix(f".{os.getpid()}").replace(refusal)
    except Exception:
        traceback.print_exc()
    else:
        dist.destroy_process_group()
        return result
    sys.stderr.flush()
    os._exit(1)  # at once: the others may be waiting for this process
