# SPDX-License-Identifier: MIT-0
"""Prints the README's figures of memory: python .readme/memory.py (needs peft; a CPU, no download).

The table: what the backward pass keeps is counted in layers of each model's real shape, and all
else follows from the number of parameters. Below it the peak of a whole process is measured for a
small model, and compared with the formula."""

import copy
import multiprocessing
import re
import resource
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent.parent))
import kto  # noqa: E402

# The reference of the README's script for LoRA.
README = Path(__file__).parent.parent.joinpath("README.md").read_text("utf-8")
SCRIPT = {}
exec(re.search("(# kto_with_lora.py.*?)```", README, re.DOTALL)[1], SCRIPT)

# Kind, hidden size, inner size, layers, heads, heads of keys, vocabulary, tied weights.
MODELS = {
    "8 layers of SmolLM2-135M": ("llama", 576, 1536, 8, 9, 3, 49152, True),
    "warm-up": ("llama", 36, 96, 1, 9, 3, 64, True),
    "0.5B (Qwen2.5)": ("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "1B (Llama 3.2)": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "3B (Llama 3.2)": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "7B (Qwen2.5)": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}


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


def add_lora(model):
    """(policy, reference), set up as in the README's script for LoRA."""
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, settings)
    policy.activation_checkpointing_enable()
    return policy.train(), SCRIPT["WithoutAdapter"](policy)


def kept_bytes(model, tokens):
    """The bytes that a forward pass over one row keeps for the backward pass, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}  # by its address, each piece of memory counts once

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other gets this address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def bytes_of_a_token_in_a_layer(name, lora):
    """By differences, so that only what grows with the layers and with the tokens is counted."""
    grows = []
    for layers in (1, 2):
        model = build(name, "cpu", layers, vocabulary=64, dtype=torch.bfloat16 if lora else None)
        if lora:
            model = add_lora(model)[0]
            model.activation_checkpointing_disable()  # now one layer keeps all
        grows.append(kept_bytes(model, 64) - kept_bytes(model, 32))
    return (grows[1] - grows[0]) / 32


def adapter_size(model):
    """The number of weights that LoRA trains."""
    return add_lora(model)[0].num_parameters(only_trainable=True)


def line(name, prompt, completion, lora=False):
    """The gigabytes for 1, 4 and 8 rows of so many tokens of prompt and of completion."""
    _, hidden, inner, layers, _, _, vocabulary, _ = MODELS[name]
    model = build(name, "meta")
    a_layer = bytes_of_a_token_in_a_layer(name, lora)
    if lora:  # each layer keeps its input, and one layer at a time is computed again
        weights = 2 * model.num_parameters() + 16 * adapter_size(model)
        a_token = layers * 2 * hidden + a_layer
    else:
        weights = 22 * model.num_parameters()
        a_token = layers * a_layer
    a_row = (prompt + completion) * a_token + completion * 12 * vocabulary
    label = name + (" with LoRA" if lora else "")
    sizes = [weights, weights + a_row, weights + 4 * a_row, weights + 8 * a_row]
    figures = "".join(f"{size / 1e9:8.1f}" for size in sizes)
    share = a_layer / (32 * hidden + 8 * inner)
    print(f"{label:24}{prompt:5} + {completion:3}{figures}{share:10.2f}", flush=True)


def step_of(name, method, rows):
    """One training step of two micro-batches, each of `rows` rows of 128 + 128 tokens."""
    if method == "LoRA":
        policy, reference = add_lora(build(name, "cpu", dtype=torch.bfloat16))
    else:
        policy = build(name, "cpu")
        reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    for weight in policy.parameters():  # AdamW's memory is there after the first step
        if weight.requires_grad:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    texts = torch.randint(policy.config.vocab_size, (2, 2 * rows, 128)).tolist()
    batch = {"prompt": texts[0], "completion": texts[1], "label": [True] * (2 * rows)}
    with torch.autocast("cpu", torch.bfloat16, method != "float32", cache_enabled=False):
        next(kto.train(policy, reference, [batch], optimizer, micro_batch_size=rows))


def peak(method, rows):
    """Prints the bytes by which a step raises the peak of this process, beside the formula."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name = "8 layers of SmolLM2-135M"
    step_of("warm-up", method, rows)  # what the libraries need by themselves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step_of(name, method, rows)
    measured = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    _, hidden, inner, layers, _, _, vocabulary, _ = MODELS[name]
    model = build(name, "meta")
    a_layer = 32 * hidden + 8 * inner
    if method == "float32":
        weights = 20 * model.num_parameters()
        a_token = layers * (36 * hidden + 16 * inner)
    elif method == "bfloat16":
        weights = 22 * model.num_parameters()
        a_token = layers * a_layer
    else:
        weights = 2 * model.num_parameters() + 16 * adapter_size(model)
        a_token = layers * 2 * hidden + 0.90 * a_layer
    formula = weights + rows * (256 * a_token + 128 * 12 * vocabulary)
    print(f"one process, {method}, rows: {rows}, GB by formula: {formula / 1e9:.2f}, ", end="")
    print(f"at the peak: {measured / 1e9:.2f}", flush=True)


if __name__ == "__main__":
    # First the peaks: a new process begins with the peak of its parent.
    processes = multiprocessing.get_context("spawn")
    for method in ("float32", "bfloat16", "LoRA"):
        for rows in (1, 8):
            process = processes.Process(target=peak, args=(method, rows))
            process.start()
            process.join()
    warnings.simplefilter("ignore")
    header = f"{'tokens':>10}{'weights':>9}{'1 row':>7}{'4 rows':>8}{'8 rows':>8}  kept/formula"
    print(f"{'GB, bfloat16':24}{header}")
    line("0.5B (Qwen2.5)", 512, 512)
    line("1B (Llama 3.2)", 512, 512)
    line("3B (Llama 3.2)", 512, 512)
    line("7B (Qwen2.5)", 512, 512, lora=True)
    line("7B (Qwen2.5)", 2048, 512, lora=True)
