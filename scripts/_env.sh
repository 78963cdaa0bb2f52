# Sourced by scripts/test and scripts/quickstart. Defines `root`, the checkout, and `set_up`, which leaves
# `python` naming an interpreter that has the project and its dependencies installed.
# shellcheck shell=bash

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

# Prints the interpreter to set up with: $PYTHON if it is set, else the one of an earlier set-up, else the
# first suitable one on PATH. There `python3` comes first, because it is the one that its user has chosen.
find_python() {
    local candidates candidate
    candidates=("$root/.venv/bin/python" python3 python3.12 python3.11 python3.13)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
            >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        printf 'error: PYTHON=%s is not Python 3.11, 3.12 or 3.13 with the venv module\n' "$PYTHON" >&2
    else
        printf 'error: found no Python 3.11, 3.12 or 3.13 with the venv module (Debian, Ubuntu: python3-venv); %s\n' \
            'install one, or name one that is not on PATH: PYTHON=/path/to/python3.12' >&2
    fi
    return 1
}

# set_up [EXTRA]: installs the checkout into its .venv, with that extra of pyproject.toml.
set_up() {
    local base status=0
    base="$(find_python)" || exit 1
    "$base" "$root/scripts/_env.py" "$@" || status=$?
    [ "$status" -eq 0 ] || exit "$status"
    python="$root/.venv/bin/python"
}
