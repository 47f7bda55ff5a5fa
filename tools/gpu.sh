#!/usr/bin/env bash
# Everything that only a GPU can show, on a machine without a network, in at most 20 minutes:
#     bash tools/gpu.sh FOLDER                             all parts; at most 8 files in FOLDER, gpu.json after each part
#     TOTAL=530 bash tools/gpu.sh FOLDER                   ends within so many seconds: the last parts may not be begun
#     ONLY="tests stage1" bash tools/gpu.sh FOLDER         some of them, again
#     LIMIT=100 VARIANTS="eager fp32" ONLY=stage1 ...      at most so many seconds a part; of the stages, these variants
#     EVIDENCE=data ONLY=evidence bash tools/gpu.sh FOLDER    the grid data/grid.yaml, on shards that lie in data
# The machine brings its own torch, accelerate and transformers. What else is needed lies in .wheels/, where
# `bash tools/gpu_wheels.sh` has put it on a machine with a package index; with a .venv or without that folder, what is
# installed is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: bash tools/gpu.sh FOLDER}
end=$(($(date +%s) + ${TOTAL:-0})) # what follows counts: to install, to import, to end and to draw

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# A signal to this script alone reaches the parts before their scratch folder goes.
child=
trap 'trap "" TERM INT; [ -z "$child" ] || { kill -TERM "$child" 2>/dev/null; wait "$child"; }; exit 143' TERM INT
if [ "$python" = python3 ] && compgen -G ".wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" .wheels/*.whl
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
    # xformers is built for CUDA 12: on a machine with CUDA 13 its library finds the older runtime here.
    for library in "$scratch"/site/nvidia/*/lib; do
        [ -d "$library" ] && export LD_LIBRARY_PATH="$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    done
fi
export PYTHONPATH="$PWD:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONDONTWRITEBYTECODE=1
export TMPDIR="$scratch" TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}" # three parts compile at a time, beside others
# shellcheck disable=SC2086  # ONLY is a list of words
"$python" tools/gpu.py "$folder" ${ONLY:+--only $ONLY} ${LIMIT:+--limit-s "$LIMIT"} \
    ${TOTAL:+--end "$end"} &
child=$!
wait "$child"
