"""Turn conversations into token ids, supervision and the draft's vocabulary."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run


@command
def main(cfg: DictConfig) -> object:
    return run("specforge_exp.stages.preprocess:preprocess", cfg)


if __name__ == "__main__":
    main()
