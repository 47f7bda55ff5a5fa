# Sourced by the scripts: makes .venv ready and puts it first on PATH. Quick when nothing has changed since the last time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CPU_TORCH="torch==2.13.0"

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python >= 3.11 with venv on PATH; install one (Debian, Ubuntu: apt-get install python3-venv)." >&2
    return 1
}

has_torch() {
    "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
}

install() {
    local python options=(--clear)
    echo "setup: installing into .venv (minutes, once)"
    # A virtual environment survives neither an interrupted creation nor a move.
    if ! .venv/bin/pip --version 2>/dev/null | grep -qF "from $(pwd -P)/.venv/"; then
        python=$(find_python)
        # A GPU machine keeps the torch that was built for it.
        if command -v nvidia-smi >/dev/null && has_torch "$python"; then options+=(--system-site-packages); fi
        "$python" -m venv "${options[@]}" .venv
    fi
    if ! command -v nvidia-smi >/dev/null && ! has_torch .venv/bin/python; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$CPU_TORCH"
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c tools/constraints.txt
}

stamp=$(pwd -P; cat pyproject.toml tools/constraints.txt tools/setup.sh | cksum)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$stamp" ]; then
    install
    echo "$stamp" >.venv/.installed
fi
export PATH="$PWD/.venv/bin:$PATH"
