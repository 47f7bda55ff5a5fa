#!/usr/bin/env bash
# The whole path on the embedded data set, with two ranks: draw, pack, train source-only, stage 1 and stage 2, score.
# Ends with a table, runs/demo/results.json and runs/demo/comparison.png. Interrupted and started again, it goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh

started=$SECONDS
run=runs/demo
pack() { iccld shards make --samples-per-shard 100 "$@"; }

echo "== drawing"
python tools/draw_scenes.py --output $run/data --size 128x256
echo "== packing"
pack --dataset gta5 --input $run/data/gta5 --output $run/shards/source
pack --dataset cityscapes --split train --no-labels --input $run/data/cityscapes --output $run/shards/target
pack --dataset cityscapes --split val --input $run/data/cityscapes --output $run/shards/validation
echo "== source only"
python launch/local.py 2 train experiment=demo stage=source_only run_dir=$run/source_only
echo "== stage 1 and stage 2"
python launch/local.py 2 train experiment=demo run_dir=$run/adapted initial_model=$run/source_only/stage1/final/teacher
python launch/demo_report.py $run
echo "the demo took $((SECONDS - started)) s"
