#!/usr/bin/env bash
# DFlash for Qwen3-8B on a machine of one's own with one to eight GPUs, by the published recipe: prompts, the
# target's own answers by SGLang, training, export, tau on the ten data sets by z-lab's protocol.
#
#   bash runs/dflash_qwen3_8b.sh                          all GPUs of this machine
#   bash runs/dflash_qwen3_8b.sh data.sample_size=20000   options after it go to every stage
#   DRY=1 bash runs/dflash_qwen3_8b.sh                    prints what would run
#   EXPERIMENT=dflash_qwen3_8b_wsd ...                    the rate held, then falling: half the epochs
#   SPECFORGE_SGLANG_PYTHON=/opt/sglang/bin/python ...    the Python that has SGLang; docs/gpu.md
#
# Run it again after anything: what is complete is reused, a training continues from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
options=(experiment="${EXPERIMENT:-dflash_qwen3_8b}" trainer.gpus=auto "$@")

stage() {
    echo "== $*"
    test -n "${DRY:-}" || $python "$1.py" "${@:2}"
}

stage prefetch "${options[@]}"
stage prep "${options[@]}"
stage regen "${options[@]}" engine=sglang
stage preprocess "${options[@]}"
stage train "${options[@]}"
stage export "${options[@]}"
stage bench "${options[@]}" bench=zlab engine=sglang
stage report run="$($python train.py "${options[@]}" --cfg job -p run_name)"
