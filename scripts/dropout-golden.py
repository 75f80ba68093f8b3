#!/usr/bin/env python3
"""Makes tests/data/golden/dropout.json: the loss and the adapter's gradient that PEFT computes when its dropout is given our
masks. One demonstration and one preference pair on the tiny model, each half of the loss; the reference is the adapter itself
without dropout.

    python3 scripts/dropout-golden.py    # from the repository's root; needs torch, transformers and peft

What is dropped is written down here once more, from the definition: a row's key is that of (step, tree, branch, position), 0
being the prompt's branch; the projection's stream starts at the key of (layer, projection) under the row's; channel n is dropped
where the stream's number n is below p · 2^64.
"""

import json

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

MODEL = "tests/data/golden/tiny/llama"
SHARE, SEED, STEP, BETA = 0.25, 7, 3, 0.1
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [[5, 90, 210, 17, 44, 301], [(i * 53 + 7) % 320 for i in range(11)]]
BRANCHES = [[[40, 41, 250, 3, 2]], [[24, 30, 111, 2], [32, 24, 9, 8, 7, 6, 2]]]

GAMMA, DROPOUT, LIMIT = 0x9E3779B97F4A7C15, 4, (1 << 64) - 1


def mix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & LIMIT
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & LIMIT
    return value ^ (value >> 31)


def key(seed, counters):
    value = mix(seed)
    for counter in [DROPOUT, *counters]:
        value = mix(((value + GAMMA) & LIMIT) ^ mix(counter))
    return value


class Masked(torch.nn.Module):
    """Stands where PEFT has its dropout."""

    rows = None  # keys of the rows of the call; None: no dropout

    def __init__(self, layer, projection):
        super().__init__()
        self.place = [layer, projection]

    def forward(self, x):
        if Masked.rows is None:
            return x
        kept = torch.zeros(x.shape[1:])
        for row, row_key in enumerate(Masked.rows):
            start = key(row_key, self.place)
            for channel in range(x.shape[-1]):
                number = mix((start + GAMMA * (channel + 1)) & LIMIT)
                kept[row, channel] = float(number >= int(SHARE * 2**64))
        return x * kept / (1 - SHARE)


def logprobs(model, tree, branch, dropout):
    """Of the tokens of a branch, which is computed with its prompt and nothing else."""
    prompt, completion = PROMPTS[tree], BRANCHES[tree][branch]
    ids = prompt + completion
    places = [(0 if position < len(prompt) else branch + 1, position) for position in range(len(ids))]
    Masked.rows = [key(SEED, [STEP, tree, own, position]) for own, position in places] if dropout else None
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


def main():
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, f"{MODEL}/adapter_lora_all_rs", is_trainable=True)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parts = name.split(".")
            module.lora_dropout["default"] = Masked(int(parts[parts.index("layers") + 1]), PROJECTIONS.index(parts[-1]))
    model.train()
    demonstration = logprobs(model, 0, 0, True)
    chosen, rejected = (logprobs(model, 1, branch, True) for branch in (0, 1))
    with torch.no_grad():
        reference = [logprobs(model, 1, branch, False).sum() for branch in (0, 1)]
    margin = (chosen.sum() - reference[0]) - (rejected.sum() - reference[1])
    loss = -0.5 * demonstration.mean() - 0.5 * logsigmoid(BETA * margin)
    loss.backward()
    gradients = {
        name.replace(".default", ""): [parameter.grad.norm().item(), *parameter.grad.flatten()[:4].tolist()]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    golden = {
        "made_by": "scripts/dropout-golden.py",
        "share": SHARE, "seed": SEED, "step": STEP, "beta": BETA, "prompts": PROMPTS, "branches": BRANCHES,
        "loss": loss.item(), "margin": BETA * margin.item(),
        "norm_then_first_four_of_every_gradient": gradients,
    }  # fmt: skip
    with open("tests/data/golden/dropout.json", "w") as file:
        json.dump(golden, file)
        file.write("\n")


main()
