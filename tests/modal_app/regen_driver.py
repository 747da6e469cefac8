"""Regenerate on a local Modal, in a process that kills itself again and again.

    python regen_driver.py FOLDER CONVERSATIONS SEED KILLS [spawned | COMMAND of the server]

Every life is a fork, so that only the first one pays for the imports. It ends by SIGKILL before,
after or in the middle of something that it writes; with `spawned`, after the last call is written
down and before any result is. The life after KILLS of them is left alone.
"""

import asyncio
import json
import logging
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from specforge_exp.config import (
    Config,
    DataConfig,
    EngineConfig,
    LossConfig,
    ModelConfig,
    PathsConfig,
    RegenConfig,
)
from specforge_exp.drafts.eagle3.config import Eagle3Config
from specforge_exp.errors import InputError
from specforge_exp.generation import modal_calls, modal_engine
from specforge_exp.generation.store import Store
from specforge_exp.stages.regen import regen

REPOSITORY = Path(__file__).resolve().parent.parent.parent
POISON, REFUSED = "the poisoned kettle", "the refused kettle"
CRASH = "the kettle that takes its container along"
QUICK = """
import asyncio
import re
import sys
from pathlib import Path
from threading import main_thread
from types import SimpleNamespace
from specforge_exp.generation.engine import Answer

class Engine:
    def __init__(self, cfg, **more):
        slots = SimpleNamespace(count=cfg.engine.concurrency)
        self.batcher = SimpleNamespace(slots=slots, context=512, thread=main_thread())

    async def answer(self, request):
        asked = request.messages[-1]["content"]
        while held(int(re.findall(r"[0-9]+", asked)[0])):
            await asyncio.sleep(0.02)
        text = "answer to " + asked
        return Answer({"role": "assistant", "content": text}, "stop", 10, 4)

    async def close(self):
        pass

def held(number):
    try:
        return number >= int(Path(HOLD).read_text())
    except FileNotFoundError:
        return False

HOLD = "/no/file"
name = "specforge_exp.generation.local.transformers_engine"
sys.modules[name] = SimpleNamespace(TransformersEngine=Engine)
"""
"""Before SERVE: it answers without a target, as what is counted here needs none. A prompt of a
number that stands in the file HOLD, or a higher one, gets its answer when that is gone."""
SERVE = f"""
import os
from specforge_exp.generation.local import serve

class ChatServer(serve.ChatServer):
    async def chat(self, http):
        body = await http.read()
        if {POISON!r}.encode() in body:
            os._exit(9)
        if {CRASH!r}.encode() in body:
            os.kill(-1, 9)
        if {REFUSED!r}.encode() in body:
            return serve.problem(400, "not this one")
        return await super().chat(http)

serve.ChatServer = ChatServer
serve.main()
"""
COMMAND = ["python", "-c", SERVE, "--model", "{model}", "--port", "{port}", "--threads", "1"]
"""With the target."""
CHUNK = 8
HOME = "/root/.cache"


def config(folder: Path, seed: int) -> Config:
    """Answers that name their prompt, in one container at a time."""
    return Config(
        run_name="driver", device="cpu", threads=1, max_length=256, seed=seed,
        model=ModelConfig(name="tiny", path=str(REPOSITORY / "assets" / "tiny_target")),
        engine=EngineConfig(
            name="modal", command=[*COMMAND[:2], QUICK + SERVE, *COMMAND[3:]],
            image="debian_slim", num_servers=1, concurrency=CHUNK, usd_per_gpu_hour=4.0,
        ),
        data=DataConfig(name="small"), loss=LossConfig(lambda_ce=1.0), draft=Eagle3Config(),
        paths=PathsConfig(str(folder / "datasets"), str(folder / "checkpoints")),
        regen=RegenConfig(temperature=0.0, max_tokens=6, chunk_size=CHUNK),
        resources={
            "volumes": {f"{HOME}/huggingface": "hf", f"{HOME}/specforge": "specforge-datasets"},
            "env": {"HF_HOME": f"{HOME}/huggingface", "SPECFORGE_DATASETS": f"{HOME}/specforge"},
        },
    )  # fmt: skip


def write_prompts(cfg: Config, texts: list[str]) -> None:
    """What prep would write; text n has the id c<n>. The last conversation is held out."""
    folder = Path(cfg.paths.datasets) / cfg.data.name
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"id": f"c{n}", "conversations": [{"role": "user", "content": text}]}) + "\n"
        for n, text in enumerate(texts)
    ]
    (folder / "train.jsonl").write_text("".join(lines[:-1]))
    (folder / "eval.jsonl").write_text(lines[-1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def doomed(steps: int) -> None:
    """Let this process die at the `steps`-th of what it does, counted before and after."""
    left = steps

    def deadly(function: Any) -> Any:
        def step(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if function is write and random.random() < 0.5:
                    journal, entry = arguments
                    with journal.path.open("ab") as file:
                        file.write(json.dumps(entry).encode()[:20])
                die()
            done = function(*arguments)
            left -= 1
            if left == 0:
                die()
            return done

        return step

    write = modal_calls.Journal.write
    modal_calls.Journal.write = deadly(write)  # type: ignore[method-assign]
    for name in ("add", "finish"):
        setattr(Store, name, deadly(getattr(Store, name)))


def die_when_spawned(calls: int) -> None:
    """Let this process die once so many calls are written down; results wait until then."""
    write = modal_calls.Journal.write

    def counted(self: Any, entry: dict[str, Any]) -> None:
        if "call" not in entry:
            return  # as if no result had come yet
        write(self, entry)
        if len(self.calls) == calls:
            die()

    modal_calls.Journal.write = counted  # type: ignore[method-assign]
    modal_engine.Client.keep = lambda *arguments: None  # type: ignore[method-assign]


def hear_nothing_before(file: Path) -> None:
    """Take no call's result while that file is there."""
    result_of = modal_engine.result_of

    async def later(call: str) -> Any:
        while file.exists():
            await asyncio.sleep(0.02)
        return await result_of(call)

    modal_engine.result_of = later


def live(cfg: Config) -> int:
    """Regenerate in a fork; its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            regen(cfg)
            code = 0
        except InputError as error:
            print(f"error: {error}")
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    """Live and die."""
    folder, conversations, seed, kills = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cfg = config(folder, seed)
    if len(sys.argv) > 6:
        cfg.engine.command = sys.argv[5:]
    if "HOLD_ANSWERS" in os.environ:
        own = f"HOLD = {os.environ['HOLD_ANSWERS']!r}"
        cfg.engine.command[2] = cfg.engine.command[2].replace('HOLD = "/no/file"', own)
    if "HOLD" in os.environ:
        hear_nothing_before(Path(os.environ["HOLD"]))
    random.seed(seed)
    methods = modal_calls.Journal.write, Store.add, Store.finish, modal_engine.Client.keep
    killed = 0
    while killed < kills:
        if sys.argv[5:] == ["spawned"]:
            die_when_spawned(-(-(conversations - 1) // CHUNK) + 1)
        else:
            doomed(random.randint(1, 16))
        assert os.waitstatus_to_exitcode(live(cfg)) == -signal.SIGKILL, "it lived"
        killed += 1
        modal_calls.Journal.write, Store.add, Store.finish, modal_engine.Client.keep = methods  # type: ignore[method-assign]
    print(f"killed {killed} times", flush=True)
    if sys.argv[5:] != ["spawned"]:
        sys.exit(os.waitstatus_to_exitcode(live(cfg)))


if __name__ == "__main__":
    main()
