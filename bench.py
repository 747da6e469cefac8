"""Measure the accepted length and the speed-up of an exported draft, or of every run of a sweep."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run
from specforge_exp.config import Config


def bench(cfg: Config) -> float:
    from specforge_exp.report.record import bench_all
    from specforge_exp.stages import bench, export

    return bench_all(cfg, export.export, bench.bench)


@command
def main(cfg: DictConfig) -> object:
    return run(bench, cfg)


if __name__ == "__main__":
    main()
