"""Talk to a model in the terminal: the target with its draft, or any OpenAI-compatible server."""

from omegaconf import DictConfig

from specforge_exp.cli import command, run


@command
def main(cfg: DictConfig) -> object:
    return run("specforge_exp.stages.chat:chat", cfg)


if __name__ == "__main__":
    main()
