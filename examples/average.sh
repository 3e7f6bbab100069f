#!/bin/sh
# Average the last checkpoints of a run, and hold the mean against labelled pictures.
#
#   examples/average.sh RUN_FOLDER OUT.pt MODEL DATA [COUNT]
#
# MODEL is what verify --model takes, DATA a folder of labelled pictures. The last COUNT (3) checkpoints in the order of
# their names are averaged: means of weights far apart in a run are of no use. Exit status: that of verify.
set -eu
[ $# -ge 4 ] || { echo "usage: ${0##*/} RUN_FOLDER OUT.pt MODEL DATA [COUNT]" >&2; exit 2; }
run=$1 out=$2 model=$3 data=$4 count=${5:-3}

# The last COUNT names; fewer than two are no mean.
set -- "$run"/*.ckpt
while [ $# -gt "$count" ]; do shift; done
[ $# -ge 2 ] || { echo "${0##*/}: $run: two checkpoints at least are needed (*.ckpt)" >&2; exit 2; }

# The mean of what they hold, under clean names; counters such as num_batches_tracked are those of the last.
ckptool convert --average "$@" "$out"

# Statistics of batch norm are means as well, which need not fit the averaged weights: only inputs show it.
ckptool verify "$out" --model "$model" --data "$data"
