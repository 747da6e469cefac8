"""What the user reads: the dry run, how a sweep ended, how to come back to it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modal_sweep.client import cost, preflight
from modal_sweep.client.failures import LOGIN, modal_errors
from modal_sweep.client.image import digest
from modal_sweep.client.plan import Job
from modal_sweep.client.settings import gpu_list, volume_name
from modal_sweep.client.table import rich_table
from modal_sweep.client.volumes import volume
from modal_sweep.config import ModalLauncherConf
from modal_sweep.errors import LaunchError
from modal_sweep.protocol.journal import JobRecord, Journal

COLUMNS = ("job", "overrides", "gpu", "timeout", "hours", "USD expected", "USD at most")


def say(text: str) -> None:
    """One line or more on standard error, where the table is too."""
    print(text, file=sys.stderr, flush=True)


def rehearse(jobs: Sequence[Job], conf: ModalLauncherConf, sweep_dir: Path) -> None:
    """Print what would run and what it needs; spawn nothing. With setup, make the Volumes."""
    console_print(job_table(jobs, conf))
    expected, most = preflight.totals(jobs, conf)
    say(
        f"estimate {expected:.2f} USD, at most {most:.2f} USD per attempt "
        f"(list prices of {cost.PRICES_DATE}; overridable: hydra.launcher.prices)"
    )
    for job in {job.code.digest + str(job.image): job for job in jobs}.values():
        packages = " ".join(job.image["packages"])
        pins = job.image.get("constraints", [])
        tested = f"; in the versions of {len(pins)} constraints, {digest(pins)}" if pins else ""
        say(f"image {job.image['base']}, Python {job.image['python']}: {packages}{tested}")
        say(f"ships {len(job.code.files)} files, code {job.code.digest[:12]}")
    volumes = preflight.volume_names(jobs, volume_name(conf))
    secrets = preflight.required_secrets(jobs)
    say(f"Volumes {', '.join(volumes)}; secrets {', '.join(sorted(secrets)) or 'none'}")
    if conf.setup:
        with modal_errors():
            set_up(volumes, secrets)
        return
    for problem in problems(jobs, conf, Journal(sweep_dir)):
        say(f"a launch would be refused: {problem}")
    say(f"dry run: nothing was spawned; outputs would come to {sweep_dir}")


def problems(jobs: Sequence[Job], conf: ModalLauncherConf, journal: Journal) -> list[str]:
    """What would keep these jobs from being spawned now; says what would be uploaded."""

    def inputs() -> None:
        lacking, uploads = preflight.inputs(jobs)
        for entry in uploads:
            say(f"would upload {entry['text']}")
        if lacking:
            raise LaunchError("\n".join(lacking))

    refusals = []
    for check in (
        lambda: journal.sweep and preflight.refuse_elsewhere(journal, conf),
        inputs,
        lambda: preflight.check_cost(jobs, conf, ask=False),
    ):
        try:
            with modal_errors(without=str):
                check()
        except LaunchError as error:
            refusals.append(str(error))
            if LOGIN in str(error):
                break
    return refusals


def set_up(volumes: Sequence[str], secrets: dict[str, set[str]]) -> None:
    """Make the Volumes; name the secrets that only the user can make."""
    for name in volumes:
        volume(name).hydrate()
        say(f"Volume {name}: there")
    commands = preflight.missing_secrets(secrets)
    for command in commands:
        say(f"missing: {command}")
    if commands:
        raise LaunchError(f"{len(commands)} secrets are missing; make them with the commands above")
    say("everything is there")


def job_table(jobs: Sequence[Job], conf: ModalLauncherConf) -> Any:
    """Jobs, machines and money."""
    rows = []
    for job in jobs:
        expected, most = cost.estimate(job.settings, conf.prices)
        rows.append(
            (
                str(job.number),
                " ".join(job.overrides) or "-",
                " or ".join(gpu_list(job.settings.gpu)) or "none",
                f"{job.settings.timeout / 3600:.1f} h",
                "?" if job.settings.hours is None else f"{job.settings.hours:g}",
                "?" if expected is None else f"{expected:.2f}",
                f"{most:.2f}",
            )
        )
    return rich_table(rows, COLUMNS)


def console_print(what: Any) -> None:
    """A rich object on standard error, as wide as it needs where there is no terminal."""
    from rich.console import Console

    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(what)


def detached(journal: Journal) -> None:
    """When this process ends before its jobs do: how to come back to them."""
    folder = journal.sweep_dir
    say(
        "\nthe jobs go on without this process; the same command for the same directory "
        "continues with them:\n"
        f"  modal-sweep attach {folder}    waits and brings the results\n"
        f"  modal-sweep status {folder}    looks once\n"
        f"  modal-sweep cancel {folder}    ends the jobs"
    )


def summary(journal: Journal, records: Sequence[JobRecord]) -> None:
    """The end of a sweep in one line, and every job that did not complete."""
    broken = sum(record.broken for record in records)
    completed = f"{len(records) - broken} of {len(records)} jobs completed"
    say(f"{completed}; outputs in {journal.sweep_dir}")
    if broken < len(records) and any(record.plan["unique"] for record in records):
        pull = f"modal-sweep pull --checkpoints {journal.sweep_dir}"
        say(f"checkpoints and what else they wrote are on the Volumes; here with: {pull}")
    if broken:
        say(f"run those again: modal-sweep rerun --failed {journal.sweep_dir}")
    if away := [record for record in records if record.unpulled]:
        why = f"the outputs of {len(away)} jobs are not here ({away[0].unpulled})"
        say(f"{why}: modal-sweep pull {journal.sweep_dir}")


def failure_text(journal: Journal, record: JobRecord) -> str:
    """Why a job failed, the end of its log and where the rest is."""
    end = record.end or {}
    error = end.get("error") or {}
    lines = [f"{record.label} {record.status}: {error.get('type')}: {error.get('message')}"]
    tail = [f"  | {line}" for line in (end.get("tail") or "").splitlines()[-12:]]
    if tail:
        lines += ["the end of its log:", *tail]
    lines.append(f"all of it: modal-sweep logs {journal.sweep_dir} {record.number}")
    return "\n".join(lines)
