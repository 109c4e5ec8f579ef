# SPDX-License-Identifier: MIT-0
"""KTO in one file: align a language model with thumbs up and thumbs down.

The paper: "KTO: Model Alignment as Prospect Theoretic Optimization", Ethayarajh et al., ICML 2024,
arXiv 2402.01306; equations and sections are numbered as in its v5. The data are rows of a prompt x,
a completion y and a label: y is desirable or undesirable. One step of training:

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

Shapes: m rows a step, B a call, T tokens in the longest, N scored, D hidden size, V vocabulary.

  python kto.py                                                    offline, two CPU cores, a minute
  python kto.py --model NAME_OR_FOLDER --data FILE.jsonl --output FOLDER          your own feedback
"""

import argparse
import collections
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import signal
import sys
import time
from array import array
from pathlib import Path

import datasets
import jinja2
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLE = Path(__file__).with_name("data_sample.jsonl")

@dataclasses.dataclass
class Config:
    """The settings of a run, each a flag of the command line. Defaults are the paper's (§4.2)."""
    model: str = HfArg(default="tiny", help="hub name or folder; 'tiny' is built and taught here")
    data: str = HfArg(default=str(SAMPLE), help="JSONL, one {prompt, completion, label} a line")
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
    chat_template: bool = HfArg(default=True, help="plain strings become chat turns")
    dtype: str = HfArg(default="auto", metadata={"choices": ["auto", "float32", "bfloat16"]},
                       help="of the forward passes; auto: bfloat16 on CUDA; weights: float32")
    seed: int = HfArg(default=0, help="of the order of the rows and of the tiny model")
    save_every: int = HfArg(default=0, help="steps between checkpoints; 0: only if interrupted")
    resume: bool = HfArg(default=False, help="go on from the checkpoint in --output")

class InputError(ValueError):
    """What the user gave cannot be used. The message says what was found, where, what to do."""

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
    with head.register_forward_pre_hook(lambda _, args: (args[0][predicts][None],)):  # (1, N, D)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (N, V)
    token_logps = -F.cross_entropy(logits, ids[is_target], reduction="none")  # (N,)
    return torch.stack([row.sum() for row in token_logps.split([len(y) for y in completions])])

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

ROW = 'write {"prompt": text, "completion": text, "label": true or false}, one row a line'

def as_messages(value, role: str) -> list[dict]:
    """A text or chat messages -> chat messages, none of them blank. Raises InputError."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{value!r:.60} is no text; write one, or messages with role and content")
    for message in messages:
        match message:
            case {"role": str(), "content": str(content)} if content.strip():
                content.encode()  # half a surrogate pair raises here, not in the tokenizer
            case _:
                raise InputError(f"{message!r:.60} needs role and content; fill in or drop it")
    return messages

def parse_row(line: bytes) -> dict:
    """One line of JSONL -> {prompt, completion, label: bool}. Raises InputError, UnicodeError."""
    text = line.decode("utf-8-sig")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{text.strip()!r:.40} is not JSON ({error}); {ROW}") from None
    match row:
        case {"prompt": x, "completion": str() | [{"role": "assistant"}] as y, "label": 0 | 1}:
            as_messages(x, "user")
            as_messages(y, "assistant")
            return {"prompt": x, "completion": y, "label": bool(row["label"])}  # True == 1
        case {"prompt": _, "completion": y, "label": 0 | 1}:
            raise InputError(f"completion {y!r:.60}; write a text or one assistant message")
        case {"prompt": _, "completion": _, "label": label}:
            raise InputError(f"label {label!r:.60}; write true (desirable) or false")
        case {"chosen": _} | {"rejected": _}:
            raise InputError("a preference pair; make it two lines, {prompt, completion: chosen, "
                             "label: true} and {prompt, completion: rejected, label: false}")
        case dict():
            raise InputError(f"an object with the keys {list(row)}; {ROW}")
        case _:
            raise InputError(f"{row!r:.60} is not an object; {ROW}")

def read_rows(config: Config, held_out: bool | None = None):
    """Stream the rows of --data, each with "where", FILE:LINE, and "held_out", true for each k-th.

    With `held_out`, only the rows that are so, or are not. Raises InputError at an unusable row.
    """
    if not Path(config.data).is_file():
        raise InputError(f"{config.data}: no such file; --data takes a JSONL file")
    with open(config.data, "rb") as file:  # bytes: lines end at \n alone, as in an editor
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for count, (number, line) in enumerate(lines, 1):
            try:
                row = {**parse_row(line), "where": f"{config.data}:{number}"}
            except UnicodeError as error:
                raise InputError(f"{config.data}:{number}: {error}; save it as UTF-8") from None
            except InputError as error:
                raise InputError(f"{config.data}:{number}: {error}") from None
            row["held_out"] = config.holdout > 0 and count % config.holdout == 0
            if held_out in (None, row["held_out"]):
                yield row

def batches(config: Config):
    """Step 1: the batches of all epochs, streamed, each epoch in an order of its own."""
    source = {"config": config, "held_out": False}
    stream = datasets.IterableDataset.from_generator(read_rows, gen_kwargs=source)
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
    plain = isinstance(x, str) and isinstance(y, str)
    if plain and not (config.chat_template and tokenizer.chat_template):
        x, y = tokenizer(x).input_ids, tokenizer(y, add_special_tokens=False).input_ids
        ended = y[-1:] == [tokenizer.eos_token_id]
    else:
        x, y = as_messages(x, "user"), as_messages(y, "assistant")
        try:
            start = tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(x + y, tokenize=False)
        except (ValueError, jinja2.TemplateError) as error:
            raise InputError(f"{row['where']}: no chat template for this: {error}") from None
        if not whole.startswith(start):
            raise InputError(f"{row['where']}: the chat template changes an answered prompt")
        turn = whole[len(start) :].rstrip()  # the model stops at its end token, before a newline
        x, y = tokenizer([start, turn], add_special_tokens=False).input_ids
        ended = not tokenizer.decode(y[-1:], skip_special_tokens=True)  # special: it reads as ''
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
    texts = (str(row[key]) for row in rows for key in ("prompt", "completion"))
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=special, show_progress=False)
    bpe = tokenizers.Tokenizer.from_str(bpe.to_str())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    torch.manual_seed(config.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=6, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0))
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
        reason = str(error).partition("\n")[0]
        raise InputError(f"--model {config.model}: {reason} (offline? give a folder)") from None
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
    order = iter(sorted(range(len(x)), key=lambda i: -len(x[i]) - len(y[i])))
    while rows := list(itertools.islice(order, config.micro_batch_size)):
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
    None where a class has no rows; cut_*: texts that were too long. kl to margin are in nats.
    """
    x, y = [row["prompt"] for row in batch], [row["completion"] for row in batch]
    desirable = torch.tensor([row["label"] for row in batch], device=DEVICE)
    y_next = y[1:] + y[:1]  # 2
    policy_kl = score(policy, x, y_next, config)  # 3
    reference_kl = score(reference, x, y_next, config)
    reference_logps = score(reference, x, y, config)
    z0 = reference_point(policy_kl, reference_kl)  # 4, of all m rows; then 3 once more, in 5
    weights = (config.beta, config.lambda_d, config.lambda_u)

    def loss(logps, rows):  # 5, some rows' part of the mean over m: their gradients add up
        losses = kto_loss(logps, reference_logps[rows], z0, desirable[rows], *weights)
        return losses.sum() / len(batch)

    policy_logps = score(policy, x, y, config, loss if train else None)
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
        "cut_prompts": sum(row["cut"][0] for row in batch),
        "cut_completions": sum(row["cut"][1] for row in batch),
    }

# ---- The run -------------------------------------------------------------------------------------

def read_config() -> Config:
    """The command line. A flag or a value that cannot be ends the program with status 2."""
    parser = HfArgumentParser(Config, usage=argparse.SUPPRESS)
    config = Config(**vars(parser.parse_args()))
    if config.lr is None:
        config.lr = 5e-4 if config.model == "tiny" else 5e-6
    if config.dtype == "auto":
        config.dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
    config.output = config.output or f"kto-{Path(config.model).name}"
    least = {"batch_size": 2, "micro_batch_size": 1, "epochs": 1}
    least |= {"max_prompt_length": 1, "max_completion_length": 1}
    for name, value in vars(config).items():
        if not isinstance(value, str) and not least.get(name, 0) <= value < math.inf:  # nor nan
            parser.error(f"--{name} {value}: must be at least {least.get(name, 0)}, and finite")
    return config

def check_data(config: Config) -> tuple[int, str, list[dict]]:
    """Read every row once, in constant memory, before anything slow.

    Returns the number of rows to train on, a fingerprint, and a row of each sequence of roles.
    """
    count, sha256, kinds = collections.Counter(), hashlib.sha256(), {}
    start = time.perf_counter()
    for row in read_rows(config):
        x, y = row["prompt"], row["completion"]
        count["held_out" if row["held_out"] else "n_D" if row["label"] else "n_U"] += 1
        sha256.update(repr((x, y, row["label"])).encode())
        kinds.setdefault((type(y), *(turn["role"] for turn in as_messages(x, "text"))), row)
    n_d, n_u, rate = count["n_D"], count["n_U"], count.total() / (time.perf_counter() - start)
    if n_d + n_u < 2:
        raise InputError(f"{config.data}: {n_d + n_u} rows to train on; a step needs two")
    print(f"data     {config.data}, {rate:,.0f} rows checked per second\n"
          f"         n_D = {n_d} desirable, n_U = {n_u} undesirable, {count['held_out']} held out")
    if (n_d + n_u) % config.batch_size == 1:
        print("         the last row of each epoch is dropped: alone, it has no y' to meet")
    d, u = config.lambda_d * n_d, config.lambda_u * n_u
    if not (d and u):
        print("WARNING  only one class counts: desirable rows alone are imitated, undesirable rows "
              "alone unlearn every answer")
    else:
        print(f"balance  lambda_D n_D / (lambda_U n_U) = {d / u:.3g}; Eq. 9 wants 1 to 1.5", end="")
        name, least = ("lambda_d", u / d) if d < u else ("lambda_u", d / u / 1.5)
        least *= getattr(config, name)
        advice = f": set --{name} to {least:.4g} ... {1.5 * least:.4g}"
        print("" if 1 <= round(d / u, 2) <= 1.5 else advice)
    return n_d + n_u, sha256.hexdigest(), list(kinds.values())

def resume_state(config: Config, sha256: str) -> dict:
    """Step, log size, settings; on resume all that `train` saved. InputError if not this run's."""
    may_change = ("data", "output", "micro_batch_size", "save_every", "resume")
    settings = {key: value for key, value in vars(config).items() if key not in may_change}
    settings["sha256 of the data"] = sha256
    checkpoint, model = Path(config.output, "checkpoint.pt"), Path(config.output, "config.json")
    if not config.resume:
        toy = (config.model, config.output) == ("tiny", "kto-tiny")
        if not toy and (checkpoint.exists() or model.exists()):
            raise InputError(f"{config.output} holds a model; name another --output, or --resume")
        checkpoint.unlink(missing_ok=True)  # that of an earlier toy
        return {"step": 0, "log_bytes": 0, "settings": settings}
    if not checkpoint.exists():
        raise InputError(f"--resume: there is no {checkpoint}; start without --resume")
    state = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
    changed = [f"{key} was {old}" for key, old in state["settings"].items() if settings[key] != old]
    if changed:
        raise InputError(f"--resume: {checkpoint} is of another run: {', '.join(changed)}")
    return state

def train(policy, reference, tokenizer, config: Config, total: int, state: dict) -> None:
    """The loop: steps, an evaluation before each epoch and at the end, the log, checkpoints."""
    per_epoch = total // config.batch_size + (total % config.batch_size > 1)
    steps = min(config.epochs * per_epoch, config.max_steps or math.inf)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    for name in parts.keys() & state.keys():
        parts[name].load_state_dict(state.pop(name))
    log = open(Path(config.output, "metrics.jsonl"), "a", buffering=1)
    log.truncate(state["log_bytes"])  # what was logged after the checkpoint is logged again
    held_out = [encode(row, tokenizer, config) for row in read_rows(config, held_out=True)]
    first, stop, stream = state["step"], [], itertools.islice(batches(config), state["step"], None)
    for number in (signal.SIGINT, signal.SIGTERM):  # heard now, obeyed after the step in hand
        signal.signal(number, lambda number, _: stop.append(number))
    bar = tqdm(total=steps, initial=first, unit="step", disable=None)
    for step in range(first, steps + 1):
        if len(held_out) > 1 and not stop and (step % per_epoch == 0 or step == steps):
            logged = kto_step(policy, reference, held_out, config, train=False)
            logged = {f"eval_{name}": value for name, value in logged.items()}
            print(json.dumps({"step": step, **logged}), file=log)
        if stop or (config.save_every and step > first and step % config.save_every == 0):
            partial = Path(config.output, "checkpoint.partial")
            torch.save(state | {name: part.state_dict() for name, part in parts.items()}, partial)
            partial.replace(partial.with_suffix(".pt"))  # so that a checkpoint is whole or absent
        if stop:
            print(f"stopped after {step} of {steps} steps; to go on, add --resume true")
            sys.exit(128 + stop[0])
        if step == steps:
            break
        start, lr = time.perf_counter(), schedule.get_last_lr()[0]
        batch = [encode(row, tokenizer, config) for row in next(stream)]
        logged = kto_step(policy, reference, batch, config)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0).item()  # Table 1
        if not math.isfinite(logged["loss"] + norm):
            sys.exit(f"step {step}: loss {logged['loss']}, gradient norm {norm}; lower --lr")
        optimizer.step()  # 6
        optimizer.zero_grad()
        schedule.step()
        logged |= {"grad_norm": norm, "lr": lr, "seconds": time.perf_counter() - start}
        print(json.dumps({"step": step, **logged}), file=log)
        state |= {"step": step + 1, "log_bytes": log.tell()}
        bar.set_postfix({name: logged[name] for name in ("loss", "z0", "margin")})
        bar.update()

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
    sys.stdout.reconfigure(errors="replace")  # a model may say what a terminal cannot show
    transformers.utils.logging.disable_progress_bar()
    config = read_config()
    total, sha256, kinds = check_data(config)
    state = resume_state(config, sha256)
    tokenizer, reference = (tiny_model if config.model == "tiny" else load_model)(config)
    reference.eval().requires_grad_(False)  # eval: no dropout, nor in the copy
    policy = copy.deepcopy(reference).requires_grad_(True)
    example, *_ = [encode(row, tokenizer, config) for row in kinds]  # no template refuses one later
    x, y = tokenizer.decode(example["prompt"]), tokenizer.decode(example["completion"])
    size = f"{policy.num_parameters() / 1e6:.1f}M parameters"
    print(f"model    {config.model}, {size}, {config.dtype} on {DEVICE}")
    print(f"example  {x}[[{y}]]  (what is in [[ ]] is scored)")
    Path(config.output).mkdir(parents=True, exist_ok=True)
    train(policy, reference, tokenizer, config, total, state)
    policy.save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)
    for number in (signal.SIGINT, signal.SIGTERM):  # held back until the model is saved
        signal.signal(number, signal.SIG_DFL)
    for checkpoint in Path(config.output).glob("checkpoint.*"):
        checkpoint.unlink()
    log = [json.loads(line) for line in open(Path(config.output, "metrics.jsonl"))]
    chart([entry for entry in log if "lr" in entry])
    cut = [sum(entry.get(f"cut_{what}", 0) for entry in log) for what in ("prompts", "completions")]
    print("cut      {} prompts and {} completions, for being too long\n".format(*cut))
    evals = [entry for entry in log if "eval_loss" in entry]
    for name in evals[0] if evals else ():
        print(f"{name:24} {evals[0][name]!s:8.8} -> {evals[-1][name]!s:8.8}")
    for row in itertools.islice(read_rows(config, held_out=True), 3):
        print(f"\n{row['prompt']}")
        ids = torch.tensor([encode(row, tokenizer, config)["prompt"]], device=DEVICE)
        for name, model in (("before", reference), ("after", policy)):
            torch.manual_seed(config.seed)
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.eos_token_id,
                max_new_tokens=64, do_sample=True, temperature=0.5)
            answer = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
            print(f"  {name:6} {answer.strip()}")
    print(f"\nThe model is in {config.output}, and beside it metrics.jsonl.")

if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
