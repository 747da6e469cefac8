"""Measure the accepted length and the speed-up of an exported draft, or of every run of a sweep."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run


@command
def main(cfg: DictConfig) -> object:
    return run("specforge_exp.stages.bench_sweep:bench_sweep", cfg)


if __name__ == "__main__":
    main()
