#!/usr/bin/env bash
# Trains the two small encoders that ship with the package, in data/emoji, on the shards of scripts/embedded_data.sh.
#
#   bash scripts/embedded_encoders.sh COCO_CAPTIONS
#
# COCO_CAPTIONS: captions_val2017.json of COCO (CC BY 4.0), more text for T5. Side by side, about four minutes on one H200. To train the network on
# them instead of on those that ship: stage.encoders.t5.model=data/emoji/t5, and clip_text and clip_image with data/emoji/clip.
set -euo pipefail

captions=${1:?captions json of COCO}
python=${PYTHON:-python3}
scripts=$(cd "$(dirname "$0")" && pwd)
data=data/emoji

encoder() { # name, arguments: trained in another folder and moved, so that a folder is either whole or not there
    local name=$1
    shift
    [ -d "$data/$name" ] && return
    rm -rf "${data:?}/.$name"
    "$python" "$scripts/train_$name.py" "$@" --out "$data/.$name" >"$data/$name.log" 2>&1
    mv "$data/.$name" "$data/$name"
}

encoder t5 "$data/train" "$captions" --minutes 1.2 &
t5=$!
encoder clip "$data/train" --validation "$data/validation" --minutes 3
wait $t5
tail -n 2 "$data/t5.log" "$data/clip.log"
