"""Show what a sweep found: a page, a table, CSV files."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run


@command
def main(cfg: DictConfig) -> object:
    return run("specforge_exp.stages.report:report", cfg)


if __name__ == "__main__":
    main()
