#!/usr/bin/env bash
# Fetches into .wheels/ what a bare GPU machine lacks beside torch, accelerate and transformers (27 MB), for tools/gpu.sh:
#     bash tools/gpu_wheels.sh [PYTHON_VERSION]        3.12 unless told otherwise
# Versions are those of tools/constraints.txt; packages that publish no wheel are built here, as they hold no binaries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:-3.12}
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python

binary="hjson diffusers kornia kornia_rs pydantic pydantic_core annotated-types typing-inspection xformers simplejpeg
    zlib-ng hydra-core omegaconf webdataset braceexpand importlib_metadata tenacity requests urllib3 charset-normalizer einops msgpack py-cpuinfo"
source="deepspeed antlr4-python3-runtime"
pinned() { for name in "$@"; do grep -i "^${name//[-_]/[-_]}==" tools/constraints.txt | sed 's/ .*//'; done; }

mkdir -p .wheels
rm -f .wheels/*.whl
platforms=()
for glibc in 39 35 34 31 28 27 24 17 14 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
# shellcheck disable=SC2046,SC2086  # lists of words
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest .wheels \
    $(pinned $binary) nvidia-cuda-runtime-cu12==12.9.79
# shellcheck disable=SC2046,SC2086
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .wheels $(pinned $source)
du -sh .wheels
