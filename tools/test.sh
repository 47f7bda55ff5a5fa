#!/usr/bin/env bash
# Lint, types and tests, with all of their set-up:
#     bash tools/test.sh                           everything but the slow tests and those for a GPU
#     bash tools/test.sh quick                     in a minute or two, without other processes: while you edit
#     bash tools/test.sh GROUP [PYTEST ARGUMENTS]  lint, types, slow, gpu, distributed, or a folder or file of tests/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

group=${1:-all}
shift || true
target=""
case $group in
all | quick | lint | types | slow | gpu | distributed) ;;
*)
    target=$(find tests \( -type d -name "$group" -o -name "test_$group.py" \) ! -name __pycache__ | sort | head -n 1)
    if [ -z "$target" ]; then
        names=$(find tests -mindepth 1 \( -type d -o -name "test_*.py" \) ! -name "__*" ! -name ".*" |
            sed 's|.*/||; s|^test_||; s|\.py$||' | sort -u | tr '\n' ' ')
        echo "test.sh: unknown group '$group'; use one of: quick lint types slow gpu distributed ${names% }" >&2
        exit 2
    fi
    ;;
esac

if [ "$group" = gpu ]; then # a bare GPU machine may have no package index, and lack what other tests need
    mapfile -t files < <(grep -rl --include="test_*.py" "@pytest.mark.gpu" tests | sort)
    for python in .venv/bin/python python3; do
        [ -x "$(command -v "$python")" ] || continue
        if found=$("$python" -m pytest -q --collect-only -m gpu "${files[@]}" 2>&1); then
            exec "$python" -m pytest -m gpu "${files[@]}" "$@"
        fi
        echo "test.sh: $python lacks something: $(grep "^E " <<<"$found" | tail -n 1)" >&2
    done
fi
source tools/setup.sh
export OMP_NUM_THREADS=1 # test processes share the cores
unset PYTHONDONTWRITEBYTECODE # or hundreds of processes would each compile the project

quick=(
    tests/models tests/uda tests/data/images tests/data/stream/test_{domain,order,validation}.py
    tests/stages/test_{adversarial,objective,remedies,segmentation,table}.py
    tests/test_{architecture,batch_layout,config,diffusion,evaluation,labels,losses,ranges,rng,schema,scores}.py
)

lint() {
    ruff check .
    ruff format --check .
    codespell
}

types() {
    basedpyright
}

tests() {
    python -m pytest -n 4 --dist worksteal "$@"  # also on two cores: many tests wait, those of SLURM above all
}

case $group in
all)
    lint
    python -m pytest -q --collect-only >/dev/null 2>&1 & # compiles the tests, once for all processes, on the other core
    trap 'kill $! 2>/dev/null || true' EXIT
    types
    wait || true # what fails here fails in the tests, and is told there
    trap - EXIT
    tests -m "not slow and not gpu" "$@"
    ;;
lint | types) "$group" ;;
quick) tests -m "not slow and not gpu and not distributed" "${quick[@]}" "$@" ;;
slow) tests -m "slow and not gpu" "$@" ;;
gpu) python -m pytest -m gpu "${files[@]}" "$@" ;;
distributed) tests -k distributed -m "not slow and not gpu" "$@" ;; # folder, file, test or marker of that name
*) tests -m "not slow and not gpu" "$target" "$@" ;;
esac
