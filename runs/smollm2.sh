#!/usr/bin/env bash
# SmolLM2-135M-Instruct, real prompts, two losses: one set of answers, one draft per loss, one table.
# About an hour on two CPU cores; the answers and the tokens are made once and reused.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
losses=${LOSSES:-baseline full-opd}

$python runs/fetch_smollm2.py
$python prep.py experiment=smollm2 "$@"
$python regen.py experiment=smollm2 "$@"
$python preprocess.py experiment=smollm2 "$@"
for loss in $losses; do
    $python train.py experiment=smollm2 loss="$loss" "$@"
    $python export.py experiment=smollm2 loss="$loss" "$@"
    $python bench.py experiment=smollm2 loss="$loss" "$@"
done
