#!/usr/bin/env bash
# Trains with completions from a real server: scripts/sample-from-vllm.sh MODEL [--set key=value]…
# Starts vLLM (VLLM, or on the PATH) on the processor with MODEL, a folder with SmolLM2-135M-Instruct as transformers reads it
# (export the quickstart's with `candor export`), runs configs/quickstart_vllm.toml (CANDOR, or the release build), stops the
# server, and shows how far its log-probabilities were from the learner's in each step.
set -euo pipefail
cd "$(dirname "$0")/.."
model="${1:?usage: scripts/sample-from-vllm.sh MODEL [--set key=value]…}"
shift
port="${PORT:-8000}"
log="${LOG:-$(mktemp)}"
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_CPU_KVCACHE_SPACE=2 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
# vLLM 0.32 on the processor cannot undo the random numbers of a prompt that is read in chunks, and requests have seeds.
"${VLLM:-vllm}" serve "$model" --served-model-name smollm2 --dtype "${DTYPE:-bfloat16}" --max-model-len 2048 --max-num-seqs 64 \
    --no-enable-chunked-prefill --max-num-batched-tokens 4096 --enforce-eager --enable-lora --max-lora-rank 16 \
    --host 127.0.0.1 --port "$port" > "$log" 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true' EXIT
for _ in $(seq 300); do
    curl --silent --fail "http://127.0.0.1:$port/health" > /dev/null && break
    kill -0 "$server" || { tail -40 "$log"; exit 1; }
    sleep 1
done
"${CANDOR:-target/release/candor}" train configs/quickstart_vllm.toml \
    --set "sampling.endpoints.0.base_url=\"http://127.0.0.1:$port/v1\"" "$@"
metrics="$(ls -t results/*/metrics.jsonl | head -1)"
jq -r 'select(.split == "train") | [.step, .["mismatch/mean"], .["mismatch/max"], .["mismatch/k3"], .["time/sample"]] | @tsv' \
    "$metrics" | sed '1i step\tmismatch/mean\tmismatch/max\tmismatch/k3\tseconds sampling'
echo "$(grep -c "Loaded new LoRA adapter" "$log") adapters were loaded"
