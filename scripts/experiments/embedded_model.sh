#!/usr/bin/env bash
# What the embedded model can do, in numbers: distances and scores over guidance on held-out scenes, their nearest training scenes, the judge's
# scores, and captions of photos, which it has never seen the like of. The results go to data/experiments/embedded.
#
#   bash scripts/experiments/embedded_model.sh EMOJI SQUEEZENET FLICKR8K
#
# EMOJI: a folder of emoji art, see scripts/emoji_scenes.py. SQUEEZENET: its weights, an .npz of 26 convolutions. FLICKR8K: a folder with captions.json in
# COCO's format and images/. SCENES and PHOTOS say how many of each (5000, 1000). BATCH is of the drawing (512). What exists is used again.
set -euo pipefail

emoji=${1:?folder of emoji art}
squeezenet=${2:?weights of SqueezeNet}
flickr=${3:?folder of photos with captions}
scenes=${SCENES:-5000}
photos=${PHOTOS:-1000}
batch=${BATCH:-512}
python=${PYTHON:-python3}
scripts=$(cd "$(dirname "$0")/.." && pwd)
data=data/experiments
out=$data/embedded

t2i() { "$python" -m t2i_experts "$@"; }

draw() { # name, split, seed, count
    [ -f "$data/$1/manifest.json" ] && return
    rm -rf "${data:?}/$1"
    "$python" "$scripts/emoji_scenes.py" --emoji "$emoji" --split "$2" --seed "$3" --count "$4" --size 64 --workers "$(nproc)" --out "$data/$1"
}

mkdir -p "$out"
draw held-out held-out 3000 "$scenes"
draw new validation 3000 "$scenes"
draw train train 0 $((scenes * 4)) # the first of those that the model was trained on

seen=(--resolution 64 --features squeezenet --weights "$squeezenet" --metric clip:model=embedded:clip --batch-size "$batch")
t2i eval sweep --shards "$data/held-out" "${seen[@]}" --guidance 1,2,3,4,6,8,10 --out "$out/sweep"
t2i eval fid "$data/new" "$data/held-out" --features squeezenet --weights "$squeezenet" --json > "$out/real.json" # two sets of real scenes
t2i eval coco --annotations "$flickr/captions.json" --images "$flickr/images" --num "$photos" "${seen[@]}" --out "$out/flickr8k"
t2i eval nearest --prompts "$out/sweep/ids.csv" --num $((scenes / 5)) --train "$data/train" --held-out "$data/new" --batch-size "$batch" --out "$out/nearest"
t2i eval judge --num 200 --batch-size "$batch" --out "$out/judge"
