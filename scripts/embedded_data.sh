#!/usr/bin/env bash
# Makes the shards that configs/emoji/base64.yaml trains on, in data/emoji: scenes for training, for validation, and of what is held out.
#
#   bash scripts/embedded_data.sh EMOJI
#
# EMOJI: a folder of emoji art, see scripts/emoji_scenes.py. Half a minute on 64 cores. What exists already is not made again.
set -euo pipefail

emoji=${1:?folder of emoji art}
python=${PYTHON:-python3}
scripts=$(cd "$(dirname "$0")" && pwd)
data=data/emoji

scenes() { # split, count
    [ -f "$data/$1/manifest.json" ] && return
    rm -rf "${data:?}/$1"
    "$python" "$scripts/emoji_scenes.py" --emoji "$emoji" --split "$1" --count "$2" --size 64 --workers "$(nproc)" --out "$data/$1"
}

mkdir -p "$data"
scenes train 400000
scenes validation 2048
scenes held-out 2048
