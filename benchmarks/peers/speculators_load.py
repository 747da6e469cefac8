"""What speculators makes of a draft in its format: which tensors are others there than in the file.

    python -m peers.speculators_load FOLDER

The last line is JSON: algorithm, tensors of the file, those that `differ`, lack or are left over.
"""

import argparse
import json
import warnings
from pathlib import Path


def main() -> None:
    """Load with its own class and compare."""
    parser = argparse.ArgumentParser(description="What speculators makes of a draft")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    warnings.filterwarnings("ignore")
    from safetensors.torch import load_file
    from speculators.config import reload_schemas
    from speculators.model import SpeculatorModel

    reload_schemas()
    model = SpeculatorModel.from_pretrained(folder)
    held, file = model.state_dict(), load_file(folder / "model.safetensors")
    same = {name for name, value in file.items() if name in held and held[name].equal(value)}
    of_verifier = {*model._keys_to_ignore_on_load_missing}
    differ = sorted((file.keys() | held.keys()) - same - of_verifier)
    algorithm = model.config.speculators_config.algorithm
    print(json.dumps({"algorithm": algorithm, "tensors": len(file), "differ": differ}))


if __name__ == "__main__":
    main()
