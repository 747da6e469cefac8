"""Show what a sweep found: a page, a table, CSV files."""

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from specforge_exp.config import InputError, from_omegaconf, schema

ConfigStore.instance().store(name="schema", node=schema())


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> object:
    try:
        config = from_omegaconf(cfg)
        from specforge_exp.stages.report import report  # loads bokeh

        return report(config)
    except InputError as error:
        raise CompactHydraException(f"error: {error}") from None


if __name__ == "__main__":
    main()
