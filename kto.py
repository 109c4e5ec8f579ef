# SPDX-License-Identifier: MIT-0
"""KTO in one file: align a language model with thumbs up and thumbs down.

The paper: "KTO: Model Alignment as Prospect Theoretic Optimization", Ethayarajh et al., ICML 2024,
arXiv 2402.01306; equations and sections are numbered as in its v5. The data are rows of a prompt x,
a completion y and a label: y is desirable or not. One step; its numbers return in the comments:

  1. Take m rows (x, y, label), in any mix of the two classes.
  2. Pair each x with the completion y' of the next row; the last row meets the first.
  3. Score: sum the log-probabilities of the completion's tokens, under policy and reference.
  4. z0 = max(0, mean over the m mismatched pairs (x, y') of log pi_theta - log pi_ref)        §4.1
  5. r = log pi_theta(y|x) - log pi_ref(y|x), and from it the loss of each row:                Eq. 8
         v = lambda_d * sigmoid(beta * (r - z0))      if y is desirable
         v = lambda_u * sigmoid(beta * (z0 - r))      if y is undesirable
         loss = lambda_y - v
  6. Step down the gradient of the mean loss, in which z0 is a constant.                      Eq. 10

  in the paper          here                what it is
  pi_theta, pi_ref      policy, reference   the model in training, its frozen starting point
  log pi(y|x)           logps               one sum per row, in nats
  r_theta(x, y), z_0    r, z0               implicit reward of a row, reference point of a batch
  v(x, y), beta         v, beta             value of a row, and how soon it saturates
  lambda_D, lambda_U    lambda_d, lambda_u  weight of desirable and of undesirable rows
  shapes: m rows a step, B rows a call, T tokens each, N scored in all, H hidden size, V vocabulary

  python kto.py                                                    offline, two CPU cores, a minute
  python kto.py --model NAME_OR_FOLDER --data FILE.jsonl --output FOLDER          your own feedback
"""

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import reprlib
import signal
import time
from array import array
from pathlib import Path

import datasets
import torch
import transformers
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
reprlib.aRepr.maxdict = 20  # keys that a message about a row names

class InputError(ValueError):
    """What the user gave cannot be used. The message says what was found, where, what to do."""

@dataclasses.dataclass
class Config:
    """The settings of a run, each a flag. Where the paper names a default (§4.2), it is ours."""
    model: str = HfArg(default="tiny", help="hub name or folder; 'tiny' is built and taught here")
    data: str = HfArg(default="data_sample.jsonl", help="JSONL: {prompt, completion, label}")
    output: str | None = HfArg(default=None, help="folder for the result; kto-MODEL if not given")
    epochs: int = HfArg(default=3, help="passes over the data")
    max_steps: int = HfArg(default=0, help="stop after this many steps; 0: after the last epoch")
    batch_size: int = HfArg(default=32, help="m, the rows of one step (useful: 8 to 128)")
    micro_batch_size: int = HfArg(default=8, help="rows in memory at once; for memory alone")
    lr: float | None = HfArg(default=None, help="peak learning rate: 5e-6, for 'tiny' 5e-4")
    beta: float = HfArg(default=0.1, help="larger saturates sooner: nearer the reference (Eq. 8)")
    lambda_d: float = HfArg(default=1.0, help="lambda_D, weight of desirable rows (Eq. 9)")
    lambda_u: float = HfArg(default=1.0, help="lambda_U, weight of undesirable rows (Eq. 9)")
    max_prompt_length: int = HfArg(default=512, help="tokens kept, from the end of the prompt")
    max_completion_length: int = HfArg(default=512, help="tokens kept, from its start")
    holdout: int = HfArg(default=10, help="every holdout-th row is kept for evaluation; 0: none")
    chat_template: bool = HfArg(default=True, help="whether plain strings become chat turns")
    dtype: str = HfArg(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]},
                       help="of the forward passes; auto: bfloat16 on CUDA; weights: float32")
    seed: int = HfArg(default=0, help="of the order of the rows and of the tiny model")
    save_every: int = HfArg(default=0, help="steps between checkpoints; 0: only if interrupted")
    resume: bool = HfArg(default=False, help="go on from the checkpoint in --output")

    def __post_init__(self):
        if self.lr is None:
            self.lr = 5e-4 if self.model == "tiny" else 5e-6
        if self.dtype == "auto":
            self.dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
        self.output = self.output or f"kto-{Path(self.model).name}"
        least = {"batch_size": 2, "micro_batch_size": 1, "epochs": 1}
        least |= {"max_prompt_length": 1, "max_completion_length": 1}
        for name, value in vars(self).items():
            if not isinstance(value, str) and not least.get(name, 0) <= value < math.inf:  # nor nan
                raise InputError(f"--{name} {value}: must be finite and >= {least.get(name, 0)}")

# ---- The maths -----------------------------------------------------------------------------------
def completion_logps(model, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """log pi(y|x) of each row: (B,), float32, in nats, summed (not averaged) over y's tokens.

    `model` is a causal LM of transformers; `prompts` and `completions` are B ragged lists of token
    ids. What is scored is decided by position, never by token id: EOS counts, whatever it equals.
    Raises ValueError if the lists differ in length or a prompt is empty: nothing predicts y then.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens: the first completion token needs one before it")
    # Rows are padded on the right, with any id and no mask: no causal model looks to the right.
    rows = [torch.tensor([*x, *y]) for x, y in zip(prompts, completions, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # (B, T)
    is_target = torch.zeros_like(ids, dtype=torch.bool)  # (B, T)
    for row, x, y in zip(is_target, prompts, completions):
        row[len(x) : len(x) + len(y)] = True
    predicts = is_target.roll(-1, dims=1)  # (B, T), since position t predicts token t + 1
    # The logits are the largest tensors of a step: the head sees only the positions that count.
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, args: (args[0][predicts][None],)):  # (1, N, H)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (N, V)
    nll = torch.nn.functional.cross_entropy(logits, ids[is_target], reduction="none")  # (N,)
    return torch.stack([-row.sum() for row in nll.split([len(y) for y in completions])])

def reference_point(policy_logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """z0, an estimate of KL(pi_theta || pi_ref): a scalar (), >= 0, in nats, no gradient (§4.1).

    Both arguments are (m,), the log-probs of the m *mismatched* pairs (x, y') of a step; m >= 2.

    A row's reward r counts only in comparison with z0: had the policy made every completion more
    likely alike, r and z0 would rise together and no value would be gained. Mismatched: y is in the
    data because it is good or bad for x, which would bias the estimate; y' is not. Clamped: a KL is
    never negative, its estimate from m pairs can be. Without gradient: z0 only marks where the loss
    saturates, and the policy must not lower its loss by moving the mark. Over all m rows at once: a
    micro-batch is a matter of memory and must not change the result.
    """
    return (policy_logps - reference_logps).mean().clamp(min=0).detach()

def kto_loss(policy_logps, reference_logps, z0, desirable, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """The KTO loss of each row, lambda_y - v(x, y): a tensor (B,), not yet averaged (Eq. 8).

    `policy_logps` and `reference_logps` are (B,), in nats, of the matched pairs (x, y); `z0` is the
    scalar of `reference_point`; `desirable` is (B,) bool, in any mix (RuntimeError if not bool).
    """
    r = policy_logps - reference_logps  # (B,)
    v_desirable = lambda_d * torch.sigmoid(beta * (r - z0))
    v_undesirable = lambda_u * torch.sigmoid(beta * (z0 - r))
    return torch.where(desirable, lambda_d - v_desirable, lambda_u - v_undesirable)

# ---- The data ------------------------------------------------------------------------------------
def parse_row(line: bytes) -> dict:
    """One line of JSONL -> {prompt: messages, completion: messages, label: bool, plain: bool}.

    A text becomes one message; plain: both were texts. Raises ValueError or RecursionError.
    """
    match json.loads(line.decode("utf-8-sig").strip()):
        case {"prompt": str() | [_, *_] as x, "completion": str() | [{"role": "assistant"}] as y,
              "label": 0 | 1 as label}:  # true and false equal 1 and 0
            plain = isinstance(x, str) and isinstance(y, str)
            x = [{"role": "user", "content": x}] if isinstance(x, str) else x
            y = [{"role": "assistant", "content": y}] if isinstance(y, str) else y
        case {"chosen": _} | {"rejected": _}:
            raise ValueError("a pair; write two rows, chosen with label true, rejected with false")
        case other:
            raise ValueError(f"found {reprlib.repr(other)}")
    for message in x + y:
        match message:
            case {"role": str(), "content": str(text)} if text.strip():
                text.encode()  # half a surrogate pair raises here, not in the tokenizer
            case _:
                raise ValueError(f"no role or no text in {reprlib.repr(message)}")
    return {"prompt": x, "completion": y, "label": bool(label), "plain": plain}

def read_rows(config: Config, held_out: bool | None = None):
    """Stream the rows of --data, with "where" (FILE:LINE) and "held_out" (each `holdout`-th is).

    With `held_out`, only the rows that are so, or are not. Raises InputError at an unusable row.
    """
    with open(config.data, "rb") as file:  # bytes: lines end at \n alone, as in an editor
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for count, (number, line) in enumerate(lines, 1):
            where = f"{config.data}:{number}"
            try:
                row = parse_row(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f'{where}: {error}; a row is one line of JSON, {{"prompt": text, '
                                 '"completion": text, "label": true or false}') from None
            row |= {"where": where, "held_out": config.holdout > 0 and count % config.holdout == 0}
            if held_out is None or held_out == row["held_out"]:
                yield row

def batches(config: Config):
    """Step 1: the batches of all epochs, streamed, each epoch in an order of its own."""
    stream = datasets.IterableDataset.from_generator(lambda: read_rows(config, held_out=False))
    stream = stream.shuffle(seed=config.seed, buffer_size=10_000)  # rows; mixes only that far
    for epoch in range(config.epochs):
        stream.set_epoch(epoch)  # which reseeds the shuffle
        rows = iter(stream)
        while len(batch := list(itertools.islice(rows, config.batch_size))) > 1:
            yield batch

def encode(row: dict, tokenizer, config: Config) -> dict:
    """A row of text -> {prompt: ids, completion: ids, label, cut: [prompt?, completion?]}.

    The prompt is what inference would feed. The completion is what the model should then write: no
    special tokens of its own but one end token, which is scored. Of a long prompt the end is kept,
    of a long completion the start, and cutting takes the end token too: it did not end there.
    Plain strings become a user and an assistant turn if the tokenizer has a chat template, unless
    --chat_template is false. Raises InputError if the template is missing or cannot take the row.
    """
    x, y = row["prompt"], row["completion"]
    if row["plain"] and not (config.chat_template and tokenizer.chat_template):
        x = tokenizer(x[0]["content"]).input_ids
        y = tokenizer(y[0]["content"], add_special_tokens=False).input_ids
        ended = y[-1:] == [tokenizer.eos_token_id]
    else:
        try:
            start = tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(x + y, tokenize=False)
        except Exception as error:  # a template may raise anything
            raise InputError(f"{row['where']}: no chat template for this: {error}") from error
        turn = whole[len(start) :].rstrip() if whole.startswith(start) else ""  # no last newline
        x, y = tokenizer([start, turn], add_special_tokens=False).input_ids
        ended = not tokenizer.decode(y[-1:], skip_special_tokens=True)  # special: it reads as ""
    if not (x and y):
        raise InputError(f"{row['where']}: no tokens, or the template changes an answered prompt")
    y = y if ended else [*y, tokenizer.eos_token_id]
    return {
        "prompt": array("i", x[-config.max_prompt_length :]),  # an int of 4 bytes, not of 36
        "completion": array("i", y[: config.max_completion_length]),
        "label": row["label"],
        "cut": [len(x) > config.max_prompt_length, len(y) > config.max_completion_length],
    }

# ---- The models ----------------------------------------------------------------------------------
def tiny_model(config: Config):
    """A toy for the first run: a small Llama, taught to imitate *all* completions, good and bad."""
    rows = list(itertools.islice(read_rows(config, held_out=False), 2000))
    texts = (turn["content"] for row in rows for turn in row["prompt"] + row["completion"])
    tokenizer = transformers.GPT2Tokenizer(eos_token="<|end|>").train_new_from_iterator(
        texts, 2048, show_progress=False, new_special_tokens=["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = (
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    torch.manual_seed(config.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=6, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id))
    optimizer = torch.optim.AdamW(model.to(DEVICE).parameters())
    rows = [encode(row, tokenizer, config) for row in rows]
    for step in tqdm(range(240), desc="teaching the tiny model", disable=None, leave=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 240)
        batch = [rows[i] for i in torch.randint(len(rows), (16,))]
        x, y = [row["prompt"] for row in batch], [row["completion"] for row in batch]
        (-completion_logps(model, x, y).sum() / sum(map(len, y))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tokenizer, model

def load_model(config: Config):
    """(tokenizer, model) of --model, weights in float32. Raises InputError if it cannot load."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {config.model} (offline? give a folder): {error}") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {config.model}: its tokenizer has no EOS token; give it one")
    return tokenizer, model.to(DEVICE)

# ---- The training step ---------------------------------------------------------------------------
def score(model, x, y, config: Config, loss=None) -> torch.Tensor:
    """completion_logps of m rows, micro_batch_size at a time: (m,), without gradient.

    With `loss`, a function of (logps, rows), its gradients meanwhile add up in the model. Rows of
    like length go together, so that little is padding, and the longest first: if they fit, all do.
    """
    logps = torch.empty(len(x), device=DEVICE)
    order = torch.tensor([len(a) + len(b) for a, b in zip(x, y)]).argsort(descending=True)
    for rows in order.split(config.micro_batch_size):
        half = torch.autocast(DEVICE.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
        with torch.set_grad_enabled(loss is not None), half:
            part = completion_logps(model, [x[i] for i in rows], [y[i] for i in rows])
        if loss:
            loss(part, rows).backward()
        logps[rows] = part.detach()
    return logps

def kto_step(policy, reference, batch: list[dict], config: Config, train: bool = True) -> dict:
    """Steps 2 to 5 on m encoded rows: the gradient is left in the policy if `train`. Returns:

    loss: mean of the rows; accuracy: share of rows where (r > z0) equals the label; kl, z0: mean of
    the mismatched pairs, raw and clamped; reward_*, margin: mean r of each class, their difference,
    None where a class has no rows. All but the first two are in nats.
    """
    x, y = [row["prompt"] for row in batch], [row["completion"] for row in batch]
    desirable = torch.tensor([row["label"] for row in batch], device=DEVICE)
    y_next = y[1:] + y[:1]  # 2
    policy_kl, reference_kl = (score(pi, x, y_next, config) for pi in (policy, reference))  # 3
    reference_logps = score(reference, x, y, config)
    z0 = reference_point(policy_kl, reference_kl)  # 4
    weights = (config.beta, config.lambda_d, config.lambda_u)

    def loss(logps, rows):  # 5, some rows' part of the mean over m: their gradients add up
        return kto_loss(logps, reference_logps[rows], z0, desirable[rows], *weights).sum() / len(x)

    policy_logps = score(policy, x, y, config, loss if train else None)  # 3, with its gradient
    r = policy_logps - reference_logps
    d, u = (r[rows].mean().item() if rows.any() else None for rows in (desirable, ~desirable))
    return {
        "loss": loss(policy_logps, slice(None)).item(),
        "accuracy": ((r > z0) == desirable).float().mean().item(),
        "z0": z0.item(),
        "kl": (policy_kl - reference_kl).mean().item(),
        "reward_desirable": d,
        "reward_undesirable": u,
        "margin": None if d is None or u is None else d - u,
    }

# ---- The run -------------------------------------------------------------------------------------
def check_data(config: Config) -> tuple[int, int]:
    """Read every row, before anything slow: (steps an epoch, steps in all). Raises InputError."""
    n = dict.fromkeys(itertools.product((True, False), repeat=2), 0)  # by held_out and label
    for row in tqdm(read_rows(config), "checking", unit=" rows", disable=None):
        n[row["held_out"], row["label"]] += 1
    held_d, held_u, n_d, n_u = n.values()
    if n_d + n_u < 2:
        raise InputError(f"{config.data}: {n_d + n_u} rows to train on; a step needs two")
    print(f"data     {config.data}: n_D = {n_d}, n_U = {n_u}; held out {held_d} and {held_u}")
    d, u = config.lambda_d * n_d, config.lambda_u * n_u
    if d and u:
        print(f"balance  lambda_D n_D / (lambda_U n_U) = {d / u:.3g}; Eq. 9 wants 1 to 1.5" +
              f": --lambda_d {u / n_d:.4g} to {1.5 * u / n_d:.4g}" * (not 0.995 < d / u < 1.505))
    else:
        print("WARNING  only one class counts: imitated if desirable, unlearned if undesirable")
    full, left = divmod(n_d + n_u, config.batch_size)  # a single row left over has no y' to meet
    per_epoch = full + (left > 1)
    steps = min(config.epochs * per_epoch, config.max_steps or math.inf)
    print(f"steps    {steps}, {per_epoch} an epoch" + ", one row left over in each" * (left == 1))
    return per_epoch, steps

def resume_state(config: Config) -> dict:
    """Where the run starts: step, log size, settings; on resume also all that `train` saved.

    Raises InputError if --output holds a model already, or the checkpoint is of another run.
    """
    checkpoint, model = Path(config.output, "checkpoint.pt"), Path(config.output, "config.json")
    digest = hashlib.file_digest(open(config.data, "rb"), "sha256").hexdigest()
    settings = {**vars(config), "sha256 of the data": digest}
    for name in ("data", "output", "micro_batch_size", "save_every", "resume"):
        del settings[name]  # may change: the result is the same, up to rounding
    if config.resume:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if changed := dict(state["settings"].items() - settings.items()):
            raise InputError(f"--resume: {checkpoint} is of a run with {changed}; use the same")
        return state
    toy = (config.model, config.output) == ("tiny", "kto-tiny")
    if not toy and (checkpoint.exists() or model.exists()):
        raise InputError(f"{config.output} is in use; name another or, if cut short, --resume true")
    checkpoint.unlink(missing_ok=True)  # that of an earlier toy
    return {"step": 0, "log_bytes": 0, "settings": settings}

def train(policy, reference, tokenizer, config: Config, per_epoch: int, steps: int, state: dict):
    """The loop: steps, an evaluation before each epoch and at the end, the log, checkpoints."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state.pop(name))
    log = open(Path(config.output, "metrics.jsonl"), "a", buffering=1)
    log.truncate(min(state["log_bytes"], log.tell()))  # a resumed run logs the rest anew
    held_out = [encode(row, tokenizer, config) for row in read_rows(config, held_out=True)]
    first, stop = state["step"], []
    stream = itertools.islice(batches(config), first, None)
    for number in (signal.SIGINT, signal.SIGTERM):  # heard now, obeyed after the step in hand
        signal.signal(number, lambda number, _: stop.append(number))
    bar = tqdm(itertools.count(first), unit="step", total=steps, initial=first, disable=None)
    for step in bar:
        if len(held_out) > 1 and not stop and (step % per_epoch == 0 or step == steps):
            logged = kto_step(policy, reference, held_out, config, train=False)
            print(json.dumps({"step": step} | {f"eval_{k}": logged[k] for k in logged}), file=log)
            figures = (f"{name} {value and round(value, 4)}" for name, value in logged.items())
            tqdm.write(f"held out, after {step} steps: {', '.join(figures)}")
        if stop or (config.save_every and step % config.save_every == 0):
            partial = Path(config.output, "checkpoint.partial")
            torch.save(state | {name: part.state_dict() for name, part in parts.items()}, partial)
            partial.replace(partial.with_suffix(".pt"))  # so that a checkpoint is whole or absent
        if stop:
            print(f"stopped after {step} of {steps} steps; to go on, add --resume true")
            raise SystemExit(128 + stop[0])
        if step == steps:
            break
        start, lr = time.perf_counter(), schedule.get_last_lr()[0]
        batch = [encode(row, tokenizer, config) for row in next(stream)]
        logged = kto_step(policy, reference, batch, config)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0).item()  # Table 1
        if not math.isfinite(logged["loss"] + norm):
            raise SystemExit(f"step {step}: loss {logged['loss']}, grad_norm {norm}; lower --lr")
        optimizer.step()  # 6
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix({name: logged[name] for name in ("loss", "z0", "margin")})
        logged |= {"grad_norm": norm, "lr": lr, "seconds": time.perf_counter() - start}
        print(json.dumps({"step": step, **logged}), file=log)
        state |= {"step": step + 1, "log_bytes": log.tell()}

def chart(steps: list[dict], width: int = 70) -> None:
    """Time goes down, r to the right: D and U, the mean r of the classes, and z, which is z0."""
    marks = {"z0": "z", "reward_undesirable": "U", "reward_desirable": "D"}
    values = [step[key] for step in steps for key in marks if step[key] is not None]
    low, high = min(values), max(values)
    print(f"\n  step  r from {low:.1f} to {high:.1f} nats: D desirable, U undesirable, z = z0")
    for step in steps[:: math.ceil(len(steps) / 16)]:
        line = [" "] * width
        for key in marks:
            if step[key] is not None:
                line[round((step[key] - low) / (high - low or 1) * (width - 1))] = marks[key]
        print(f"{step['step']:6} |{''.join(line)}|")

def main() -> None:
    config = Config(**vars(HfArgumentParser(Config, usage=argparse.SUPPRESS).parse_args()))
    per_epoch, steps = check_data(config)
    state = resume_state(config)
    tokenizer, reference = (tiny_model if config.model == "tiny" else load_model)(config)
    reference.eval().requires_grad_(False)  # eval: no dropout, nor in the copy
    policy = copy.deepcopy(reference).requires_grad_(True)
    example = encode(next(read_rows(config)), tokenizer, config)
    print(f"model    {config.model}, {policy.num_parameters():,} weights, {config.dtype}, {DEVICE}")
    print("prompt  ", tokenizer.decode(example["prompt"]))
    print("scored  ", tokenizer.decode(example["completion"]))
    rows = tqdm(read_rows(config), "encoding", unit=" rows", disable=None)  # none is refused later
    cut = sum(torch.tensor(encode(row, tokenizer, config)["cut"]) for row in rows)
    print(f"cut      {cut[0]} prompts and {cut[1]} completions, longer than their budget")
    tokenizer.save_pretrained(config.output)  # makes the folder, in which checkpoints stand too
    train(policy, reference, tokenizer, config, per_epoch, steps, state)
    policy.save_pretrained(config.output)
    for checkpoint in Path(config.output).glob("checkpoint.*"):
        checkpoint.unlink()
    for number in (signal.SIGINT, signal.SIGTERM):  # held back until the model is saved
        signal.signal(number, signal.SIG_DFL)
    log = map(json.loads, open(Path(config.output, "metrics.jsonl")))
    chart([entry for entry in log if "lr" in entry])
    for row in itertools.islice(read_rows(config, held_out=True), 3):
        print(f"\n{row['prompt'][-1]['content']}")
        ids = torch.tensor([encode(row, tokenizer, config)["prompt"]], device=DEVICE)
        for name, model in (("before", reference), ("after", policy)):
            torch.manual_seed(config.seed)
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id,
                max_new_tokens=64, do_sample=True, temperature=0.4)
            answer = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
            print(f"  {name:6} {answer.strip()}")
    print(f"\nThe model is in {config.output}, and beside it metrics.jsonl.")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the first step, Ctrl-C just ends it
    try:
        main()
    except (InputError, OSError) as error:
        argparse.ArgumentParser().exit(2, str(error).partition("\n")[0] + "\n")  # to stderr
