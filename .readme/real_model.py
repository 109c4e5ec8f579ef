"""KTO and SFT on a real model, when a fifth of the labels is wrong.

    python .readme/real_model.py FOLDER [bfloat16|float32]

FOLDER holds SmolLM2-135M-Instruct (`python .ci/real_model.py FOLDER` writes it).

What is done: the model is first taught both tones of the sample, by SFT on rows
whose labels are ignored. It then answers politely or rudely. This is the reference.
Then a fifth of the labels is turned round. KTO learns from all rows, and SFT from
those that are marked desirable. Last, both are tried without the first stage.

What is counted: the answers to 100 prompts that nobody trained on. An answer is
polite or rude if its first sentence is that of a polite or of a rude completion of
the sample. Each sampled figure is a mean of three seeds of sampling.

How long it takes: about 25 minutes of one core that has AMX for bfloat16, and
several times as long in float32 or on an older core.

What it cannot show: there is one model, one seed of training, and one learning rate
for both methods, which was not tuned. The first sentence says nothing about the rest
of an answer. An answer that is counted as neither may still be rude. DPO is absent,
because these rows make no pairs.
"""

import copy
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # so that kto.py is found

from kto import Config, completion_logps, kto_step, load_rows, micro_batches  # noqa: E402

SAMPLE = ROOT / "data_sample.jsonl"

# ---- The rows, and the tone of an answer ------------------------------------------


def first_sentence(text):
    """The text up to its first full stop, question mark or colon; all of it if it has
    none of them."""
    return re.split("(?<=[.?:])", text)[0]


def openings():
    """{the first sentence of each completion of the sample: True if polite, else False}."""
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    return {first_sentence(row["completion"]): row["label"] for row in rows}


def unseen_and_trained(tokenizer, dice):
    """100 prompts, and the rows of all other prompts, as lists of token ids."""
    with tempfile.TemporaryDirectory() as cache:
        rows = load_rows(Config(data=str(SAMPLE)), tokenizer, cache)
        rows = rows.select_columns(["prompt", "completion", "label"]).to_list()

    # Some prompts are in several rows. All rows of an unseen prompt are left out.
    prompts = dict.fromkeys(tuple(row["prompt"]) for row in rows)
    unseen = dice.sample(list(prompts), 100)
    trained = [row for row in rows if tuple(row["prompt"]) not in unseen]
    return [list(prompt) for prompt in unseen], trained


def with_wrong_labels(rows, count, dice):
    """The same rows, but `count` of them, drawn at random, have the other label."""
    rows = [dict(row) for row in rows]
    for row in dice.sample(rows, count):
        row["label"] = not row["label"]
    return rows


# ---- The training -----------------------------------------------------------------


def sft_step(policy, reference, batch, micro_batch_size):
    """Adds the gradient of the SFT loss to the policy's: minus the log-probability of a
    completion token, the mean over the batch.

    The reference is not used. It is an argument so that SFT and KTO are called alike.
    """
    tokens = sum(len(y) for y in batch["completion"])
    for _, x, y in micro_batches(batch["prompt"], batch["completion"], micro_batch_size):
        loss = -completion_logps(policy, x, y).sum() / tokens
        loss.backward()


def batches_of(rows, epochs, first_seed=0):
    """Batches of 32 rows. Each epoch has its own order of the rows, and leaves out what
    does not fill a batch."""
    batches = []
    for epoch in range(epochs):
        shuffled = datasets.Dataset.from_list(rows).shuffle(seed=first_seed + epoch)
        batches += shuffled.iter(batch_size=32, drop_last_batch=True)
    return batches


def tuned(reference, rows, add_gradient, lr, epochs):
    """A copy of the reference, all weights of which are trained. The learning rate falls
    to zero in a straight line."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    batches = batches_of(rows, epochs)
    for step, batch in enumerate(tqdm(batches, leave=False, disable=None)):
        add_gradient(policy, reference, batch, micro_batch_size=16)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.step()
        optimizer.zero_grad()
    return policy


# ---- The answers ------------------------------------------------------------------

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}  # 0: any token may be drawn
GREEDY = {"do_sample": False}


def answers(model, tokenizer, prompts, longest, decoding, seed=0):
    """One answer to each prompt, as token ids. An answer ends with its end token, or has
    `longest` tokens."""
    torch.manual_seed(seed)
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=longest, **decoding)
    end = tokenizer.eos_token_id
    written = []
    for y in ids[:, inputs.input_ids.shape[1] :].tolist():
        written.append(y[: y.index(end) + 1] if end in y else y)
    return written


def shares(written, tokenizer):
    """The shares of the polite and of the rude among some answers."""
    tone_of = openings()
    tones = [tone_of.get(first_sentence(text)) for text in tokenizer.batch_decode(written)]
    return tones.count(True) / len(tones), tones.count(False) / len(tones)


def count_tones(name, model, tokenizer, prompts):
    """Prints a line of the table."""
    sampled = []
    for seed in range(3):
        sampled += answers(model, tokenizer, prompts, 10, SAMPLED, seed)
    greedy = answers(model, tokenizer, prompts, 10, GREEDY)
    line = f"| {name:32} "
    for written in (sampled, greedy):
        polite, rude = shares(written, tokenizer)
        line += f"| {polite:.2f} / {rude:.2f} "
    print(line + "|", flush=True)


def load(folder, dtype=torch.float32):
    """The tokenizer and the model. Eager attention is the fastest for such short rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    return tokenizer, model.eval()


def bfloat16(enabled=True):
    """The precision of the arithmetic. A cache would keep copies of weights that a step
    has changed since, so there is none."""
    return torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False)


def main(folder, dtype="bfloat16"):
    torch.set_num_threads(1)
    tokenizer, model = load(folder)
    dice = random.Random(0)
    unseen, rows = unseen_and_trained(tokenizer, dice)
    noisy = with_wrong_labels(rows, len(rows) // 5, dice)
    good = [row for row in noisy if row["label"]]
    mistakes = sum(row["label"] and not old["label"] for row, old in zip(noisy, rows))
    print(f"{len(rows)} rows, a fifth of the labels wrong; {len(good)} are marked desirable,")
    print(f"{mistakes} of them by mistake.\n")
    print(f"| {'polite / rude':32} | sampled     | greedy      |\n|---|---|---|")

    with bfloat16(dtype == "bfloat16"):
        count_tones("the model as it comes", model, tokenizer, unseen)
        reference = tuned(model, rows, sft_step, 1e-4, 5)
        count_tones("SFT on all rows: the reference", reference, tokenizer, unseen)
        runs = [
            ("KTO", reference, noisy, kto_step, 2e-5, 1),
            ("SFT on desirable rows", reference, good, sft_step, 2e-5, 1),
            ("without the first stage: KTO", model, noisy, kto_step, 5e-5, 3),
            ("without the first stage: SFT", model, good, sft_step, 5e-5, 3),
        ]
        for name, *settings in runs:
            count_tones(name, tuned(*settings), tokenizer, unseen)


if __name__ == "__main__":
    main(*sys.argv[1:])
