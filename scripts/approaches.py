#!/usr/bin/env python3
"""Compares five ways to calibrated confidences on the same held-out BoolQ questions: SmolLM2 as it is, imitation of sampled
accuracy (SFT), preference pairs (DPO), implicit calibration, and GRPO; each raw and after a post-hoc map.

    scripts/approaches.py                 # all stages; about 20 minutes on two cores
    scripts/approaches.py train:dpo table # some of them

The stages, in order: `answers` and `data`; `train:NAME` and `evaluate:NAME` of each approach; `table`. All are trained on the
same 160 training questions, with as many sampled completions or rows made of them as `APPROACHES` says, from the model, adapter
and optimizer of configs/quickstart.toml. `results/approaches` holds what they leave; what is there already is not made again.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

CANDOR = os.environ.get("CANDOR", "target/release/candor")
CONFIG = "configs/quickstart.toml"
RESULTS = Path("results")
OUT = RESULTS / "approaches"
STEPS = 20
QUESTIONS = STEPS * 8  # those of the quickstart's steps
HELD_OUT = 512


def given(name, **options):
    """Settings of a run on completions that are given: two passes over 160 rows."""
    environment = {"name": name, "source": str(OUT / f"{name}.jsonl"), **options}
    return {"environment": [environment], "batch.prompts": 16}


# What differs from the quickstart. Learning rates were set by the training loss alone, before anything was evaluated.
APPROACHES = {
    "baseline": None,
    "sft": given("sft") | {"learner.learning_rate": 2e-4},
    "dpo": given("dpo", beta=0.1) | {"learner.learning_rate": 5e-5},
    "implicit": given("implicit") | {"learner.learning_rate": 1e-4},
    "grpo": {},
}


def toml(value):
    """A value as TOML: JSON is, but for tables."""
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def candor(*words, settings=None, output=None):
    """Runs a command; its seconds and peak memory in GB."""
    settings = [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={toml(value)}")]
    command = [CANDOR, *map(str, words), *settings]
    print("$", *command, file=sys.stderr, flush=True)
    started = time.monotonic()
    with open(output or os.devnull, "w") as file:
        process = subprocess.Popen(command, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[1]} failed")
    return {"seconds": round(time.monotonic() - started, 1), "memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def train(name, settings):
    run = RESULTS / f"approaches-{name}"
    if not (run / "cost.json").exists():
        fixed = {"name": run.name, "evaluation.tasks": 0}
        write(run / "cost.json", [candor("train", CONFIG, settings=settings | fixed)])
    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, objects):
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))


def answers():
    """The base model's answers to the training questions: the rollouts of a first step, before anything was learned."""
    run = train("answers", {"steps": 1, "batch.prompts": QUESTIONS})
    return [row for row in rows(run / "generations.jsonl") if row["split"] == "train" and row["parse"] == "ok"]


def data():
    """Rows to learn from. The labels are those of `candor prepare`; its wording becomes that of BoolQ's prompt."""
    OUT.mkdir(exist_ok=True)
    sampled = answers()
    prompts = {row["task"]: row["prompt"] for row in sampled}

    def judged(row):
        metrics = row["metrics"]
        # The answer is YES where it is right that the answer is yes, or wrong that it is no.
        answer = "YES" if metrics["correct"] == metrics["y"] else "NO"
        confidence, correct = metrics["confidence"], metrics["correct"] == 1
        return {"question": row["task"], "model_answer": answer, "confidence": confidence, "is_correct": correct}

    def reworded(row):
        def line(text):
            answer, confidence = re.fullmatch(r"Answer: (.*)\nConfidence: (.*)", text).groups()
            return f"ANSWER: {answer} with {100 * float(confidence):.0f}% probability"

        texts = {"completion": "output", "chosen": "chosen", "rejected": "rejected"}
        texts = {ours: line(row[theirs]) for ours, theirs in texts.items() if theirs in row}
        return {"prompt": prompts[row["from"]["of"]["question"]], **texts, "from": row["from"]}

    write(OUT / "judged.jsonl", map(judged, sampled))
    for name, words in {"sft": ["sft-sampled"], "dpo": ["dpo", "--targets", "binary"]}.items():
        made = OUT / f"{name}.prepared.jsonl"
        made.unlink(missing_ok=True)
        candor("prepare", words[0], OUT / "judged.jsonl", made, *words[1:])
        write(OUT / f"{name}.jsonl", map(reworded, rows(made)))
    implicit = [
        {"prompt": row["prompt"], "completion": row["completion"], "is_correct": row["metrics"]["correct"] == 1}
        for row in sampled
    ]
    write(OUT / "implicit.jsonl", implicit)


def main():
    stages = sys.argv[1:] or ["data"]
    for stage in stages:
        name, _, approach = stage.partition(":")
        if name == "train" and APPROACHES[approach] is not None:
            train(approach, APPROACHES[approach])
        elif name == "data":
            data()


main()
