#!/usr/bin/env bash
# An untrusted training checkpoint in; its weights alone, as safetensors with a manifest, out.
#
#   examples/sanitize.sh IN OUT.safetensors [option of ckptool convert ...]
#
# Nothing of IN is run. OUT holds names, dtypes, shapes and values, and nothing else: no pickle, no metadata of IN, no
# bytes behind or between its tensors. OUT.manifest.json says what OUT is, what it was made from and what was left out.
# Exit status: 0 both are written, 2 they are not. To check them later:
#
#   ckptool verify OUT.safetensors --manifest OUT.manifest.json
#
# With --max-shard-size 5GB a large OUT becomes shards; OUT.safetensors.index.json is then what to verify.
set -euo pipefail

if [ $# -lt 2 ] || [ "${2%.safetensors}" = "$2" ]; then
    echo "usage: ${0##*/} IN OUT.safetensors [option of ckptool convert ...]" >&2
    exit 2
fi
in=$1 out=$2 manifest=${2%.safetensors}.manifest.json
shift 2

# What the file would do to others; whatever the answer, nothing of it is carried over.
ckptool verify --config /dev/null --checks safety --fail-on never -- "$in" >&2 || true

ckptool convert --no-metadata --manifest "$manifest" "$@" -- "$in" "$out"
# With --max-shard-size, OUT may have become shards and an index.
[ -f "$out" ] || out=$out.index.json

# No settings file of the current folder has a say in this.
if ! ckptool verify --config /dev/null --quiet --manifest "$manifest" --fail-on warn \
    --checks integrity --checks manifest --checks safety -- "$out"; then
    rm -f -- "$out" "$manifest"
    exit 2
fi
