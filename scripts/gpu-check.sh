#!/usr/bin/env bash
# Everything that needs a GPU, in one command, within ten minutes on one NVIDIA H200:
#
#   scripts/gpu-check.sh [FOLDER]
#
# 1. the tests of the device's decoder and optimizer, on the GPU: log-probabilities, gradients, samples, updates beside the processor's
# 2. the SmolLM2 quickstart, where its model is in the cache or can be fetched (QUICKSTART=0 leaves it out)
# 3. a model of Gemma 2 2B's shape with random weights: a GRPO step of 32 prompts x 8 completions x 256 tokens with prompts of 350,
#    the learner alone, decoding at batch 64, and what share of the GPU's arithmetic and memory bandwidth that is
# 4. where PEERS_PYTHON names a Python with torch, transformers, peft and trl: TRL's step of the same shape beside it
#
# Where there is no cargo, CANDOR and TESTS name the program and the test binary, built with `--features cuda` from this folder.
# FOLDER (default: results/gpu) receives the logs and table.md. TFLOPS and BANDWIDTH (TB/s) are those of the GPU at most, by default an
# H200's: 989 in bf16, and 4.8. libcublas and libnvrtc have to be found; the folders below and CUDA_LIBS are looked into.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results/gpu}
mkdir -p "$out"
for libs in "${CUDA_LIBS:-target/cuda-libs}/nvidia/cu13/lib" /usr/local/cuda/lib64 \
    $(python3 -c 'import nvidia, glob; [print(f) for p in nvidia.__path__ for f in glob.glob(p + "/*/lib")]' 2>/dev/null); do
    [ -d "$libs" ] && export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libs"
done
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
candor=${CANDOR:-target/release/candor}
[ -x "$candor" ] || cargo build --release --features cuda || exit 1
failed=0
say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

say "tests on the GPU"
tests=${TESTS:-cargo test --release --features cuda --test all --}
CANDOR_TEST_GPU=1 timeout 300 $tests --test-threads 1 cuda_decoder cuda_optimizer cuda_driver cuda_steps 2>&1 | tee "$out/tests.log" | grep -E '^test |panicked|FAILED'
grep -q 'test result: ok' "$out/tests.log" || failed=1

if [ "${QUICKSTART:-1}" != 0 ]; then
    say "quickstart"
    timeout 240 "$candor" train configs/quickstart.toml --set 'model.device="cuda:0"' --set 'name="gpu-quickstart"' \
        >"$out/quickstart.log" 2>&1 || { failed=1; tail -3 "$out/quickstart.log"; }
    tail -2 "$out/quickstart.log"
fi

say "Gemma 2 2B's shape"
model=${MODEL:-$out/random-gemma2}
[ -e "$model/model.safetensors" ] || python3 scripts/random-gemma2.py "$model"
bench() { timeout 200 "$candor" bench "$model" --device cuda:0 --quiet "$@" 2>>"$out/bench.err" | tee -a "$out/bench.jsonl"; }
: >"$out/bench.jsonl" >"$out/bench.err"
bench --repeats 2 --micro-tokens 16384 --learner 64x256
bench --repeats 2 --decode 8x8x350+256
bench --repeats 1 --micro-tokens 16384 --step 32x8x350+256
[ "$(wc -l <"$out/bench.jsonl")" = 3 ] || { failed=1; tail -5 "$out/bench.err"; }

if [ -n "${PEERS_PYTHON:-}" ]; then
    say "TRL"
    timeout 300 "$PEERS_PYTHON" scripts/peers.py step "$model" --device cuda --prompts 32 --prompt 350 --new 256 \
        2>>"$out/peers.err" | tee "$out/peers.jsonl" || failed=1
fi

python3 - "$out" "${TFLOPS:-989}" "${BANDWIDTH:-4.8}" <<'PY' | tee "$out/table.md"
import json, pathlib, sys

out, tflops, bandwidth = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
read = lambda name: [json.loads(line) for line in (out / name).read_text().splitlines() if line.startswith("{")]
lines = {line["measurement"]: line for line in read("bench.jsonl")}
peers = read("peers.jsonl") if (out / "peers.jsonl").exists() else []
rows = []
if learner := lines.get("learner"):
    rows.append(("learner, tokens/s", f"{learner['tokens_per_second']:.0f}", ""))
    rows.append(("learner, MFU", f"{learner['gflops'] / tflops / 10:.1f}%", ">= 35%"))
if decode := lines.get("decode"):
    rollouts, context = decode["prompts"] * decode["group"], decode["prompt"] + decode["new"] / 2
    base, keys = decode["device"]["base"]["most"], decode["device"]["keys"]["most"]
    stored = decode["prompts"] * (decode["prompt"] + decode["group"] * decode["new"])
    # A step reads all weights, and the keys and values of every sequence: a prompt's once for each of its completions.
    floor = rollouts * bandwidth * 1e12 / (base + keys / stored * rollouts * context)
    rows.append(("decode at 64, tokens/s", f"{decode['decode_tokens_per_second']:.0f}", ""))
    rows.append(("steps that were started as graphs", f"{decode['device']['replays']}", ""))
    rows.append(("share of the bandwidth's floor", f"{100 * decode['decode_tokens_per_second'] / floor:.0f}%", ">= 50%"))
if step := lines.get("step"):
    # The pool gives nothing back, so that what is not free at the end was the most that was held.
    peak = step["device"]["total"] - step["device"]["free"]
    rows.append(("step, s", f"{step['step_seconds']:.2f} (sampling {step['sampling_seconds']:.2f})", ""))
    rows.append(("peak on the GPU, GB", f"{peak / 1e9:.1f} (of which used {step['device']['most'] / 1e9:.1f})", ""))
    if peers:
        rows.append(("TRL's step / ours", f"{peers[-1]['step_seconds'] / step['step_seconds']:.1f}", ">= 2"))
        rows.append(("our peak / TRL's", f"{peak / peers[-1]['peak_bytes']:.2f}", "<= 0.5"))
print((out / "gpu.txt").read_text().splitlines()[-1] if (out / "gpu.txt").exists() else "")
print("\n| | measured | wanted |\n|---|---|---|")
[print(f"| {name} | {value} | {wanted} |") for name, value, wanted in rows]
PY
say "done: $([ $failed = 0 ] && echo 'all passed' || echo 'SOMETHING FAILED, see above')"
exit $failed
