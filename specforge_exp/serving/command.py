"""The command line of a server: SGLang's, vLLM's, or another's that the options name."""

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from specforge_exp.config import EngineConfig
from specforge_exp.errors import InputError
from specforge_exp.serving import sglang, vllm


@dataclass(frozen=True)
class Speculation:
    """A draft for a server."""

    folder: str
    """The export."""
    options: dict[str, Any]
    """What this server's options say of a draft of its kind."""


def program(options: EngineConfig) -> ModuleType:
    """The server that an engine starts."""
    return vllm if options.server_name == "vllm" else sglang


def answering(options: EngineConfig) -> dict[str, Any]:
    """The options of the engine's server that its answers depend on, where they are given."""
    if options.name == "transformers":
        return {}
    names: dict[str, Any] = {"served_name": options.served_name}
    if options.name != "openai":  # which starts none
        sizes = program(options).SIZES
        args = {k: v for k, v in options.args.items() if k.replace("-", "_") not in sizes}
        names |= {"command": options.command, "args": args}
    return {name: value for name, value in names.items() if value}


def check_installed(options: EngineConfig) -> None:
    """Raise InputError when neither the engine's server nor another's command is at hand."""
    module = program(options).MODULE
    own = not options.command and options.python is None
    if own and importlib.util.find_spec(module) is None:
        raise InputError(
            f"engine={module} needs {module}, whose versions are not ours: pip install {module} in "
            "an environment of its own and name its Python with engine.python=..., or another "
            "server with engine.command=[...]"
        )


def server_command(
    options: EngineConfig, model: str, tp_size: int, port: int, draft: Speculation | None = None
) -> list[str]:
    """The command line of one server, with its options for a draft if there is one.

    `engine.args` win over the options for a draft; one that is a mapping gives some of its keys.
    """
    python = options.python or sys.executable
    if options.command:
        values = {"{model}": model, "{port}": str(port), "{tp_size}": str(tp_size)}
        values["{draft}"] = draft.folder if draft else ""
        command = list(options.command)
        for name, value in values.items():
            command = [word.replace(name, value) for word in command]
        # The Python that runs this, whether its folder is on the PATH or not.
        return [python, *command[1:]] if command[0] == "python" else command
    server = program(options)
    flags = server.drafting(draft.options, draft.folder, python) if draft else {}
    for key, value in options.args.items():
        both = isinstance(value, dict) and isinstance(flags.get(key), dict)
        flags[key] = flags[key] | value if both else value
    command = [python, *server.arguments(model, tp_size, port)]
    for key, value in flags.items():
        command += server.flag(key, value)
    return command
