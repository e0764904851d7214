#!/usr/bin/env bash
# A tree of experts on emoji scenes, beside its root trained on for as many images, with the same restarts and decay. The results go to
# data/experiments/tree.
#
#   bash scripts/experiments/emoji_tree.sh EMOJI [KEY=VALUE]...
#
# EMOJI: a folder of emoji art, see scripts/emoji_scenes.py. KEY=VALUE: of configs/emoji/experts.yaml, for all runs. GPUS: how many there are
# (1); with two or more, the control is trained on the last one while the tree is trained on the others. PICTURES, PROMPTS: for the losses
# (2048) and for the judge (1000). What exists is used again: the same command goes on where it was stopped.
set -euo pipefail

emoji=${1:?folder of emoji art}
shift
gpus=${GPUS:-1}
pictures=${PICTURES:-2048}
prompts=${PROMPTS:-1000}
python=${PYTHON:-python3}
scripts=$(cd "$(dirname "$0")/.." && pwd)
out=data/experiments/tree
tree=runs/emoji-experts
control=runs/emoji-control

t2i() { "$python" -m t2i_experts "$@"; }

nodes() { # name and images of each node but the root
    t2i experts plan emoji/experts "$@" --json |
        "$python" -c 'import json, sys; [print(node["name"], node["images"]) for node in json.load(sys.stdin)["nodes"][1:]]'
}

train_control() { # the root trained on, once for every node
    local name images before=$tree/model
    while read -r name images; do
        t2i train emoji/experts "$@" 'experts={leaves: [], images: 0}' "training.initial=$before" "training.images=$images" \
            "output=$control/$name" </dev/null
        before=$control/$name/model
    done < <(nodes "$@")
    ln -sfn "${before#"$control/"}" "$control/model"
}

mkdir -p "$out"
bash "$scripts/embedded_data.sh" "$emoji"
t2i experts train emoji/experts "$@" --only root
if [ "$gpus" -gt 1 ]; then
    CUDA_VISIBLE_DEVICES=$((gpus - 1)) train_control "$@" > "$out/control.log" 2>&1 &
    t2i experts train emoji/experts "$@" --gpus $((gpus - 1))
    wait $!
else
    t2i experts train emoji/experts "$@"
    train_control "$@"
fi

t2i experts assemble emoji/experts "$@" --dtype bfloat16 --out "$out/ensemble"
t2i experts loss "$tree/model" "$control/model" "$out/ensemble" --shards data/emoji/held-out --images "$pictures" | tee "$out/loss.txt"
for model in "$tree" "$control" "$out/ensemble"; do
    folder=$model
    [ -d "$model/model" ] && folder=$model/model
    t2i eval judge --model "$folder" --num "$prompts" --batch-size 200 --out "$out/judge-$(basename "$model")"
    t2i generate --model "$folder" --prompts "$scripts/eval_prompts.txt" --out "$out/pictures-$(basename "$model")"
done
