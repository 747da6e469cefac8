#!/usr/bin/env bash
# What a GPU says of this checkout, in under nine minutes and without a network; writes gpu_check.json.
#   bash runs/gpu_check.sh                      on a machine with CUDA, in any environment with torch and transformers
#   WHEELS=wheels bash runs/gpu_check.sh        what else is missing comes from a folder of wheels
#   bash runs/gpu_check.sh --collect wheels     fills that folder, where there is a network
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
packages=(hydra-core omegaconf antlr4-python3-runtime safetensors tqdm aiohttp orjson bokeh pytest hypothesis)

if [ "${1:-}" = --collect ]; then
    # The one sdist (antlr4's) is built into a wheel; everything else is taken as it is offered.
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$2" -c constraints.txt antlr4-python3-runtime
    exec "$python" -m pip download --quiet --dest "$2" --find-links "$2" -c constraints.txt --only-binary :all: \
        --python-version "${PYTHON_VERSION:-3.12}" "${packages[@]}"
fi
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" --target "$site" "${packages[@]}"
    export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" benchmarks/gpu_check.py "$@"
