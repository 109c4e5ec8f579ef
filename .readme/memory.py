# SPDX-License-Identifier: MIT-0
"""Prints the README's figures of memory: python .readme/memory.py (needs peft; a CPU, no download).

The table: what the backward pass keeps is counted in layers of each model's real shape, and all
else follows from the number of parameters. Below it the peak of a whole process is measured for a
small model, and compared with the formula."""

import copy
import multiprocessing
import resource
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import kto  # noqa: E402

# Kind, hidden size, inner size, layers, heads, heads of keys, vocabulary, tied weights.
MODELS = {
    "8 layers of SmolLM2-135M": ("llama", 576, 1536, 8, 9, 3, 49152, True),
    "warm-up": ("llama", 36, 96, 1, 9, 3, 64, True),
    "0.5B (Qwen2.5)": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "1B (Llama 3.2)": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "3B (Llama 3.2)": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "7B (Qwen2.5)": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}
LORA = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def build(name, device, layers=None, vocabulary=None, dtype=None):
    """A model of this name's shape with random weights, in eval mode."""
    kind, hidden, inner, all_layers, heads, key_heads, all_tokens, tied = MODELS[name]
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=vocabulary or all_tokens,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
    )
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def kept_bytes(model, tokens, autocast):
    """The bytes that a forward pass over one row keeps for the backward pass, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}  # by its address, each piece of memory counts once

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other gets this address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def bytes_of_a_token_in_a_layer(name, lora):
    """By differences, so that only what grows with the layers and with the tokens is counted."""
    grows = []
    for layers in (1, 2):
        model = build(name, "cpu", layers, vocabulary=64, dtype=torch.bfloat16 if lora else None)
        if lora:
            model = peft.get_peft_model(model, LORA).eval()
        with_64 = kept_bytes(model, 64, autocast=not lora)
        grows.append(with_64 - kept_bytes(model, 32, autocast=not lora))
    return (grows[1] - grows[0]) / 32


def line(name, tokens, lora=False):
    """The gigabytes of `tokens` of prompt and as many of completion, for one row and for 8."""
    model = build(name, "meta")
    weights = 22 * model.num_parameters()
    if lora:
        weights = 2 * model.num_parameters()
        adapted = peft.get_peft_model(model, LORA)
        weights += 16 * sum(part.numel() for part in adapted.parameters() if part.requires_grad)
    hidden, inner, layers, vocabulary = (MODELS[name][place] for place in (1, 2, 3, 6))
    a_token = layers * bytes_of_a_token_in_a_layer(name, lora)
    a_row = 2 * tokens * a_token + tokens * 12 * vocabulary
    formula = layers * (32 * hidden + 8 * inner)
    label = name + (" with LoRA" if lora else "")
    sizes = [weights, weights + a_row, weights + 8 * a_row]
    figures = "".join(f"{size / 1e9:8.1f}" for size in sizes)
    print(f"{label:24}{tokens:4} + {tokens:3}{figures}{a_token / formula:10.2f}", flush=True)


def step_of(name, dtype, rows):
    """One training step of two micro-batches, each of `rows` rows of 128 + 128 tokens."""
    policy = build(name, "cpu")
    reference = copy.deepcopy(policy).requires_grad_(False)
    if dtype == "bfloat16":
        for model in (policy, reference):
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    for weight in policy.parameters():  # AdamW's memory is there after the first step
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    texts = torch.randint(policy.config.vocab_size, (2, 2 * rows, 128)).tolist()
    batch = {"prompt": texts[0], "completion": texts[1], "label": [True] * (2 * rows)}
    next(kto.train(policy, reference, [batch], optimizer, micro_batch_size=rows))
    return policy.num_parameters()


def peak(dtype, rows):
    """Prints the bytes by which a step raises the peak of this process, beside the formula."""
    torch.set_num_threads(1)
    step_of("warm-up", dtype, rows)  # what the libraries need by themselves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = step_of("8 layers of SmolLM2-135M", dtype, rows)
    measured = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    _, hidden, inner, layers, _, _, vocabulary, _ = MODELS["8 layers of SmolLM2-135M"]
    a_token = {"float32": 36 * hidden + 16 * inner, "bfloat16": 32 * hidden + 8 * inner}[dtype]
    weights = {"float32": 20, "bfloat16": 22}[dtype] * parameters
    formula = weights + rows * (layers * 256 * a_token + 128 * 12 * vocabulary)
    print(f"one process, {dtype}, rows: {rows}, peak / formula: {measured / formula:.2f}")


if __name__ == "__main__":
    # First the peaks: a new process begins with the peak of its parent.
    processes = multiprocessing.get_context("spawn")
    for dtype in ("float32", "bfloat16"):
        for rows in (1, 8):
            process = processes.Process(target=peak, args=(dtype, rows))
            process.start()
            process.join()
    warnings.simplefilter("ignore")
    print(f"{'GB, bfloat16':24}{'tokens':>9}{'weights':>9}{'1 row':>7}{'8 rows':>8}  kept/formula")
    line("0.5B (Qwen2.5)", 512)
    line("1B (Llama 3.2)", 512)
    line("3B (Llama 3.2)", 512)
    line("7B (Qwen2.5)", 256, lora=True)
