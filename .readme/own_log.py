"""KTO and SFT with LoRA on a log of a model's own answers, nine thumbs up to one down.

    pip install peft==0.21.2 trl==1.16.0
    python .readme/own_log.py FOLDER

FOLDER holds SmolLM2-135M-Instruct (`python .ci/real_model.py FOLDER` writes it).

What is done, in five stages:
  1. The model is taught both tones of the sample, by SFT with all its weights. It
     then answers politely or rudely. This is the product's model and the reference.
  2. It answers training prompts, sampled at temperature 1, two times each. Polite
     answers get a thumb up, rude ones a thumb down, all others are left out. The log
     has 173 thumbs up and 19 down. A second log has the same rows, but a tenth of
     the marks, drawn at random, is turned round.
  3. For each log, each method gets its learning rate out of three, and one or two
     epochs, on 64 training prompts that are not in the log. The best setting has the
     largest difference of the polite share and the rude share of 128 sampled answers.
     The rate rises over the first four steps and stays.
  4. Another seed of training, which decides the adapter's first weights and the order
     of the rows. Then both seeds answer 100 prompts that no stage trained on.
  5. A few steps of KTO are timed, here and in TRL, each in a process of its own, on
     the same rows, with the same LoRA, batch, rate and precision.

What is counted: the tone of an answer is that of its first sentence, as in
real_model.py. Each sampled share is a mean of three seeds of sampling. The length, in
tokens, and the KL are means over the first of these. The KL is the mean of
log pi_theta - log pi_ref over the policy's own answers, in nats per answer. An answer
is cut after 44 tokens.

What is simplified: the chat template has no system turn, so that rows are a third
shorter. To answer, the adapter is added to the weights, which are then rounded to
bfloat16.

How long it takes: about two hours of one core that has AMX for bfloat16. Each stage
is kept in FOLDER/own_log, so that the command may be stopped and goes on.

What it cannot show: 192 rows are few, and the tone is an easy thing to learn. There
are two seeds of training, and the first of them is the one that was tuned. Two epochs,
the most that were tried, won nearly everywhere, and SFT did best at the largest rate.
The first sentence says nothing about the rest of an answer.
"""

import functools
import json
import random
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from real_model import (
    GREEDY,
    SAMPLED,
    answers,
    batches_of,
    bfloat16,
    load,
    sft_step,
    shares,
    tuned,
    unseen_and_trained,
    with_wrong_labels,
)

from kto import completion_logps, kto_step, metrics_of, micro_batches

KTO_EQ_9, KTO_ONE, SFT = "KTO, weights of Eq. 9", "KTO, both lambdas 1", "SFT on the thumbs up"
METHODS = (KTO_EQ_9, KTO_ONE, SFT)
LOGS = ("clean", "a tenth wrong")
RATES = (3e-4, 1e-3, 3e-3)
EPOCHS = (1, 2)
SEEDS = (0, 1)  # the first is that of the tuning
LONGEST = 44  # tokens of an answer
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

# The chat template of the model, without its system turn.
TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def kept(path, make):
    """What `make` returns, from the file if it was made before."""
    if not path.exists():
        began = time.perf_counter()
        result = make()
        path.write_text(json.dumps({"seconds": time.perf_counter() - began, "result": result}))
    return json.loads(path.read_text())["result"]


# ---- Stages 1 and 2: the reference and its log ------------------------------------


def make_reference(folder, home):
    """Stage 1. The rounding to bfloat16 belongs to it, as to most published models."""
    tokenizer, model = load(folder)
    tokenizer.chat_template = TEMPLATE
    _, rows = unseen_and_trained(tokenizer, random.Random(0))
    reference = tuned(model, rows, sft_step, 1e-4, 5)
    reference.to(torch.bfloat16).save_pretrained(home / "reference")
    tokenizer.save_pretrained(home / "reference")


def make_logs(tokenizer, reference, prompts):
    """Stage 2: {name of the log: its rows}."""
    polite, rude = [], []
    for seed in range(2):
        for x, y in zip(prompts, answers(reference, tokenizer, prompts, LONGEST, SAMPLED, seed)):
            is_polite, is_rude = shares([y], tokenizer)
            if is_polite:
                polite.append({"prompt": x, "completion": y, "label": True})
            if is_rude:
                rude.append({"prompt": x, "completion": y, "label": False})
    print(f"the reference wrote {len(polite)} polite and {len(rude)} rude answers", flush=True)
    dice = random.Random(0)
    clean = dice.sample(polite, 173) + dice.sample(rude, 19)
    return {"clean": clean, "a tenth wrong": with_wrong_labels(clean, len(clean) // 10, dice)}


# ---- Stage 3: the training --------------------------------------------------------


class WithoutAdapter:
    """The reference: the policy with its adapter switched off."""

    def __init__(self, policy):
        self.policy = policy
        self.device = policy.device
        self.get_output_embeddings = policy.get_output_embeddings

    def __call__(self, **inputs):
        with self.policy.disable_adapter():
            return self.policy(**inputs)


def add_lora(model, seed):
    """The policy: the model, frozen in bfloat16, with an adapter in float32."""
    torch.manual_seed(seed)
    return get_peft_model(model, LORA).eval()


def rows_and_step(method, log):
    """The rows that a method learns from, and the function that adds its gradient."""
    up = [row for row in log if row["label"]]
    if method == SFT:
        return up, sft_step
    n_d, n_u = len(up), len(log) - len(up)
    lambda_u = n_d / n_u if method == KTO_EQ_9 else 1.0
    return log, functools.partial(kto_step, beta=0.1, lambda_d=1.0, lambda_u=lambda_u)


def adapter_of(policy):
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def train_epoch(policy, optimizer, rows, add_gradient, lr, seed, z0_above_0):
    """One epoch. Appends to `z0_above_0` whether z0 was above 0 in each step; with SFT,
    which has no z0, it appends False."""
    reference = WithoutAdapter(policy)
    for batch in batches_of(rows, 1, first_seed=seed):
        optimizer.param_groups[0]["lr"] = lr * min(1, (len(z0_above_0) + 1) / 4)
        # peft would turn each layer's input into float32, and autocast back into bfloat16.
        with disable_input_dtype_casting(policy):
            result = add_gradient(policy, reference, batch, micro_batch_size=16)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        z0_above_0.append(result is not None and metrics_of(*result)["z0"] > 0)


def trained(home, log_name, log, method, lr, epochs, seed):
    """The policy of a run, ready to answer, and whether z0 was above 0 in each step."""
    _, model = load(home / "reference", torch.bfloat16)
    policy = add_lora(model, seed)
    weights = adapter_of(policy)
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0, fused=True)
    rows, add_gradient = rows_and_step(method, log)
    z0_above_0 = []
    for epoch in range(epochs):
        path = home / f"{log_name}, {method}, {lr:g}, seed {seed}, epochs {epoch + 1}.pt"
        if path.exists():
            adapter, state, z0_above_0 = torch.load(path)
            policy.load_state_dict(adapter, strict=False)
            optimizer.load_state_dict(state)
        else:
            order = 100 * seed + epoch
            train_epoch(policy, optimizer, rows, add_gradient, lr, order, z0_above_0)
            torch.save([weights, optimizer.state_dict(), z0_above_0], path)

    # Only the weights are rounded. The frequencies of the positions stay in float32. A
    # frozen head would answer slowly, because torch would copy its weight for each row.
    policy = policy.float().merge_and_unload().requires_grad_(True)
    for weight in policy.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return policy, z0_above_0


def score(home, tokenizer, prompts, *run):
    """Stage 3: the polite share minus the rude share, and both shares."""
    policy, _ = trained(home, *run)
    sampled = []
    for seed in range(2):
        sampled += answers(policy, tokenizer, prompts, 10, SAMPLED, seed)
    polite, rude = shares(sampled, tokenizer)
    return polite - rude, polite, rude


def tune(home, tokenizer, prompts, logs):
    """Stage 3: {(log, method): (rate, epochs)}, and the table of all settings."""
    best = {}
    print("\nPolite - rude share on the validation prompts, after one / two epochs, by rate:\n")
    print("| log | method |", *(f"{lr:g} |" for lr in RATES))
    print("|---|---|" + "---|" * len(RATES))
    for log_name in LOGS:
        for method in METHODS:
            scores, line = {}, f"| {log_name} | {method} |"
            for lr in RATES:
                for epochs in EPOCHS:
                    run = log_name, logs[log_name], method, lr, epochs, SEEDS[0]
                    path = home / f"{log_name}, {method}, {lr:g}, {epochs}, validation.json"
                    make = functools.partial(score, home, tokenizer, prompts, *run)
                    scores[lr, epochs] = kept(path, make)[0]
                line += f" {scores[lr, 1]:.2f} / {scores[lr, 2]:.2f} |"
            best[log_name, method] = max(scores, key=scores.get)
            print(line, flush=True)
    return best


# ---- Stage 4: what became of the answers ------------------------------------------


@torch.no_grad()
def logps_of(model, prompts, written):
    """log pi(y|x) of each answer."""
    logps = torch.zeros(len(prompts))
    for index, x, y in micro_batches(prompts, written, 32):
        logps[index] = completion_logps(model, x, y)
    return logps


def measure(home, tokenizer, prompts, policy, z0_above_0):
    """Stage 4: the figures of one policy. Ten tokens suffice for the tone."""
    whole = answers(policy, tokenizer, prompts, LONGEST, SAMPLED, seed=0)
    sampled = whole + answers(policy, tokenizer, prompts, 10, SAMPLED, seed=1)
    sampled += answers(policy, tokenizer, prompts, 10, SAMPLED, seed=2)
    greedy = answers(policy, tokenizer, prompts, 10, GREEDY)
    _, reference = load(home / "reference", torch.bfloat16)
    kl = logps_of(policy, prompts, whole) - logps_of(reference, prompts, whole)
    return {
        "sampled": shares(sampled, tokenizer),
        "greedy": shares(greedy, tokenizer),
        "tokens": sum(map(len, whole)) / len(whole),
        "kl": kl.mean().item(),
        "kl_error": kl.std().item() / len(kl) ** 0.5,
        "z0_above_0": [sum(z0_above_0), len(z0_above_0)],
    }


def line_of(name, setting, figures):
    """A line of the final table. Where there are two seeds, it has both figures."""
    cells = [name, setting]
    for decoding in ("sampled", "greedy"):
        for tone in (0, 1):
            cells.append(" ".join(f"{figure[decoding][tone]:.2f}" for figure in figures))
    cells.append(" ".join(f"{figure['tokens']:.1f}" for figure in figures))
    cells.append(" ".join(f"{figure['kl']:.1f}" for figure in figures))
    has_z0 = setting and "SFT" not in name
    cells.append(" ".join("{}/{}".format(*f["z0_above_0"]) for f in figures) if has_z0 else "")
    return "| " + " | ".join(cells) + " |"


def final_table(home, tokenizer, prompts, reference, logs, best):
    columns = ["log, method", "rate, epochs", "polite", "rude", "polite, greedy", "rude, greedy"]
    columns += ["tokens", "KL", "z0 > 0"]
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    make = functools.partial(measure, home, tokenizer, prompts, reference, [])
    figures = [kept(home / "reference, final.json", make)]
    table.append(line_of("the reference", "", figures))
    for (log_name, method), (lr, epochs) in best.items():
        figures = []
        for seed in SEEDS:

            def make():
                run = log_name, logs[log_name], method, lr, epochs, seed
                return measure(home, tokenizer, prompts, *trained(home, *run))

            path = home / f"{log_name}, {method}, {lr:g}, {epochs}, seed {seed}, final.json"
            figures.append(kept(path, make))
        table.append(line_of(f"{log_name}: {method}", f"{lr:g}, {epochs}", figures))
    print("\nThe 100 held-out prompts; where two figures stand, they are two seeds of training:\n")
    print("\n".join(table), flush=True)


# ---- Stage 5: time and memory, here and in TRL ------------------------------------


def time_here(model, rows, micro):
    """The seconds of each step, in which other programs do not count."""
    policy = add_lora(model, seed=0)
    optimizer = torch.optim.AdamW(adapter_of(policy).values(), lr=1e-3, fused=True)
    seconds = []
    for batch in batches_of(rows, 1)[:3]:
        began = time.process_time()
        with bfloat16(), disable_input_dtype_casting(policy):
            kto_step(policy, WithoutAdapter(policy), batch, micro)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    return seconds


def time_trl(model, rows, micro, tokenizer, home):
    """The same with TRL. Its gradient checkpointing, which is on by default, is switched
    off, and so is the conversion in peft. Its reference has no adapter either."""
    import datasets
    from transformers import TrainerCallback
    from trl import KTOConfig, KTOTrainer

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **others):
            seconds.append(time.process_time())

        def on_step_end(self, *arguments, **others):
            seconds[-1] = time.process_time() - seconds[-1]

    # TRL takes texts, and puts the end token after each completion by itself.
    texts = []
    for batch in batches_of(rows, 1)[:3]:
        for x, y, label in zip(batch["prompt"], batch["completion"], batch["label"]):
            y = y[:-1] if y[-1] == tokenizer.eos_token_id else y
            row = {"prompt": tokenizer.decode(x), "completion": tokenizer.decode(y)}
            texts.append(row | {"label": label})
    config = KTOConfig(
        str(home / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=32 // micro,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        max_grad_norm=10.0,
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = datasets.Dataset.from_list(texts)
    settings = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": LORA}
    trainer = KTOTrainer(model, args=config, callbacks=[Clock()], **settings)
    with disable_input_dtype_casting(trainer.model):
        trainer.train()
    return seconds


def time_one(home, trainer, micro):
    """Stage 5, in a process of its own: seconds a step, and the peak of memory in GB."""
    tokenizer, model = load(home / "reference", torch.bfloat16)
    rows = json.loads((home / "logs.json").read_text())["result"]["clean"]
    if trainer == "TRL":
        seconds = time_trl(model, rows, micro, tokenizer, home)
    else:
        seconds = time_here(model, rows, micro)
    # The first step is slower, because memory and kernels are prepared in it.
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print("RESULT", json.dumps([sum(seconds[1:]) / len(seconds[1:]), 1024 * peak / 1e9]))


def timings(folder, home):
    print("\nKTO with LoRA, 32 rows a step, means of two steps after the first:\n")
    print("| rows in memory | kto.py, s | kto.py, GB | TRL, s | TRL, GB |\n|---|---|---|---|---|")
    for micro in (1, 2, 8):
        line = f"| {micro} "
        for trainer in ("kto.py", "TRL"):

            def make():
                command = [sys.executable, __file__, folder, trainer, str(micro)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                return json.loads(printed.split("RESULT")[1].splitlines()[0])

            if trainer == "TRL" and micro == 1:
                line += "| not possible | "
            else:
                seconds, gigabytes = kept(home / f"time, {trainer}, {micro}.json", make)
                line += f"| {seconds:.1f} | {gigabytes:.1f} "
        print(line + "|", flush=True)


def main(folder):
    home = Path(folder) / "own_log"
    home.mkdir(exist_ok=True)
    kept(home / "reference.json", functools.partial(make_reference, folder, home))
    tokenizer, reference = load(home / "reference", torch.bfloat16)

    # The 64 prompts for the tuning are prompts that the reference was taught. The log
    # has none of them.
    dice = random.Random(0)
    held_out, rows = unseen_and_trained(tokenizer, dice)
    distinct = dict.fromkeys([tuple(row["prompt"]) for row in rows])
    prompts = [list(prompt) for prompt in distinct]
    dice.shuffle(prompts)
    validation, asked = prompts[:64], prompts[64:]

    logs = kept(home / "logs.json", functools.partial(make_logs, tokenizer, reference, asked))
    best = tune(home, tokenizer, validation, logs)
    final_table(home, tokenizer, held_out, reference, logs, best)
    timings(folder, home)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if len(sys.argv) > 2:
        time_one(Path(sys.argv[1]) / "own_log", sys.argv[2], int(sys.argv[3]))
    else:
        with bfloat16():
            main(sys.argv[1])
