"""The options that both sweepers have, with the same meaning."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra_sweeps.errors import SweepError


@dataclass
class SweepConf:
    """What is searched, what its runs are called and return, what is called before and after."""

    params: dict[str, str] | None = None
    """What is swept, as on the command line, by key; the command line wins. A study searches
    choice(a,b), range(1,9), interval(0.0,1.0), tag(log,interval(1e-5,1e-3)), a,b,c, glob(*); a
    single value is an override of all jobs."""
    repeats: int = 1
    """Runs of each choice, with this many values of `repeat_key`; a study refuses more than one."""
    dry_run: bool = False
    """Print what would run, start and write nothing."""
    names: list[str] = field(default_factory=lambda: ["value"])
    """What the values that a job returns are called; [] when it returns none. Unless named, several
    directions are those of value_0, value_1, ..."""
    direction: Any = "maximize"
    """maximize or minimize, or a list with one for each of `names`; the first ranks the table."""
    name_key: str | None = None
    """The key that names a run. In a grid two runs that would have the same name get the choices in
    which they differ (null: they are refused); a study adds _trial<number> (null:
    hydra.sweep.subdir has to depend on ${hydra.job.num})."""
    record: dict[str, Any] = field(default_factory=dict)
    """Kept in sweep.json with every run, resolved in its configuration."""
    ignore: list[str] = field(default_factory=list)
    """Keys of a job's configuration that do not make it another run or point."""
    inputs: list[Any] = field(default_factory=list)
    """Files and folders that a job reads, or lists of them, named in its configuration: with
    another content it is another run. Of a file above 64 MiB 16 blocks count. For much data name a
    record with its digests."""
    precheck: str | None = None
    """Dotted path of a function (script, configurations) that is called with what is to run here
    before the first job starts; what it raises refuses the sweep."""
    report: str | None = None
    """Dotted path of a function (cfg, sweep_dir) that is called at the end."""

    def __post_init__(self) -> None:
        """Name the values of a file that knows nothing of names, such as hydra-optuna-sweeper's."""
        if self.listed and len(self.direction) > 1 and [*self.names] == ["value"]:
            self.names = [f"value_{index}" for index in range(len(self.direction))]

    @property
    def listed(self) -> bool:
        """Whether `direction` is a list."""
        return isinstance(self.direction, Sequence) and not isinstance(self.direction, str)

    @property
    def directions(self) -> list[str]:
        """maximize or minimize, for each of `names`; SweepError where they do not fit."""
        entries = self.direction if self.listed else [self.direction] * len(self.names)
        words = [str(getattr(entry, "name", entry)).lower() for entry in entries]
        if len(words) != len(self.names) or {*words} - {"maximize", "minimize"}:
            raise SweepError(
                f"hydra.sweeper.direction={self.direction} must be maximize or minimize, or a list "
                f"with one of them for each of hydra.sweeper.names={list(self.names)}"
            )
        return words

    def check_counts(self, *counts: str) -> None:
        """SweepError for one of these options that is neither null nor at least 1."""
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise SweepError(f"hydra.sweeper.{name}={value} must be at least 1")
