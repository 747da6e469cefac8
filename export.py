"""Write the folder that serving engines load."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run


@command
def main(cfg: DictConfig) -> object:
    return run("specforge_exp.stages.export:export", cfg)


if __name__ == "__main__":
    main()
