"""Tune a causal language model on conversations."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run


@command
def main(cfg: DictConfig) -> object:
    return run("specforge_exp.stages.sft:sft", cfg)


if __name__ == "__main__":
    main()
