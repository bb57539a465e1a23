#!/bin/sh
# Reads one text of about a million tokens into pages of KV and asks it three questions: the King James Bible as Debian
# packages it (apt install bible-kjv bible-kjv-text), or any text: `sh million_tokens.sh TEXT [QUESTION ...]`.
# States first what reading takes (on a CPU with the bundled model hours, and about 7 GB of disk). Interrupted, the same
# command goes on where it stopped. `make million` runs it in the environment of the checkout; anywhere else `ragkit`
# must be on the path.
set -eu
RAGKIT="${RAGKIT:-ragkit}"
export RAGKIT_STORE="${RAGKIT_STORE:-.ragkit-million}"
# int4 pages of a million tokens of the bundled model take about 7 GB; one document may have seven tenths of the disk's.
export RAGKIT_PAGES_CODEC="${RAGKIT_PAGES_CODEC:-int4}" RAGKIT_KV_DISK_MB="${RAGKIT_KV_DISK_MB:-16384}"
export RAGKIT_PAGES_MEMORY_MB="${RAGKIT_PAGES_MEMORY_MB:-1024}"

if [ $# -gt 0 ]; then
    text="$1"
    shift
else
    command -v bible > /dev/null || {
        echo "the text is missing: apt install bible-kjv bible-kjv-text, or name another: sh $0 TEXT" >&2
        exit 2
    }
    text=bible.txt
    [ -s "$text" ] || { bible -f gen1:1-rev22:21 > "$text.partial" && mv "$text.partial" "$text"; }
fi
[ $# -gt 0 ] || set -- "Who built the ark?" "Who was thrown into the den of lions?" "Where was Jesus born?"

printf '$ ragkit ingest --pages "%s"\n' "$text"
"$RAGKIT" ingest --pages "$text"
for question in "$@"; do
    printf '\n$ ragkit query "%s" --strategy pages --document "%s"\n' "$question" "$text"
    "$RAGKIT" query "$question" --strategy pages --document "$text"
done
