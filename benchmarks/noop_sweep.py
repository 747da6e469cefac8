"""One sweep of no-op jobs with the CPU time of its launcher: what launcher.py runs on both sides.

python noop_sweep.py RECORD.json [Hydra's arguments]
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

spent = {"launch": 0.0, "compose": 0.0}
inside = {"launch": False}


def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, its process CPU time added up; composing counts only inside a launch."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        if name == "launch":
            inside["launch"] = True
        start = time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            if inside["launch"]:
                spent[name] += time.process_time() - start
            if name == "launch":
                inside["launch"] = False

    return timed


@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(cfg: DictConfig) -> int:
    """Do nothing."""
    return int(cfg.i)


if __name__ == "__main__":
    record = sys.argv.pop(1)
    instantiate = Plugins.instantiate_launcher

    def instantiate_clocked(self: Plugins, *args: Any, **kwargs: Any) -> Any:
        """The launcher with a clocked `launch`."""
        launcher = instantiate(self, *args, **kwargs)
        launcher.launch = clocked("launch", launcher.launch)  # type: ignore[method-assign]
        return launcher

    Plugins.instantiate_launcher = instantiate_clocked  # type: ignore[method-assign]
    ConfigLoaderImpl.load_sweep_config = clocked(  # type: ignore[method-assign]
        "compose", ConfigLoaderImpl.load_sweep_config
    )
    main()
    with open(record, "w") as file:
        json.dump(spent, file)
