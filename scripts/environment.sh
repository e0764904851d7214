# Sourced by quickstart.sh and test.sh. `prepare_environment SET` makes .venv in the repository's root and installs the package there,
# editable, with the versions of constraints.txt; SET is `base` or `test`. It does so once: a stamp holds the fingerprint of all that an
# installation depends on, and while that stays the same nothing is installed and no index is contacted.
#
#   PYTHON            interpreter to make .venv with (default: the one that .venv has, else the first Python >= 3.11 on the path)
#   T2I_TORCH_INDEX   URL of an index to take torch and torchvision from, for example one with CPU-only wheels; its versions count then
#   PIP_*, pip.conf   pip's own settings hold for everything else

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

say() { printf '%s\n' "$*" >&2; }

fail() { # MESSAGE [HINT]...
    say "error: $1"
    shift
    for hint in "$@"; do say "  $hint"; done
    exit 1
}

choose_python() {
    local candidates=("$venv/bin/python" python3 python3.14 python3.13 python3.12 python3.11 python) candidate
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 found; tried: ${candidates[*]}" "Install one, or name it: PYTHON=/path/to/python3.12 bash scripts/quickstart.sh"
}

minor_version() { "$1" -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

make_venv() {
    local python version
    python=$(choose_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(minor_version "$venv/bin/python")" = "$version" ]; then return; fi
    say "Making .venv with Python $version ..."
    if [ "$python" = "$venv/bin/python" ]; then fail "$venv has no pip" "Remove that folder and run this again."; fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments" "On Debian and Ubuntu: apt install python$version-venv"
    "$python" -m venv --clear "$venv" || fail "could not make $venv" "Is the disk full, or the folder not yours to write?"
}

fingerprint() { # SET
    { cat "$root/pyproject.toml" "$root/scripts/constraints.txt"; printf '%s\n' "$root" "$1"; "$venv/bin/python" --version; } |
        "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

installed() { [ "$(cat "$venv/installed-$1" 2>/dev/null)" = "$(fingerprint "$1")" ]; } # SET

pip_install() { # ARGUMENT...; without --user, which some set for all of pip and which cannot work here
    PIP_USER=0 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        fail "the installation failed; pip says why above" \
            "Behind a proxy or without internet: PIP_PROXY, PIP_INDEX_URL and PIP_FIND_LINKS tell pip where to look." \
            "With CUDA libraries it takes about 7 GB of disk; T2I_TORCH_INDEX=URL takes torch from an index of CPU-only wheels." \
            "Running this again goes on from here."
}

prepare_environment() { # SET
    local constraints="$root/scripts/constraints.txt" package="$root" started=$SECONDS
    make_venv
    if installed "$1" || { [ "$1" = base ] && installed test; }; then return; fi
    rm -f "$venv/installed-base" "$venv/installed-test"
    if [ "$1" = test ]; then package="${root}[test]"; fi
    if [ -n "${T2I_TORCH_INDEX:-}" ]; then
        grep -vE '^(torch|torchvision|setuptools)==' "$constraints" >"$venv/constraints.txt"
        constraints="$venv/constraints.txt"
        say "Installing torch from $T2I_TORCH_INDEX ..."
        pip_install --constraint "$constraints" --index-url "$T2I_TORCH_INDEX" "torch>=2.11" torchvision
    fi
    say "Installing the packages into .venv, once; this takes some minutes ..."
    pip_install --constraint "$constraints" --editable "$package"
    fingerprint "$1" >"$venv/installed-$1"
    say "Installed in $((SECONDS - started)) s."
}
