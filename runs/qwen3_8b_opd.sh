#!/usr/bin/env bash
# From nothing to a served draft of Qwen3-8B, on Modal: four losses at three learning rates each, the
# best of the twelve by accepted length. Every step can be interrupted and run again: what is
# complete is reused, and jobs go on without this machine (modal-sweep attach <sweep directory>).
#
#   bash runs/qwen3_8b_opd.sh        options after it go to every step: resources=h100 epochs=3
#   DRY=1 bash runs/qwen3_8b_opd.sh  prints every step's jobs, machines, cost and what it lacks
#   MAX_USD=2000 ...                 what a step may cost by the estimate without being asked
#
# Without an account: DRY=1 python -m tests.modal_local -- bash runs/qwen3_8b_opd.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
checkpoints=${SPECFORGE_CHECKPOINTS:-artifacts/checkpoints}
launcher=(
    hydra.launcher.app=specforge "hydra.launcher.max_usd=${MAX_USD:-100}"
    ${DRY:+hydra.launcher.dry_run=true}
)
options=(experiment=qwen3_8b_opd "${launcher[@]}" "$@")
grid=('loss=glob(*)' lr_point=low,mid,high)

# One stage as jobs on Modal. A dry run names what the stages before did not make.
stage() {
    echo "== $*"
    $python "$1.py" -m "${@:2}"
}

# The Volumes; names the secrets that are missing (none for an open model without W&B).
test -n "${DRY:-}" || $python -m modal_sweep setup train.py "${options[@]}"

# The weights, once, into the hub cache that all jobs mount.
stage prefetch "${options[@]}"

# Prompts, the target's own answers to them, token ids.
stage prep "${options[@]}"
stage regen "${options[@]}"
stage preprocess "${options[@]}"

# Every stage once with Qwen3-0.6B on one GPU, some minutes and a few USD, before the expensive step.
for name in prefetch prep regen preprocess train export bench; do
    stage "$name" experiment=smoke "${launcher[@]}" ${SMOKE:-}
done

# Twelve trainings, 8 GPUs each.
stage train "${grid[@]}" "${options[@]}"

# Each as a folder that SGLang loads, and its accepted length on 160 prompts.
stage export "${grid[@]}" "${options[@]}"
stage bench "${grid[@]}" "${options[@]}"
test -z "${DRY:-}" || exit 0

# The measurements come here, and the export of the best.
sweep=$checkpoints/sweeps/qwen3_8b_opd/bench
$python -m modal_sweep pull --checkpoints "$sweep"
best=$(find "$sweep/modal" -name bench.json -exec $python -c '
import json, sys
results = [json.load(open(path)) for path in sys.argv[1:]]
results.sort(key=lambda result: result["average"])
for result in results:
    print("tau %.3f  %s" % (result["average"], result["draft"]), file=sys.stderr)
print(results[-1]["draft"].split("/")[-2])' {} +)
mkdir -p "$checkpoints/$best"
$python -m modal volume get --force specforge-checkpoints "$best/export" "$checkpoints/$best"

# A chain of 5, as benched: 5 steps, and the token that the target adds.
echo "
The best draft is $checkpoints/$best/export. On a machine with a GPU and SGLang:

python -m sglang.launch_server --model-path Qwen/Qwen3-8B --dtype bfloat16 \\
    --speculative-algorithm EAGLE3 --speculative-draft-model-path $checkpoints/$best/export \\
    --speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6"
