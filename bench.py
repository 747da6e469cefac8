"""Measure the accepted length and the speed-up of an exported draft, or of every run of a sweep."""

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from specforge_exp.config import InputError, from_omegaconf, schema
from specforge_exp.report.record import bench_all

ConfigStore.instance().store(name="schema", node=schema())


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> object:
    try:
        from specforge_exp.stages import bench, export  # they load torch

        return bench_all(from_omegaconf(cfg), export.export, bench.bench)
    except InputError as error:
        raise CompactHydraException(f"error: {error}") from None


if __name__ == "__main__":
    main()
