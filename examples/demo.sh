#!/bin/sh
# Reads the collection beside this script and asks it three questions, one answered from a PDF, one from HTML and one
# from a CSV file; then shows what reused chunk KV does to the time of the first token. `make demo` runs it in the
# environment of the checkout; anywhere else `ragkit` must be on the path, and `python3` must have it.
set -eu
cd "$(dirname "$0")"
RAGKIT="${RAGKIT:-ragkit}"
PYTHON="${PYTHON:-python3}"
export RAGKIT_STORE="${RAGKIT_STORE:-.ragkit}"

run() {
    printf '\n$ ragkit'
    for word in "$@"; do
        case "$word" in *' '*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    "$RAGKIT" "$@"
}

run ingest collection
run query "What is the maximum size of an SQLite database?"
run query "Do readers block writers in WAL mode?"
run query "Which result code means that the disk is full?"

printf '\n$ python cold_and_warm.py\n'
"$PYTHON" cold_and_warm.py "$RAGKIT_STORE"
