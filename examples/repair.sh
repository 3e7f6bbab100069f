#!/bin/sh
# Prove that a checkpoint is loaded wrongly, repair its names, and prove that the repair holds.
#
#   examples/repair.sh BROKEN OUT MODEL DATA [MIN_ACCURACY]
#   examples/repair.sh examples/digits_wrong_strip.pt fixed.pt examples/train_digits.py:DigitsNet photos/ 0.99
#
# MODEL is what verify --model takes, DATA a folder of labelled pictures. Exit status: 0 OUT is proven, 1 it is not
# sound either, 2 something could not be answered, or BROKEN was sound as it is.
set -eu
[ $# -ge 4 ] || { echo "usage: ${0##*/} BROKEN OUT MODEL DATA [MIN_ACCURACY]" >&2; exit 2; }
broken=$1 out=$2 model=$3 data=$4 least=${5:-0.9}

# The failure: as a plain loader meets the file, with strict=False. 1 says "no", and only that is what we came for.
status=0
ckptool verify "$broken" --as-is --model "$model" --data "$data" || status=$?
[ "$status" -ne 0 ] || { echo "${0##*/}: $broken is sound as it is; there is nothing to repair" >&2; exit 2; }
[ "$status" -eq 1 ] || exit "$status"

# The repair: only names change, ...
ckptool strip-prefixes "$broken" "$out"
# ... which diff, that compares names as they stand, would show and digests do not see, ...
ckptool diff --quiet "$broken" "$out"
# ... and the proof: every tensor of the model is in it, and it answers the labelled pictures right.
ckptool verify "$out" --as-is --model "$model" --data "$data" --min-accuracy "$least"
