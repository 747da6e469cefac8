"""A job that says as what it runs."""

import os
import signal
import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="plain")
def main(cfg: DictConfig) -> dict[str, object]:
    files = sorted(os.listdir("/proc/self/fd"))[:-1]  # the last reads that folder
    return {
        "environment": {key: os.environ[key] for key in os.environ if key != "MODAL_TASK_ID"},
        "python": [sys.argv, sys.path, sys.executable, str(sys.flags)],
        "files": [os.readlink(f"/proc/self/fd/{number}").partition(":")[0] for number in files],
        "handlers": [str(signal.getsignal(number)) for number in (2, 13, 15, 17)],
        "leads": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getppid()],
        "cwd": os.getcwd(),
        "of": sorted(name for name in sys.modules if name.startswith(("hydra_", "modal_sweep"))),
        "here": sorted(
            name
            for name, module in sys.modules.items()
            if (file := getattr(module, "__file__", None) or "")[:1] == "/"
            and not file.startswith((sys.prefix, sys.base_prefix))
            and name != "__mp_main__"  # another name of __main__, if Python began with that
        ),
    }


if __name__ == "__main__":
    main()
