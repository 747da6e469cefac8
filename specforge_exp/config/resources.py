"""What a stage runs on when a launcher sends it elsewhere: the config group resources.

The fields are those that hydra_plugins/modal_launcher reads; it knows nothing of this project, and
this project nothing of it.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ImageConfig:
    """The container's image."""

    base: str = "debian_slim"
    """debian_slim, a registry tag, or published:<name>."""
    python: str | None = None
    """Python's minor version; null: the one here, which it must be."""
    apt: list[str] = field(default_factory=list)
    """Debian packages."""
    packages: list[str] = field(default_factory=list)
    """Python packages, as pip takes them."""
    pyproject: str | None = None
    """A pyproject.toml whose dependencies are installed, relative to the script's folder."""
    extras: list[str] = field(default_factory=list)
    """Its optional-dependencies to install as well."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables, no secrets."""
    sources: list[str] | None = None
    """Files and folders, relative to the script's folder, that go to /root in the container;
    null: the source and configuration files of the script's folder."""


@dataclass
class ResourcesConfig:
    """The machine of a job, and what must be there before it starts."""

    gpu: Any = None
    """H100, H100:8, H100! (never an H200), or a list: the first that is free; null: none."""
    cpu: float | None = None
    """Physical cores; null: Modal's default."""
    memory: int | None = None
    """MiB; null: Modal's default."""
    timeout: int = 86400
    """Seconds of one attempt, at most 86400; a longer job continues in a new attempt."""
    startup_timeout: int = 1200
    """Seconds until the container must have started."""
    retries: int = 10
    """New attempts after a crash or a time-out."""
    single_use: bool | None = None
    """A new container for every job; null: for jobs with a GPU."""
    region: str | None = None
    """Modal region; null: any."""
    cloud: str | None = None
    """Cloud provider; null: any."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """What is installed."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Mount path: name of the Volume, made if missing."""
    secrets: dict[str, list[str]] = field(default_factory=dict)
    """Name of the Modal secret: keys it must have."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the container, no secrets."""
    hours: float | None = None
    """Expected hours, for the estimate of the cost; null: the whole timeout counts."""
    requires: list[Any] = field(default_factory=list)
    """What must exist before the job starts: {volume, path, remedy, local}; path null: nothing.
    `local` is uploaded when the Volume lacks the path, else the message names `remedy`."""
    unique: list[str] = field(default_factory=list)
    """Places the job writes; two jobs of a sweep with the same one are refused."""
    progress_file: str | None = None
    """JSON lines with `step` and `loss`, shown while the job runs."""
    progress_keys: list[str] = field(default_factory=list)
    """Keys of its lines that a study gets while the job runs, for pruning."""
    validate: str | None = None
    """Dotted path of the function that checks a job's configuration on the launching machine."""
    checkpoints: str | None = None
    """Glob; the Volumes are committed whenever a new match appears."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """By script: the fields above that differ for prep, regen, preprocess, ..."""
