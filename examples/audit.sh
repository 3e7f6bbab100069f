#!/bin/sh
# List what is wrong with the checkpoints of a folder tree, one finding a line: kind, path, what, tab-separated.
#
#   examples/audit.sh FOLDER [JOBS]
#
# Only descriptions are read, nothing is run. Exit status: 0 nothing found, 1 findings, 2 something could not be read.
set -eu
[ $# -ge 1 ] || { echo "usage: ${0##*/} FOLDER [JOBS]" >&2; exit 2; }
paths=$(mktemp)
report=$(mktemp)
trap 'rm -f "$paths" "$report"' EXIT

# Every file by its path; a folder that find may not enter is one that could not be read.
status=0
find "$1" -type f \( -name '*.ckpt' -o -name '*.pt' -o -name '*.pth' -o -name '*.bin' -o -name '*.safetensors' \) -print0 \
    >"$paths" || status=2
# In several processes; 2 says that a file could not be read, and the document says which.
ckptool inspect - --json --quiet --jobs "${2:-2}" <"$paths" >"$report" || status=$?
[ -s "$report" ] || exit 2

# The document is plain JSON: jq would do as well.
python3 - "$report" <<'PYTHON' || status=$((status > 1 ? status : 1))
import json
import sys

files = json.load(open(sys.argv[1]))["files"]
findings = []
for file in files:
    path = json.dumps(file["path"])[1:-1]  # a name may hold a line break
    if file.get("error"):
        findings.append(("unreadable", path, file["error"]))
        continue
    names = [found["name"] for found in file["safety"]["globals"] if found["severity"] != "safe"]
    if names:
        findings.append((file["safety"]["verdict"], path, "names " + ", ".join(names)))
    if not file["keys"]["already_clean"]:
        findings.append(("wrapped", path, ", ".join(found["segment"] for found in file["keys"]["wrappers"])))
    if file["disk"]["optimizer"]:
        findings.append(("training state", path, f"{file['disk']['optimizer']} bytes of optimizer"))
for finding in findings:
    print(*finding, sep="\t")
print(f"{len(files)} checkpoints, {len(findings)} findings", file=sys.stderr)
sys.exit(bool(findings))
PYTHON
exit "$status"
