#!/usr/bin/env python3
"""A model of the shape of Gemma 2 2B with random weights, for measurements: a folder that Candor and transformers read.

usage: random-gemma2.py FOLDER [--layers 26] [--hidden 2304] [--intermediate 9216] [--heads 8] [--head-dim 256] [--vocabulary 256000]

Needs nothing but Python; the tokenizer is that of the tests' tiny model, most of whose token ids stay unused. Values repeat after a
million, which no measurement of speed notices."""

import argparse
import json
import pathlib
import random
import shutil
import struct

TOKENIZER = pathlib.Path(__file__).parent.parent / "tests/data/golden/tiny/llama"


def tensors(a):
    """Name, shape, and the scale of its values."""
    table, hidden, wide, narrow = 0.02, a.hidden, a.heads * a.head_dim, a.heads // 2 * a.head_dim
    yield "model.embed_tokens.weight", [a.vocabulary, hidden], table
    for layer in range(a.layers):
        name = f"model.layers.{layer}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{name}{norm}_layernorm.weight", [hidden], 0.1
        shapes = {"self_attn.q_proj": (wide, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden),
                  "self_attn.o_proj": (hidden, wide), "mlp.gate_proj": (a.intermediate, hidden),
                  "mlp.up_proj": (a.intermediate, hidden), "mlp.down_proj": (hidden, a.intermediate)}  # fmt: skip
        for part, shape in shapes.items():
            yield f"{name}{part}.weight", list(shape), 1.0 / shape[1] ** 0.5
    yield "model.norm.weight", [hidden], 0.1


def values(scale, count=1 << 20):
    """So many numbers of a normal distribution in bf16."""
    stream = random.Random(scale)
    bits = (struct.unpack("<I", struct.pack("<f", stream.gauss(0.0, scale)))[0] >> 16 for _ in range(count))
    return struct.pack(f"<{count}H", *bits)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    sizes = {"layers": 26, "hidden": 2304, "intermediate": 9216, "heads": 8, "head_dim": 256, "vocabulary": 256000}
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3,
        "head_dim": a.head_dim, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": a.hidden, "initializer_range": 0.02,
        "intermediate_size": a.intermediate, "max_position_embeddings": 8192, "num_attention_heads": a.heads,
        "num_hidden_layers": a.layers, "num_key_value_heads": a.heads // 2, "query_pre_attn_scalar": a.head_dim,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": a.vocabulary,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(a.layers)],
    }  # fmt: skip
    (a.folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TOKENIZER / file).exists():
            shutil.copy(TOKENIZER / file, a.folder / file)
    header, start, made = {}, 0, {}
    for name, shape, _ in tensors(a):
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(a.folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, _, scale in tensors(a):
            block = made.setdefault(scale, values(scale))
            begin, end = header[name]["data_offsets"]
            whole, rest = divmod(end - begin, len(block))
            for _ in range(whole):
                file.write(block)
            file.write(block[:rest])


main()
