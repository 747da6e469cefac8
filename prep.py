"""Collect the prompts of a data set."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run


@command
def main(cfg: DictConfig) -> object:
    return run("specforge_exp.stages.prep:prep", cfg)


if __name__ == "__main__":
    main()
