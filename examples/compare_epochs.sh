#!/bin/sh
# Show how a training run moved: the best epoch, the drift from the first one, and a page that draws the last step.
#
#   examples/compare_epochs.sh RUN_FOLDER CHANGE.html
#
# Epochs are compared in the order of their names (epoch=00.ckpt, epoch=01.ckpt ...). Exit status: 0, or 2 where
# something cannot be read.
set -eu
[ $# -eq 2 ] || { echo "usage: ${0##*/} RUN_FOLDER CHANGE.html" >&2; exit 2; }
run=$1 page=$2

# diff answers 1 for "they differ": epochs are expected to.
differing() {
    status=0
    "$@" || status=$?
    [ "$status" -le 1 ] || exit "$status"
}

# Which epoch is the best, by the metric that the trainer monitored.
echo "best: $(ckptool inspect "$run" --best)"

set -- "$run"/*.ckpt
[ $# -ge 2 ] || { echo "${0##*/}: $run: two checkpoints at least are needed (*.ckpt)" >&2; exit 2; }
# One row per epoch: how far it is from the first.
differing ckptool diff "$@"

# The last step, layer by layer: which moved, which stood still.
while [ $# -gt 2 ]; do shift; done
differing ckptool diff "$1" "$2" --tree --plot "$page"
