#!/usr/bin/env python3
"""How far the sampler may run ahead, and what is done about it: the same work at async levels 0, 1, 2 and 4.

    scripts/async-levels.py OUTPUT [--candor target/release/candor] [--seeds 17 18]

Every run is configs/quickstart.toml with half of its prompts, 16 steps and no evaluation; at levels 1 and 2 with each of the
corrections below, at level 0, where every ratio is 1, and at 4, which takes the sampler no further than 2 on one machine, with one. Runs land in OUTPUT/results/ and are not repeated if they are there, so the script can be stopped and started again.
OUTPUT/steps.csv gets a line per step, OUTPUT/table.md a line per run, OUTPUT/report the curves of levels 0 and 1. 10 runs, about a minute each on two
idle cores.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = [0, 1, 2, 4]
CORRECTIONS = {
    "clip": ["learner.importance.level=none"],
    "token": ["learner.importance.level=token"],
    "sequence-mask": ["learner.importance.level=sequence", "learner.importance.mode=mask"],
    "prime": ["learner.policy_loss=prime"],
}
CONFIG = f"""extends = "{ROOT}/configs/quickstart.toml"
name = "level"
steps = 16
[batch]
prompts = 4
[evaluation]
tasks = 0
[checkpoint]
every = 0
"""
COLUMNS = ["reward/mean", "parse_rate", "age/mean", "age/max", "mismatch/mean", "mismatch/max", "mismatch/k3", "ratio/max",
           "clip/low", "clip/high", "mismatch/masked", "entropy", "grad_norm", "time/step", "perf/sampler_idle",
           "perf/learner_idle"]
LAST = 5


def run(arguments, level, correction, seed):
    """The metrics of one run's steps."""
    name = f"level{level}-{correction}-{seed}"
    folder = arguments.output / "results" / name
    if not (folder / "summary.json").exists():
        sets = [f"name={name}", f"seed={seed}", f"sampling.async_level={level}", *CORRECTIONS[correction]]
        command = [arguments.candor, "train", "config.toml", "--quiet"] + [part for one in sets for part in ("--set", one)]
        subprocess.run(command + (["--resume"] if folder.exists() else []), cwd=arguments.output, check=True,
                       stdout=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "train"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--candor", default=str(ROOT / "target/release/candor"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17])
    arguments = parser.parse_args()
    arguments.candor = os.path.abspath(arguments.candor)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "config.toml").write_text(CONFIG)
    runs = [(level, correction, seed) for seed in arguments.seeds for level in LEVELS for correction in CORRECTIONS
            if level in (1, 2) or correction == "clip"]
    steps = {one: run(arguments, *one) for one in runs}

    with open(arguments.output / "steps.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["level", "correction", "seed", "step", *COLUMNS])
        for one, rows in steps.items():
            writer.writerows([*one, row["step"], *(row.get(column, "") for column in COLUMNS)] for row in rows)

    def mean(rows, column):
        return statistics.mean(row[column] for row in rows if column in row)

    table = ["| level | correction | seed | reward, all steps | reward, last 5 | parsed, last 5 | mean age | k3 | largest ratio | "
             "clipped or masked |", "|---|---|---|---|---|---|---|---|---|---|"]
    for (level, correction, seed), rows in steps.items():
        lost = sum(mean(rows, column) for column in ["clip/low", "clip/high", "mismatch/masked"])
        table.append(f"| {level} | {correction} | {seed} | {mean(rows, 'reward/mean'):.3f} | {mean(rows[-LAST:], 'reward/mean'):.3f} | "
                     f"{mean(rows[-LAST:], 'parse_rate'):.2f} | {mean(rows, 'age/mean'):.2f} | {mean(rows, 'mismatch/k3'):.1e} | "
                     f"{max(row['ratio/max'] for row in rows):.1f} | {100 * lost:.1f}% |")
    text = "\n".join(table) + "\n"
    (arguments.output / "table.md").write_text(text)
    print(text)
    shown = [(0, "clip"), *((1, correction) for correction in CORRECTIONS)]
    folders = [str(arguments.output / "results" / f"level{level}-{correction}-{arguments.seeds[0]}") for level, correction in shown]
    subprocess.run([arguments.candor, "report", *folders, "--output", str(arguments.output / "report"), "--quiet"], check=True)


if __name__ == "__main__":
    main()
