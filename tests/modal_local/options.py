"""What a caller may set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass
class Options:
    """Settings of one control plane."""

    state_dir: str = ""  # empty: a temporary folder, removed on stop
    port: int = 0
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> {KEY: value}
    share: tuple[str, ...] = ()  # host paths that containers may write
    container_env: dict[str, str] = field(default_factory=dict)
    isolation: str = "auto"  # auto | namespaces | plain
    forks: str = ""  # socket of a process that forks isolated containers; empty: they start cold
    torch_forks: str = ""  # the same, of those whose image installs torch
    gpus: int = 64  # GPUs that exist; a container waits until as many as it asks for are free
    max_containers: int = 8  # of all functions together, to keep a laptop alive
    max_idle: float = 5.0  # upper bound of every scaledown_window, in seconds
    result_ttl: float = 7 * 86400.0  # seconds from the end of a call to the loss of its results
    heartbeat: float = 2.0  # seconds between heartbeats: a cancellation takes at most this long
    preempt_target: str = "main"  # main | group: who gets the SIGINT of a preemption
    preempt_grace: float = 30.0
    crash_retries: int = 8  # containers an input may take down before it fails
    retry_delay_scale: float = 1.0  # 0 makes every retry immediate
    max_pending_spawn: int = 1_000_000
    max_map_outstanding: int = 1000
    app_heartbeat_timeout: float = 60.0  # an ephemeral app whose client went silent is stopped
    background_commit: float = 5.0  # seconds between the commits a container does not ask for
    commit_reloads: bool = True  # commit() ends with a reload, which open files prevent
    verbose: bool = False


def set_option(options: Options, assignment: str) -> None:
    """Apply one `field=value` of the command line."""
    name, separator, text = assignment.partition("=")
    fields = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}
    current = fields.get(name)
    if not separator or not isinstance(current, (bool, int, float, str)):
        known = sorted(k for k, v in fields.items() if isinstance(v, (bool, int, float, str)))
        raise ValueError(f"--option {assignment}: expected field=value with one of {known}")
    if isinstance(current, bool):
        setattr(options, name, text.lower() in ("1", "true", "yes"))
    else:
        setattr(options, name, type(current)(text))


def add_secret(options: Options, text: str) -> None:
    """Apply one `NAME:KEY=VALUE` of the command line."""
    name, colon, pair = text.partition(":")
    key, equals, value = pair.partition("=")
    if not (name and colon and key and equals):
        raise ValueError(f"--secret {text}: expected NAME:KEY=VALUE")
    options.secrets.setdefault(name, {})[key] = value
