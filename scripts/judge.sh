#!/usr/bin/env bash
# Makes the judge that `t2i-experts eval judge` shows pictures to, in data/judge/model: its scenes, then four minutes on one GPU.
#
#   bash scripts/judge.sh EMOJI [OPTION]...
#
# EMOJI: a folder of emoji art, see scripts/emoji_scenes.py. Further options go to scripts/train_judge.py. The scenes are of other seeds than those
# that the embedded model is trained on, and those that measure the judge of a third one. What exists already is not made again.
set -euo pipefail

emoji=${1:?folder of emoji art}
shift
python=${PYTHON:-python3}
scripts=$(cd "$(dirname "$0")" && pwd)
data=data/judge

scenes() { # name, split, seed, count
    [ -f "$data/$1/manifest.json" ] && return
    rm -rf "${data:?}/$1"
    "$python" "$scripts/emoji_scenes.py" --emoji "$emoji" --split "$2" --seed "$3" --count "$4" --size 64 --workers "$(nproc)" --out "$data/$1"
}

mkdir -p "$data"
scenes train train 1000 300000
scenes train-held-out held-out 1000 30000
scenes measured validation 2000 4096
scenes measured-held-out held-out 2000 4096
"$python" "$scripts/train_judge.py" "$data/train" "$data/train-held-out" \
    --validation "$data/measured" "$data/measured-held-out" --out "$data/model" "$@"
