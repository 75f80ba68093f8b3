#!/usr/bin/env python3
"""Makes JSON lines of TriviaQA for `name = "simpleqa"`: scripts/triviaqa-jsonl.py FILE > triviaqa.jsonl

FILE is an Arrow stream or a parquet file, such as rc.nocontext/train-00000-of-00001.parquet of mandarjoshi/trivia_qa on the
hub. Needs pyarrow. Each line is {"id", "question", "answers"}.
"""

import ast
import json
import sys

import pyarrow
import pyarrow.parquet


def table(path):
    if path.endswith(".parquet"):
        return pyarrow.parquet.read_table(path)
    return pyarrow.ipc.open_stream(path).read_all()


def answers(answer):
    """A list, a Python list's literal, or TriviaQA's own {value, aliases}."""
    if isinstance(answer, str):
        return ast.literal_eval(answer) if answer.startswith("[") else [answer]
    if isinstance(answer, dict):
        return [answer["value"], *answer["aliases"]]
    return answer


for row in table(sys.argv[1]).to_pylist():
    unique = list(dict.fromkeys(text.strip() for text in answers(row["answer"]) if text.strip()))
    print(json.dumps({"id": row["question_id"], "question": row["question"], "answers": unique}, ensure_ascii=False))
