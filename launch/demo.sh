#!/usr/bin/env bash
# The whole path on the embedded data set, with two ranks (one on a machine with one GPU): draw, pack, train
# source-only, stage 1, stage 2 and its deterministic twin, score.
# Ends with a table, runs/demo/results.json, runs/demo/comparison.png and runs/demo/report.html. Interrupted and started
# again, it goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh

# A signal to this script alone reaches the program that it waits for.
child=
trap 'trap - TERM INT; [ -z "$child" ] || { kill -TERM "$child" 2>/dev/null; wait "$child"; }; exit 143' TERM INT
run() {
    "$@" &
    child=$!
    wait "$child"
    child=
}

started=$SECONDS
demo=runs/demo
ranks=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
pack() { run iccld shards make --samples-per-shard 100 "$@"; }

echo "== drawing"
run python -m iccld.demo.draw --output $demo/data --size 128x256
echo "== packing"
pack --dataset gta5 --input $demo/data/gta5 --output $demo/shards/source
pack --dataset cityscapes --split train --no-labels --input $demo/data/cityscapes --output $demo/shards/target
pack --dataset cityscapes --split val --input $demo/data/cityscapes --output $demo/shards/validation
echo "== source only"
run iccld launch "$ranks" train experiment=demo stage=source_only stage1.trainer.num_steps=350 run_dir=$demo/source_only
echo "== stage 1 and stage 2"
run iccld launch "$ranks" train experiment=demo run_dir=$demo/adapted \
    initial_model=$demo/source_only/stage1/final/teacher
echo "== the twin of stage 2: the same network, inputs, losses and steps without noise"
run iccld launch "$ranks" train experiment=demo stage=adversarial stage1_from=$demo/adapted \
    stage2.objective.deterministic=true inference.num_steps=[1] run_dir=$demo/twin
run python launch/demo_report.py $demo
run iccld report $demo/source_only $demo/adapted $demo/twin --output $demo/report.html
echo "this attempt took $((SECONDS - started)) s"
