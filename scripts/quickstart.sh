#!/usr/bin/env bash
# bash scripts/quickstart.sh ["PROMPT"] [OPTION of `t2i-experts generate`]...
# From a fresh checkout to a picture: installs into .venv on the first run, then draws the prompt with the embedded model, offline.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    sed -n 's/^#   / /p' "$root/scripts/environment.sh"
    exit 0
fi

prompt="a red apple"
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    prompt=$1
    shift
fi

prepare_environment base

say "Drawing: $prompt"
pictures=$(HF_HUB_OFFLINE=1 "$venv/bin/python" -m t2i_experts generate "$prompt" --out "$root/out" "$@")
say "
Your picture:"
printf '%s\n' "$pictures"
say "
Next:
  source \"$venv/bin/activate\"
  t2i-experts generate \"$prompt\" --seed 1    another picture of the same words
  t2i-experts generate --help                all options
  t2i-experts --help                         all commands"
