#!/usr/bin/env bash
# Keeps what a run is reported with: scripts/keep-run.sh quickstart copies config, metrics, summary and a slice of the
# generations from results/quickstart to results/reported-quickstart, which git does not ignore.
set -euo pipefail
cd "$(dirname "$0")/.."
run="results/${1:?usage: scripts/keep-run.sh NAME}"
kept="results/reported-$1"
mkdir -p "$kept"
cp "$run/config.toml" "$run/metrics.jsonl" "$run/summary.json" "$kept/"
# The first group of every training step and the first ten tasks of both evaluations, without the prompts: the data in them
# has licences of its own, and the task's id says which row it was.
jq -c 'select(.group == 0 or (.split == "eval" and .group < 10)) | del(.prompt)' "$run/generations.jsonl" > "$kept/generations.jsonl"
