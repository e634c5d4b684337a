#!/bin/sh
# Extend a model to 64K, 256K and 1M tokens, one stage after the other, each from the model that the one before made.
#   recipes/length-extension/run.sh DATA MODEL OUT [any option of oncelm train, for all stages]
# OUT/1m/model is the result. Stopped at any moment, the same command goes on. On many GPUs, with 4 of them to a
# sequence (context_parallel; 1M tokens need it):
#   TRAIN="torchrun --nproc-per-node 8 -m oncelm train" recipes/length-extension/run.sh DATA MODEL OUT --set context_parallel=4
set -eu
[ $# -ge 3 ] || { sed -n '2,7s/^# *//p' "$0" >&2; exit 2; }
recipes=$(dirname "$0")
data=$1 model=$2 out=$3
shift 3
for stage in ${STAGES:-64k 256k 1m}; do
    finished=$out/$stage/finished
    if [ ! -e "$finished" ]; then
        ${TRAIN:-oncelm train} "$data" --model "$model" --out "$out/$stage" --config "$recipes/$stage.yaml" --resume "$@"
        [ -e "$finished" ] || exit 0 # stopped by a signal: everything is saved
    fi
    model=$out/$stage/model
done
echo "Finished: $model"
