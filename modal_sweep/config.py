"""Every option of hydra/launcher=modal.

`JobSettings` can also stand in a job's own configuration, in the node that `resources` names; there
it wins over what the launcher says, so jobs of one sweep get different machines. A `tasks` mapping
in that node holds what differs between scripts: `tasks: {bench: {gpu: H100}}` counts for bench.py;
`machine` names a function that says the same in Python.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class ImageSettings:
    """The container image. hydra-core, omegaconf and cloudpickle are added as installed here."""

    base: str = "debian_slim"
    """debian_slim, a registry tag such as nvidia/cuda:12.8.1-devel-ubuntu24.04, or published:<name>
    for an image published on Modal."""
    python: str | None = None
    """Python's minor version; null: the one here. Another one is refused: payloads are pickled."""
    apt: list[str] = field(default_factory=list)
    """Debian packages."""
    packages: list[str] = field(default_factory=list)
    """Python packages, as pip takes them."""
    pyproject: str | None = None
    """A pyproject.toml whose dependencies are installed, relative to the script's folder."""
    extras: list[str] = field(default_factory=list)
    """Its optional-dependencies to install as well."""
    constraints: str | None = None
    """A constraints.txt with the versions that everything installed must have, relative to the
    script's folder; what `packages` pins, and what comes from here, wins over it."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables, no secrets."""
    sources: list[str] | None = None
    """Files and folders, relative to the script's folder, that go to /root in the container, and
    packages that can be imported here, by name; null: the source and configuration files of the
    script's folder (with `python -m`, of the folder that holds the package)."""


@dataclass
class JobSettings:
    """What one job runs on."""

    gpu: Any = None
    """H100, H100:8, H100! (never upgraded to an H200), or a list: the first that is free."""
    cpu: float | None = None
    """Physical cores; null: Modal's default."""
    memory: int | None = None
    """MiB; null: Modal's default."""
    timeout: int = 86400
    """Seconds of one attempt, at most 86400. Shortly before, the job gets SIGINT and continues in a
    new attempt."""
    startup_timeout: int = 1200
    """Seconds until the container must have started."""
    retries: int = 10
    """New attempts after a crash or a time-out, at most 10 (preemptions are free, failures are
    final)."""
    single_use: bool | None = None
    """A new container for every job; null: for jobs with a GPU."""
    region: str | None = None
    """Modal region; null: any."""
    cloud: str | None = None
    """Cloud provider; null: any."""
    image: ImageSettings = field(default_factory=ImageSettings)
    """What is installed."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Mount path: name of the Volume, made if missing."""
    secrets: dict[str, list[str]] = field(default_factory=dict)
    """Name of the Modal secret: keys it must have."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the container, no secrets."""
    resolve_there: list[str] = field(default_factory=list)
    """Variables whose `${oc.env:...}` the container resolves, such as the places of its folders; of
    all others a job has what they are here, and one that is not set here is refused."""
    hours: float | None = None
    """Expected hours, for the estimate of the cost; null: unknown."""
    requires: list[Any] = field(default_factory=list)
    """What must exist before a job may start: {volume, path, remedy, local, record, requires}.
    `remedy` is the command that makes it, `requires` what that needs in turn; where the Volume
    lacks it and `local` exists here, that is uploaded. With another content of its file `record` a
    job's result is no longer its own, and it runs again."""
    unique: list[str] = field(default_factory=list)
    """Places the job writes; two jobs with the same one are refused. pull --checkpoints brings
    those that lie on a mounted Volume; from several Volumes, each into a folder of its name."""
    progress_file: str | None = None
    """JSON lines with `step` and `loss`, relative to the output directory or absolute; shown in the
    table, and brought here with the outputs."""
    outputs: list[str] = field(default_factory=list)
    """Small files that lie elsewhere, absolute, and are brought here with the outputs."""
    progress_keys: list[str] = field(default_factory=list)
    """Keys of its lines that a search gets, with the step, while the job runs: to stop it early."""
    validate: str | None = None
    """Dotted path of a function that is called here with a job's configuration and raises when it
    is not valid."""
    machine: str | None = None
    """Dotted path of a function of a script's name and a job's configuration, called here: what it
    returns is laid over the node's settings, and `tasks` over that."""
    without: str | None = None
    """Dotted path of a function of a script's name and a job's configuration, called here where
    Modal does not know the machine: what can be done without an account."""
    checkpoints: str | None = None
    """Glob; the Volumes are committed whenever a new match appears."""


@dataclass
class ModalLauncherConf(JobSettings):
    """The options of a sweep, and the settings of jobs that say nothing else."""

    _target_: str = "hydra_plugins.modal_launcher.launcher.ModalLauncher"
    app: str = "hydra"
    """Prefix of the deployed app (`<app>-<hash of code and image>`) and of its Volume."""
    resources: str = "resources"
    """The node of a job's configuration that holds its settings."""
    volume: str | None = None
    """Volume for outputs and results; null: `<app>-sweeps`."""
    max_parallel: int | None = None
    """Containers at a time, at most; null: as many as Modal gives. A search counts every kind of
    machine apart."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the app, for billing reports."""
    detach: bool = False
    """Return when all jobs are submitted; `modal-sweep attach` brings the results."""
    if_done: str = "skip"
    """When this sweep has the result of the same code and configuration: skip, rerun, fail."""
    max_usd: float | None = 100.0
    """Ask, or refuse without a terminal, above this estimate; null: never."""
    prices: dict[str, float] = field(default_factory=dict)
    """USD per hour by GPU, core and GiB, over the table in client/prices.json."""
    dry_run: bool = False
    """Check everything, print what would run and what it costs, spawn nothing."""
    setup: bool = False
    """Make the Volumes, name the secrets that are missing, spawn nothing."""
    sync_cwd: bool = False
    """Also bring back files that a job made or changed below the launch directory."""
    poll: float = 1.0
    """Seconds between looks at the jobs."""


def register() -> None:
    """Offer hydra/launcher=modal; the last one to say so wins."""
    ConfigStore.instance().store(
        group="hydra/launcher", name="modal", node=ModalLauncherConf, provider="modal_launcher"
    )
