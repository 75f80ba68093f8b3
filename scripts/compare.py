#!/usr/bin/env python3
"""Candor and its peers on this machine, alternately in one go, and the table of medians. Nothing else should run meanwhile.

usage: compare.py CANDOR GGUF HF_FOLDER --python VENV/bin/python [--llama BIN_FOLDER] [--rounds 5] [--only ROW]

CANDOR is the release binary, GGUF and HF_FOLDER the same model for Candor and llama.cpp, and for transformers. Every figure is
kept in compare.jsonl beside where this is called."""

import argparse
import json
import os
import statistics
import subprocess


def run(command):
    """The last JSON line that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def rows(a):
    """Name, our command and figure, the peer's, whether more is better, and what is wanted."""
    bench, passes = [a.candor, "bench", a.gguf, "--quiet", "--repeats"], "3"
    ours, learner = [*bench, "1"], [*bench, passes, "--learner", "4x256"]
    peer = [a.python, os.path.join(os.path.dirname(__file__), "peers.py")]
    peer_learner = [*peer, "learner", a.folder, "--repeats", passes]
    llama = [os.path.join(a.llama or "", "llama-batched-bench"), "-m", a.gguf, "-t", "2", "-tb", "2", "-c", "16384", "-b", "2048",
             "-ub", "512", "-npp", "150", "-ntg", "128", "--output-format", "jsonl", "-npl"]  # fmt: skip
    step, boolq = "step_seconds", ["--step", "4x8x250+64"]
    decode, per_second = "decode_tokens_per_second", "tokens_per_second"
    table = [
        ("step", ours + ["--step", "4x8x97+64"], step, peer + ["step", a.folder], step, False, 8),
        ("step memory", ours + ["--step", "4x8x97+64"], "peak_bytes", peer + ["step", a.folder], "peak_bytes", False, 2.5),
        ("boolq step", ours + boolq, step, peer + ["step", a.folder, "--prompt", "250"], step, False, 10),
        ("learner", learner, per_second, peer_learner, per_second, True, 3),
        ("learner memory", learner, "peak_bytes", peer_learner, "peak_bytes", False, 2),
        ("decode 32, transformers", ours + ["--decode", "32x150+128"], decode,
         peer + ["generate", a.folder, "--prompt", "150", "--new", "128"], decode, True, 5),
        ("decode 32, llama.cpp", ours + ["--decode", "32x150+128"], decode, llama + ["32"], "speed_tg", True, 3.5),
        ("decode 1, llama.cpp", ours + ["--dtype", "int8", "--decode", "1x150+128"], decode, llama + ["1"], "speed_tg", True, 0.6),
        ("growth G 4 to 16", ours + ["--step", "4x16x250+32"], step, ours + ["--step", "4x4x250+32"], step, True, None),
    ]  # fmt: skip
    return [row for row in table if (a.llama or "llama" not in row[0]) and (not a.only or a.only in row[0])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["candor", "gguf", "folder"]:
        parser.add_argument(name)
    parser.add_argument("--python", required=True)
    parser.add_argument("--llama")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only")
    a = parser.parse_args()
    figures, table = {}, rows(a)
    for number in range(a.rounds):
        cache = {}  # rows of one round share a run where the command is the same
        for name, our_command, our_figure, peer_command, peer_figure, *_ in table:
            for who, command, figure in (("candor", our_command, our_figure), ("peer", peer_command, peer_figure)):
                key = tuple(command)
                if key not in cache:
                    cache[key] = run(command)
                    with open("compare.jsonl", "a") as log:
                        log.write(json.dumps({"round": number, "row": name, "who": who, **cache[key]}) + "\n")
                figures.setdefault((name, who), []).append(cache[key][figure])
        print(f"round {number + 1} of {a.rounds} done", flush=True)
    print(f"\n{'row':<26}{'candor':>12}{'peer':>12}{'ratio':>8}{'wanted':>8}   {'by round: median (range)'}")
    for name, *_, more, wanted in table:
        both = [figures[name, who] for who in ("candor", "peer")]
        ratio = lambda ours, peer: ours / peer if more else peer / ours  # noqa: E731
        ours, peer = map(statistics.median, both)
        # Who else uses the machine changes all the time: the two runs of a round lie nearest to each other.
        rounds = sorted(map(ratio, *both))
        unit = 1e9 if "memory" in name else 1
        print(f"{name:<26}{ours / unit:>12.2f}{peer / unit:>12.2f}{ratio(ours, peer):>8.2f}{wanted or '<= 2.2':>8}"
              f"   {statistics.median(rounds):.2f} ({rounds[0]:.2f} to {rounds[-1]:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
