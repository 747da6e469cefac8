"""report: what a sweep or some runs found, as a page, a table and CSV files.

Reads <sweep>/sweep.json and the folders of its runs, also while they run; writes report.html,
report.md, report.csv and curves.csv into <sweep>; with run= into the run's folder, or below
<checkpoints>/sweeps/compared/ for several.
"""

import logging
import shlex
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from specforge_exp.artifacts import disk_errors
from specforge_exp.config import Config, ReportConfig
from specforge_exp.config.machine import script
from specforge_exp.errors import InputError
from specforge_exp.report.collect import ACCEPTED, Collected, collect
from specforge_exp.report.page import page
from specforge_exp.report.ranking import headline, rank
from specforge_exp.report.record import find_sweep, no_sweep
from specforge_exp.report.single import collect_runs, distribution_table
from specforge_exp.report.table import (
    columns,
    markdown,
    markdown_table,
    write_csv,
    write_curves,
    written,
)

log = logging.getLogger(__name__)

PRINTED = 40
"""Rows of the printed table, at most."""
SPREAD = 2
"""Runs whose distributions are printed beside each other, at most."""


def report(cfg: Config) -> None:
    """Write the report of what `run` or `sweep` names, and print its table."""
    if cfg.run:
        names = [cfg.run] if isinstance(cfg.run, str) else [*map(str, cfg.run)]
        write(collect_runs(names, cfg.paths.checkpoints), cfg.report)
        return
    if cfg.sweep is None:
        root = Path(cfg.paths.checkpoints) / "sweeps"
        raise InputError(
            f"sweep=<dir> is missing: {no_sweep(root, root)}; run=<name> shows one run"
        )
    make(find_sweep(cfg.sweep, cfg.paths.checkpoints), cfg.report)


def at_end(cfg: DictConfig, sweep_dir: str | Path) -> None:
    """The same at the end of a sweep, from the configuration that Hydra composed.

    Raises:
        InputError: with the command that makes it later.
    """
    options = OmegaConf.to_object(OmegaConf.merge(ReportConfig, cfg.get("report") or {}))
    assert isinstance(options, ReportConfig)
    try:
        make(Path(sweep_dir), options)
    except Exception as error:
        again = f"{script('report')} {shlex.quote(f'sweep={sweep_dir}')}"
        raise InputError(f"{again} makes it later ({type(error).__name__}: {error})") from error


def make(sweep_dir: Path, options: ReportConfig) -> None:
    """Report on a sweep."""
    write(collect(sweep_dir), options)


def metric_of(sweep: Collected, options: ReportConfig) -> str:
    """What is asked for, else what the runs are made for: bench's jobs and causal models have
    another metric than drafts."""
    if options.metric != ReportConfig.metric:
        return options.metric
    if sweep.script == "bench":
        return ACCEPTED
    found = [run.evaluation for run in sweep.runs if run.evaluation]
    return "loss" if found and all("perplexity" in one for one in found) else options.metric


def write(sweep: Collected, options: ReportConfig) -> None:
    """Write the four files and print the table."""
    sweep_dir = sweep.folder
    sweep_dir.mkdir(parents=True, exist_ok=True)
    metric = metric_of(sweep, options)
    ranking = rank(sweep, metric, options.resamples)
    by_seed = rank(sweep, metric, options.resamples, by_seed=True)
    html = sweep_dir / "report.html"
    with disk_errors(html):
        with written(html) as file:
            file.write(page(sweep, ranking, by_seed))
        with written(sweep_dir / "report.md") as file:
            spread = distribution_table(sweep.runs)
            file.write(markdown(sweep, ranking, by_seed) + (spread and f"\n{spread}"))
        write_csv(sweep_dir / "report.csv", ranking, by_seed)
        write_curves(sweep_dir / "curves.csv", sweep)
    for problem in sweep.problems:
        log.warning("report: %s", problem)
    shown = ranking.entries[:PRINTED]
    print(markdown_table(columns(sweep, ranking, seeds=False), shown))
    if spread and len(sweep.runs) <= SPREAD:
        print(f"\n{spread}", end="")
    if len(shown) < len(ranking.entries):
        print(f"... and {len(ranking.entries) - len(shown)} more in {sweep_dir / 'report.md'}")
    print(f"\n{' '.join(headline(ranking))}\n{html}")
