#!/usr/bin/env bash
# Makes what configs/emoji/base64.yaml trains on, in data/emoji: shards of emoji scenes, and the two small encoders.
#
#   bash scripts/embedded_data.sh EMOJI COCO_CAPTIONS
#
# EMOJI: a folder of emoji art, see scripts/emoji_scenes.py. COCO_CAPTIONS: captions_val2017.json of COCO (CC BY 4.0), more text for T5.
# The encoders train side by side, three minutes on one H200. What exists already is not made again.
set -euo pipefail

emoji=${1:?folder of emoji art}
captions=${2:?captions json of COCO}
python=${PYTHON:-python3}
scripts=$(cd "$(dirname "$0")" && pwd)
data=data/emoji
workers=$(nproc)

scenes() { # split, count
    [ -f "$data/$1/manifest.json" ] && return
    rm -rf "${data:?}/$1"
    "$python" "$scripts/emoji_scenes.py" --emoji "$emoji" --split "$1" --count "$2" --size 64 --workers "$workers" --out "$data/$1"
}

mkdir -p "$data"
scenes train 300000
scenes validation 2048
scenes held-out 2048

encoder() { # name, arguments: trained in another folder and moved, so that a folder is either whole or not there
    local name=$1
    shift
    [ -d "$data/$name" ] && return
    rm -rf "${data:?}/.$name"
    "$python" "$scripts/train_$name.py" "$@" --out "$data/.$name" >"$data/$name.log" 2>&1
    mv "$data/.$name" "$data/$name"
}

encoder t5 "$data/train" "$captions" --minutes 2 &
t5=$!
encoder clip "$data/train" --validation "$data/validation" --minutes 3
wait $t5
tail -n 2 "$data/t5.log" "$data/clip.log"
