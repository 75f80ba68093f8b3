"""One measurement of what Candor is compared with, as a JSON line; `compare.py` runs it. SmolLM2-135M's shapes, LoRA r=16 on q, k, v, o.

usage: peers.py learner|generate|step MODEL_FOLDER [--dtype bfloat16] [--prompt 97] [--new 64] [--batch 32]
       [--device cpu] [--prompts 4] [--repeats 3]
needs torch, transformers, peft and, for `step`, trl and datasets."""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("THREADS", "2"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load(arguments):
    return AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    ).to(arguments.device)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")


def learner(arguments):
    """Forward and backward over 4 x 256 tokens, no checkpointing: the median of some passes, after one that is not counted."""
    from peft import get_peft_model

    model = get_peft_model(load(arguments), lora())
    model.config.use_cache = False
    ids = torch.randint(20, 49000, (4, 256), device=arguments.device)
    seconds = []
    for _ in range(1 + arguments.repeats):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return {"tokens_per_second": ids.numel() / statistics.median(seconds[1:])}


def generate(arguments):
    """Sampling exactly `new` tokens for every prompt of the batch; the time of the first token is taken off."""
    model = load(arguments).eval()
    ids = torch.randint(20, 49000, (arguments.batch, arguments.prompt), device=arguments.device)

    def run(new):
        started = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new
            )
        assert made.shape[1] == arguments.prompt + new
        return time.perf_counter() - started

    run(2)
    first, whole = run(1), run(arguments.new)
    return {"decode_tokens_per_second": arguments.batch * (arguments.new - 1) / (whole - first)}


def step(arguments):
    """The second of two GRPO steps of some prompts x 8 completions of exactly `new` tokens."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    words = "Use vivid details and short sentences, and mention the weather, the season, the people and their hopes. "
    topics = ["a lighthouse and a storm", "two robots who garden", "a train lost in snow", "a baker and a dragon"]

    def prompt(topic):
        ids = tokenizer(f"Write a story about {topic}. " + words * 30, add_special_tokens=False).input_ids
        return tokenizer.decode(ids[: arguments.prompt])

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, report_to=[], use_cpu=arguments.device == "cpu", bf16=False, fp16=False, save_strategy="no", disable_tqdm=True,
            logging_steps=10**6, gradient_checkpointing=False, learning_rate=1e-5, beta=0.0, per_device_train_batch_size=8,
            gradient_accumulation_steps=arguments.prompts, num_generations=8, max_completion_length=arguments.new,
            generation_kwargs={"min_new_tokens": arguments.new}, temperature=1.0, max_steps=2,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=load(arguments), reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions],
            train_dataset=Dataset.from_list([{"prompt": prompt(topics[i % len(topics)])} for i in range(arguments.prompts)]), processing_class=tokenizer,
            peft_config=lora(), args=config,
        )  # fmt: skip
        marks, inner = [], trainer.training_step
        def timed(*values, **named):
            marks.append(time.perf_counter())
            return inner(*values, **named)
        trainer.training_step = timed
        trainer.train()
        ended = time.perf_counter()
    return {"step_seconds": ended - marks[len(marks) // 2]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["learner", "generate", "step"])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=97)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="passes of `learner` that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    torch.manual_seed(0)
    measured = globals()[arguments.what](arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if arguments.device != "cpu":
        peak = torch.cuda.max_memory_reserved()
    print(json.dumps({"what": arguments.what, "dtype": arguments.dtype, **measured, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
