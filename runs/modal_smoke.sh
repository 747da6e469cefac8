#!/usr/bin/env bash
# Every stage once on Modal with Qwen3-0.6B on one GPU: some minutes, a few USD.
#   make modal-smoke                       with an account; without one, the same stages with the tiny target on a
#                                          Modal of this machine (tests/modal_local), in minutes and for nothing
#   bash runs/modal_smoke.sh max_steps=2   options after it go to every stage
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

if [ -z "${SPECFORGE_SMOKE_HERE:-}" ] &&
    ! $python -c 'import modal.config, sys; sys.exit(not modal.config.config.get("token_id"))'; then
    echo "modal-smoke: no account (\`modal setup\` makes one): on a Modal of this machine, with the tiny target"
    SPECFORGE_SMOKE_HERE=1 exec $python -m tests.modal_local -- bash runs/modal_smoke.sh model=tiny "$@"
fi
for stage in prefetch prep regen preprocess train export bench; do
    echo "== $stage"
    $python $stage.py -m experiment=smoke hydra/launcher=modal "$@"
done
