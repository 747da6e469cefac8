#!/usr/bin/env bash
# Prompts to tau with the tiny target that comes with the repository: minutes on two CPU cores.
# The six commands are the whole pipeline; run any of them again and it says "complete, reused".
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

$python prep.py experiment=quickstart "$@"        # prompts -> artifacts/datasets/quickstart
$python regen.py experiment=quickstart "$@"       # the target answers them -> .../quickstart--tiny
$python preprocess.py experiment=quickstart "$@"  # token ids, supervision, draft vocabulary
$python train.py experiment=quickstart "$@"       # the draft -> artifacts/checkpoints/quickstart_full-opd
$python export.py experiment=quickstart "$@"      # the folder that SGLang and vLLM load
$python bench.py experiment=quickstart "$@"       # tau -> .../quickstart_full-opd/bench.json
