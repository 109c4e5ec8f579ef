# SPDX-License-Identifier: MIT-0
"""KTO in one file: align a language model with thumbs up and thumbs down.

The paper: "KTO: Model Alignment as Prospect Theoretic Optimization", Ethayarajh et al., ICML 2024,
arXiv 2402.01306; equations and sections are numbered as in its v5. The data are rows of a prompt x,
a completion y and a label: y is desirable or undesirable. One training step:

  1. Take m rows (x, y, label), in any mix of the two classes.
  2. Pair each x with y', the completion of the next row; the last row takes that of the first.
  3. Score: sum the log-probabilities of a completion's tokens, under the policy and the reference.
  4. Reference point: z0 = max(0, mean over the m pairs (x, y') of log pi_theta - log pi_ref)  §4.1
  5. Loss: lambda_y - v of each row; r = log pi_theta(y|x) - log pi_ref(y|x), and the value v  Eq. 8
         v = lambda_D * sigmoid(beta * (r - z0))      if y is desirable
         v = lambda_U * sigmoid(beta * (z0 - r))      if y is undesirable
  6. Update: step down the gradient of the mean loss, in which z0 is a constant.              Eq. 10

  in the paper          here                what it is
  pi_theta, pi_ref      policy, reference   the model in training, its frozen starting point
  log pi(y|x)           logps               log-probabilities of completions, in nats
  r_theta(x, y), z_0    r, z0               implicit reward of a row, reference point of a batch
  v(x, y), beta         v, beta             value of a row, and how soon it saturates
  lambda_D, lambda_U    lambda_d, lambda_u  weight of desirable and of undesirable rows
  shapes: m rows a step, B rows a call, T tokens a row, N tokens scored, H hidden size, V vocabulary

  python kto.py                                                    offline, two CPU cores, a minute
  python kto.py --model NAME_OR_FOLDER --data FILE.jsonl --output FOLDER          your own feedback
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
import signal
import sys
import time
from array import array
from pathlib import Path
from typing import Literal

import datasets
import torch
import transformers
from tqdm import tqdm

# ==== Part one: KTO, complete, down to the training loop ==========================================
def kto_loss(policy_logps, reference_logps, z0, desirable, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """The KTO loss of each row, lambda_y - v(x, y): a tensor (B,), not yet averaged (Eq. 8).

    `policy_logps`, `reference_logps`: (B,), log pi(y|x) of each row, in nats. `z0`: the scalar of
    `reference_point`. `desirable`: bool (B,), in any mix. Raises RuntimeError if it is of ints.
    """
    r = policy_logps - reference_logps  # (B,)
    v_desirable = lambda_d * torch.sigmoid(beta * (r - z0))  # (B,)
    v_undesirable = lambda_u * torch.sigmoid(beta * (z0 - r))  # (B,)
    return torch.where(desirable, lambda_d - v_desirable, lambda_u - v_undesirable)

def reference_point(policy_logps, reference_logps):
    """z0, an estimate of KL(pi_theta || pi_ref): a scalar (), >= 0, in nats, no gradient (§4.1).

    Both arguments are (m,), in nats: log pi(y'|x) of the m *mismatched* pairs of a step, m >= 2.
    What z0 is for: a reward r is good or bad only in comparison. If the policy made every
    completion more likely, good or bad, r and z0 would rise together and no value would be gained.
    - Mismatched pairs. z0 stands for any answer, but a row's own y is in the data because it is
      good or bad for x. So rows exchange their completions: of (x1, y1) and (x2, y2), z0 takes
      (x1, y2) and (x2, y1). That is biased; the KL itself needs samples of the policy: slow.
    - The mean over all m rows of a step. How many rows fit in memory at once must not matter.
    - The clamp. A KL divergence is never negative, but its estimate from m pairs can be.
    - No gradient. z0 is what r is measured from; the policy must not gain by moving the mark.
      (In this file the pairs have no gradient anyway; `detach` is for those who copy.)
    """
    return (policy_logps - reference_logps).mean().clamp(min=0).detach()

def completion_logps(model, prompts, completions):
    """log pi(y|x) of each row: (B,), float32, in nats, summed (not averaged) over y's tokens.

    `model` is a causal LM of transformers; `prompts` and `completions` are B lists of token ids,
    not padded. What is scored is decided by position, never by token id: an end token counts, even
    if padding has its id. Raises ValueError if a prompt is empty or the two lists differ in length.
    """
    if not all(prompts):
        raise ValueError("a prompt without tokens: the first completion token needs one before it")

    # A row is x, y and padding. A causal model never looks to the right: no attention mask.
    rows = [torch.tensor([*x, *y]) for x, y in zip(prompts, completions, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # (B, T)

    # The output at position t predicts the token at t + 1. For x = (a, b) and y = (c, d):
    #     outputs at  a   b   c
    #     targets     b   c   d        the same row, one token further on
    #     is_scored   0   1   1        1 where the target belongs to y
    targets = ids[:, 1:]  # (B, T - 1)
    is_scored = torch.zeros_like(targets, dtype=torch.bool)  # (B, T - 1)
    for marks, x, y in zip(is_scored, prompts, completions):
        marks[len(x) - 1 :][: len(y)] = True  # from x's last token on, len(y) of them

    # Logits are the largest tensor: so the last layer, the head, is given only the states that
    # predict y. The hook ends with the block. Costlier: `model(ids).logits[:, :-1][is_scored]`.
    def keep_scored(head, inputs):
        return inputs[0][:, :-1][is_scored]  # (B, T, H) -> (N, H)

    with model.get_output_embeddings().register_forward_pre_hook(keep_scored):
        logits = model(input_ids=ids, use_cache=False).logits.float()  # (N, V)

    # Put each token's log-probability back in its place, 0 elsewhere, and sum over the row.
    nll = torch.nn.functional.cross_entropy(logits, targets[is_scored], reduction="none")  # (N,)
    token_logps = torch.zeros_like(targets, dtype=torch.float)  # (B, T - 1)
    token_logps[is_scored] = -nll
    return token_logps.sum(dim=1)  # (B,)

def micro_batches(prompts, completions, size):
    """Yield (index, prompts, completions) of at most `size` rows; index: their places, a tensor."""
    # Rows of like length go together, for little padding, the longest first: if they fit, all do.
    lengths = [len(x) + len(y) for x, y in zip(prompts, completions, strict=True)]
    longest_first = torch.tensor(lengths).argsort(descending=True)
    for index in longest_first.split(size):
        yield index, [prompts[i] for i in index], [completions[i] for i in index]

@torch.no_grad()
def score(model, prompts, completions, micro_batch_size):
    """completion_logps of m rows, micro_batch_size at a time: (m,), in nats, without gradient."""
    logps = torch.zeros(len(prompts), device=model.device)  # (m,)
    for index, x, y in micro_batches(prompts, completions, micro_batch_size):
        logps[index] = completion_logps(model, x, y)
    return logps

def kto_step(policy, reference, batch, micro_batch_size=8, **weights):
    """Steps 2 to 5: adds the gradient of the mean loss to the policy's .grad; returns the figures.

    `batch` is {"prompt": m lists of token ids, "completion": m lists, "label": m bools}, m >= 2, in
    random order: the next row should not have the same x. `weights`: beta, lambda_d, lambda_u. Put
    both models in eval mode: dropout is noise in r. Under `torch.no_grad()` it only evaluates.
    """
    prompts, completions = batch["prompt"], batch["completion"]
    desirable = torch.tensor(batch["label"], device=policy.device)  # (m,)

    # 2. Pair: each prompt with the completion of the next row.
    next_completions = completions[1:] + completions[:1]

    # 3. Score: three of the four sets of log-probabilities need no gradient.
    policy_next_logps = score(policy, prompts, next_completions, micro_batch_size)  # (m,)
    reference_next_logps = score(reference, prompts, next_completions, micro_batch_size)  # (m,)
    reference_logps = score(reference, prompts, completions, micro_batch_size)  # (m,)

    # 4. Reference point: from the m mismatched pairs.
    z0 = reference_point(policy_next_logps, reference_next_logps)  # ()

    # 3 and 5. Score with gradient, and loss. Each micro-batch adds its share of the mean loss.
    policy_logps = torch.zeros_like(reference_logps)  # (m,)
    mean_loss = 0.0
    for index, x, y in micro_batches(prompts, completions, micro_batch_size):
        logps = completion_logps(policy, x, y)  # (B,)
        losses = kto_loss(logps, reference_logps[index], z0, desirable[index], **weights)  # (B,)
        share = losses.sum() / len(prompts)  # ()
        if torch.is_grad_enabled():
            share.backward()
        mean_loss += share.item()
        policy_logps[index] = logps.detach()

    # The figures. A row is accurate if r is on its side of z0. A class without rows: None.
    r = policy_logps - reference_logps  # (m,)
    kl = (policy_next_logps - reference_next_logps).mean()  # (), z0 before the clamp
    d = r[desirable].mean().item() if desirable.any() else None
    u = r[~desirable].mean().item() if not desirable.all() else None
    margin = None if d is None or u is None else d - u
    return {"loss": mean_loss, "z0": z0.item(), "kl": kl.item(),
            "accuracy": ((r > z0) == desirable).float().mean().item(),
            "reward_desirable": d, "reward_undesirable": u, "margin": margin}

def train(policy, reference, batches, optimizer, schedule, first_step=0, **settings):
    """The training loop: yields the figures of each step, after which a caller may save, or stop.

    `batches`: iterable of what `kto_step` takes; `settings`: its keyword arguments. `first_step`
    only numbers. Raises FloatingPointError before an update with an infinite or NaN gradient.
    """
    for step, batch in enumerate(batches, start=first_step):  # 1. Take m rows.
        start = time.perf_counter()
        logged = kto_step(policy, reference, batch, **settings)  # 2 to 5.

        # 6. Update, with the gradient clipped to a norm of 10 (Table 1).
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=10.0).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient's norm is {norm}; lower the lr")
        logged |= {"grad_norm": norm, "lr": schedule.get_last_lr()[0]}
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield {"step": step, **logged, "seconds": time.perf_counter() - start}

# ==== Part two: what a run needs besides. You may stop here: the method is complete. ==============
class InputError(ValueError):
    """What the user gave cannot be used. The message says what was found, where, what to do."""

@contextlib.contextmanager
def blame(what, advice=""):
    """Turns whatever is raised within, by a library too, into an InputError about `what`."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {error}{advice}") from error

@dataclasses.dataclass
class Config:
    """The settings of a run, each a flag. Defaults are the paper's where it names one (§4.2)."""
    model: str = "tiny"  # hub name or folder; "tiny" is built and taught here
    data: str = str(Path(__file__).with_name("data_sample.jsonl"))  # JSONL, the sample by default
    output: str | None = None  # folder for the result; kto-MODEL if not given
    epochs: int = 3  # passes over the data
    batch_size: int = 32  # m, the rows of one step (useful: 8 to 128)
    micro_batch_size: int = 8  # rows in memory at once; no result changes but for rounding
    lr: float | None = None  # peak learning rate; if not given 5e-6, for "tiny" 5e-4
    beta: float = 0.1  # larger saturates sooner: nearer the reference (Eq. 8)
    lambda_d: float = 1.0  # lambda_D, weight of desirable rows (Eq. 9)
    lambda_u: float = 1.0  # lambda_U, weight of undesirable rows (Eq. 9)
    max_prompt_length: int = 512  # tokens kept, from the end of the prompt
    max_completion_length: int = 512  # tokens kept, from the start of the completion
    holdout: int = 11  # every n-th row is for evaluation (odd: finds both in D, U, D, U); 0: none
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda if there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the forward passes
    seed: int = 0  # of the order of the rows and of the tiny model
    save_every: int = 0  # steps between checkpoints; 0: only if interrupted
    resume: bool = False  # go on from the checkpoint in --output

def read_flags():
    """The Config of the command line, completed. --help shows the class above as it stands."""
    parser = transformers.HfArgumentParser(Config, description=inspect.getsource(Config),
                                           formatter_class=argparse.RawDescriptionHelpFormatter)
    config = Config(**vars(parser.parse_args()))
    least = {"batch_size": 2, "micro_batch_size": 1, "epochs": 1, "beta": 1e-3, "lr": 1e-9,
             "max_prompt_length": 1, "max_completion_length": 1}
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not least.get(name, 0) <= value < math.inf:
            raise InputError(f"--{name} {value}: must be finite and {least.get(name, 0)} or more")
    config.output = config.output or f"kto-{Path(config.model).name}"
    config.lr = config.lr or (5e-4 if config.model == "tiny" else 5e-6)
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto":  # older cards emulate bfloat16, more slowly than they use float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        config.dtype = "bfloat16" if native and "cuda" in config.device else "float32"
    return config

# ---- The data: line of a file -> row of text -> row of token ids -> batch ------------------------
A_ROW = """. A row is one line, {"prompt": text or messages, "completion": text or [message], \
"label": true or false}; of a JSON array make each element a line, of a preference pair two"""

def parse_row(line):
    """One line of JSONL, as bytes -> {"prompt", "completion", "label"}, or ValueError."""
    text = line.decode("utf-8-sig").strip()
    if not text.startswith("{"):
        raise ValueError(f"not a JSON object: {text!r:.80}")
    row = json.loads(text)
    for key in ("prompt", "completion", "label"):
        if key not in row:
            raise ValueError(f"no {key} among its keys {list(row)!r:.200}")
    if row["label"] not in (0, 1):  # false and true are equal to 0 and 1
        raise ValueError(f"label is {row['label']!r:.80}; write true or false, without quotes")
    return row

def as_messages(value, role):
    """A text as a chat of one message, a chat as it is. Raises ValueError at anything else."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"neither a text nor a list of messages: {value!r:.80}")
    for message in value:
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"the {key} of a message must be a text: {message!r:.80}")
        message["content"].encode()  # raises at half a surrogate pair, which no tokenizer takes
    return value

def encode(row, tokenizer):
    """(prompt, completion) of a row, as token ids: what the model is given, and what it then wrote,
    with an end token. With a chat template, texts are messages. Raises ValueError."""
    prompt, completion = row["prompt"], row["completion"]
    messages, answer = as_messages(prompt, "user"), as_messages(completion, "assistant")
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise ValueError("completion must be a text or a list of one message of the assistant")

    is_chat = tokenizer.chat_template or isinstance(prompt, list) or isinstance(completion, list)
    if is_chat:
        prompt, completion = render(messages, answer, tokenizer)
    x, both = tokenizer([prompt, prompt + completion], add_special_tokens=not is_chat).input_ids
    y = both[len(x) :]  # cut from both: alone, some tokenizers would put a space before it
    if both[: len(x)] != x:  # unless a token lies across the border
        y = tokenizer(completion, add_special_tokens=False).input_ids
    if not x or not y:
        raise ValueError("the prompt or the completion becomes no token at all")

    # Most templates close an answer with a special token, which decodes to nothing here.
    is_closed = is_chat and tokenizer.decode(y[-1], skip_special_tokens=True) == ""
    if not is_closed and y[-1] != tokenizer.eos_token_id:
        y.append(tokenizer.eos_token_id)
    return x, y

def render(messages, answer, tokenizer):
    """(what the model is given, what it then wrote): two texts, by the chat template. The first is
    where two renderings agree, the chat that asks for an answer and the chat with the answer; the
    second is the rest of the latter. They may differ only after the last message: there reasoning
    models open a thought when asked, which an answered chat closes or leaves out."""
    with blame("the chat template cannot render it"):
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        unasked, answered, other = tokenizer.apply_chat_template(
            [messages, messages + answer, messages + as_messages("x", "assistant")], tokenize=False)

    # If asked ends in "<think>", an answer "<b>" shares its "<"; the other answer, "x", does not.
    # Asked and unasked agree up to the end of the last message: given must reach as far.
    given = os.path.commonprefix([asked, answered, other])
    if len(given) < len(os.path.commonprefix([asked, unasked])):
        raise ValueError(f"once answered, the chat template changes {asked[len(given):]!r:.80}")
    return given, answered[len(given) :].rstrip()  # no newline after the end token

def read_rows(config, tokenizer):
    """Stream the rows of --data: {"prompt": ids, "completion": ids, "label", "is_held_out"}."""
    count = 0
    with open(config.data, "rb") as file:  # as bytes, a line ends at \n alone, as in an editor
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            with blame(f"{config.data}:{number}", A_ROW):
                row = parse_row(line)
                x, y = encode(row, tokenizer)
            x, y = x[-config.max_prompt_length :], y[: config.max_completion_length]
            count += 1
            is_held_out = config.holdout > 0 and count % config.holdout == 0
            yield {"prompt": array("i", x), "completion": array("i", y),  # 4 bytes an id
                   "label": bool(row["label"]), "is_held_out": is_held_out}

def training_batches(config, tokenizer):
    """Stream the full batches of all epochs, each epoch in an order of its own."""
    rows = datasets.IterableDataset.from_generator(
        read_rows, gen_kwargs={"config": config, "tokenizer": tokenizer})
    rows = rows.filter(lambda row: not row["is_held_out"])
    rows = rows.shuffle(seed=config.seed, buffer_size=10_000)  # mixes rows only that far
    batches = rows.batch(config.batch_size, drop_last_batch=True)
    for epoch in range(config.epochs):
        batches.set_epoch(epoch)
        yield from batches

def survey(config, tokenizer):
    """Read every row once and report, so that a bad one is refused before anything slow. Returns
    the held-out rows as one batch, the steps of an epoch, the longest x and y."""
    n_d, n_u = 0, 0  # desirable and undesirable rows to train on
    held_out = {"prompt": [], "completion": [], "label": []}
    longest = {"prompt": [], "completion": []}
    for row in tqdm(read_rows(config, tokenizer), "reading", disable=None):
        for name in longest:
            longest[name] = max(longest[name], row[name], key=len)
        if row["is_held_out"]:
            for name in held_out:
                held_out[name].append(row[name])
        elif row["label"]:
            n_d += 1
        else:
            n_u += 1

    per_epoch, left_over = divmod(n_d + n_u, config.batch_size)
    if per_epoch == 0:
        raise InputError(f"{left_over} rows to train on fill no batch: see --batch_size, --holdout")
    print(f"data     n_D = {n_d}, n_U = {n_u}; held out {len(held_out['label'])} rows,",
          f"{sum(held_out['label'])} of them desirable")
    print(f"steps    {per_epoch} an epoch; {left_over} rows are left over in each")
    print(f"longest  {len(longest['prompt'])} and {len(longest['completion'])} tokens, x and y")
    print("last row", tokenizer.decode(row["prompt"]), "->", tokenizer.decode(row["completion"]))

    weight_d, weight_u = config.lambda_d * n_d, config.lambda_u * n_u
    if weight_d * weight_u == 0:
        print("WARNING  only one class counts: imitated if desirable, unlearned if undesirable")
    else:
        print(f"balance  lambda_D n_D / (lambda_U n_U) = {weight_d / weight_u:.3g}; for 1 to 1.5",
              f"as in Eq. 9 take --lambda_d {weight_u / n_d:.4g} to {1.5 * weight_u / n_d:.4g}")
    return held_out, per_epoch, longest

# ---- The models ----------------------------------------------------------------------------------
def tiny_model(config, tokenizer):
    """A toy: a small Llama, taught the undesirable rows and every fourth row. So it finds most
    desirable completions unlikely, and z0 rises as it learns to write them."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)  # more would only wait for each other at this size
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
        hidden_size=128, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4))
    model.to(config.device)
    rows = [row for row in read_rows(config, tokenizer) if not row["is_held_out"]]
    taught = [row for i, row in enumerate(rows) if i % 4 == 0 or not row["label"]]
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 2.5e-3 * (1 - step / 500)
        batch = [taught[i] for i in torch.randint(len(taught), (8,))]
        x, y = [row["prompt"] for row in batch], [row["completion"] for row in batch]
        (-completion_logps(model, x, y).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model

def load_tokenizer(config):
    """The tokenizer of --model, which must have an end token; InputError if not."""
    if config.model == "tiny":  # a small one, trained on the lines of the data as they stand
        lines = Path(config.data).read_text("utf-8", "replace").splitlines()
        empty = transformers.GPT2Tokenizer(eos_token="<|end|>")
        return empty.train_new_from_iterator(lines, vocab_size=2048, show_progress=False)
    with blame(f"--model {config.model} (offline? give a folder)"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        if tokenizer.eos_token_id is None:
            raise InputError("its tokenizer has no EOS token; give it one")
        return tokenizer

def load_model(config, tokenizer, x, y):
    """The causal model --model, in float32. InputError if it cannot take x and y, the longest."""
    with blame(f"--model {config.model} on --device {config.device}"):
        if config.model == "tiny":
            return tiny_model(config, tokenizer)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise InputError(f"it lacks the weights {sorted(info['missing_keys'])}")
        if max(*x, *y, tokenizer.eos_token_id) >= model.get_input_embeddings().num_embeddings:
            raise InputError("it has fewer embeddings than its tokenizer has ids")
        limit = getattr(model.config, "max_position_embeddings", math.inf)
        length = len(x) + max(len(y), 64)  # y of another row, or an answer shown at the end
        if length > limit:
            raise InputError(f"takes {limit} tokens, not {length}: lower --max_prompt_length")

        # completion_logps has no mask: to a causal model padding on the right makes no difference.
        model.to(config.device)
        alone = score(model, [x], [y[:1]], 2)
        padded = score(model, [x, x], [y[:1], y], 2)[:1]
        if not torch.allclose(alone, padded, atol=1e-3):
            raise InputError("it is not causal: its output depends on tokens to the right")
        return model

# ---- The run -------------------------------------------------------------------------------------
def checkpoint_path(config):
    """Named after the settings (the model by its name) and the data: with others, another name."""
    decisive = dict(vars(config))
    for name in ("data", "output", "device", "micro_batch_size", "save_every", "resume"):
        del decisive[name]  # may change, up to rounding; dtype may not: auto varies, so give it
    with open(config.data, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(decisive).encode())
    return Path(config.output, f"checkpoint-{digest.hexdigest()[:8]}.pt")

def save_checkpoint(path, log, parts):
    """Write the log and the states of `parts`; the file gets its name when it is complete."""
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_suffix(".partial")
    torch.save(state | {"log": log}, partial)
    partial.replace(path)

def load_checkpoint(path, parts):
    """Restore the states of `parts`, and return the log. Raises InputError if that cannot be."""
    with blame("--resume needs a checkpoint of a run with the same settings and data"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["log"]

def run(policy, reference, batches, held_out, per_epoch, config):
    """Train, with all that watches over it: log, chart, evaluation, checkpoints, signals."""
    steps = config.epochs * per_epoch
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    schedule = transformers.get_scheduler(  # the schedule is our choice
        "cosine_warmup_with_min_lr", optimizer, steps // 10, steps, {"min_lr_rate": 0.1})
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    checkpoint = checkpoint_path(config)
    log = load_checkpoint(checkpoint, parts) if config.resume else []
    Path(config.output).mkdir(parents=True, exist_ok=True)

    # The log starts as the checkpoint has it: what a killed run did after that is done again.
    file = open(Path(config.output, "metrics.jsonl"), "w", buffering=1)
    for entry in log:
        print(json.dumps(entry), file=file)
        next(batches)  # skip the batch of a step already done
    heard = []  # signals: heard at once, obeyed after the step in hand
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda number, frame: heard.append(number))

    settings = {"beta": config.beta, "lambda_d": config.lambda_d, "lambda_u": config.lambda_u,
                "micro_batch_size": config.micro_batch_size}
    entries = train(policy, reference, batches, optimizer, schedule, len(log), **settings)
    print(f"\n  step  D, U: mean r of a class; z: z0; middle: 0; a dot: {0.1 / config.beta:g} nats")
    for entry in tqdm(entries, initial=len(log), total=steps, disable=None):
        if entry["step"] % math.ceil(steps / 16) == 0:
            tqdm.write(chart(entry, config.beta))
        log.append(entry)
        if len(log) % per_epoch == 0 and len(held_out["label"]) > 1:  # z0 takes two
            with torch.no_grad():
                figures = kto_step(policy, reference, held_out, **settings)
            entry |= {f"eval_{name}": value for name, value in figures.items()}
            tqdm.write(f"held out: loss {figures['loss']:.3f}, accuracy {figures['accuracy']:.2f}")
        print(json.dumps(entry), file=file)

        if heard or config.save_every and len(log) % config.save_every == 0:
            save_checkpoint(checkpoint, log, parts)
            if heard:
                print(f"stopped after {len(log)} of {steps} steps; to go on, add --resume")
                raise SystemExit(128 + heard[0])

    policy.save_pretrained(config.output)
    checkpoint.unlink(missing_ok=True)
    return log

def chart(entry, beta):
    """A step on an axis of r: D and U, the mean of each class, and z, which is z0."""
    marks = {"z": entry["z0"], "U": entry["reward_undesirable"], "D": entry["reward_desirable"]}
    line = ["."] * 71
    for mark, value in marks.items():
        if value is not None:
            line[min(max(35 + round(10 * beta * value), 0), 70)] = mark
    return f"{entry['step']:6} {''.join(line)}"

def main():
    config = read_flags()
    is_in_use = any(Path(config.output).glob("*.json*"))  # by a model or a log; the demo's may go
    if is_in_use and not config.resume and (config.model, config.output) != ("tiny", "kto-tiny"):
        raise InputError(f"{config.output} is in use: name another, delete it, or --resume")

    tokenizer = load_tokenizer(config)
    held_out, per_epoch, longest = survey(config, tokenizer)
    policy = load_model(config, tokenizer, *longest.values()).eval()  # eval: no dropout
    reference = copy.deepcopy(policy).requires_grad_(False)
    if config.dtype == "bfloat16":  # in forward passes, whoever calls them; weights stay float32
        for model in (policy, reference):
            model.forward = torch.autocast(model.device.type, torch.bfloat16)(model.forward)
    print(f"model    {config.model}, {policy.num_parameters():,} weights, {config.dtype}")

    log = run(policy, reference, training_batches(config, tokenizer), held_out, per_epoch, config)
    tokenizer.save_pretrained(config.output)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is saved: now Ctrl-C ends it at once
    for prompt in held_out["prompt"][:3]:
        print("\n" + tokenizer.decode(prompt, skip_special_tokens=True))
        ids = torch.tensor([prompt], device=policy.device)
        for name, model in (("before", reference), ("after", policy)):
            answer = model.generate(ids, max_new_tokens=64, do_sample=False)[0, len(prompt) :]
            print(f"  {name:6} {tokenizer.decode(answer, skip_special_tokens=True).strip()}")

    above = sum(entry["z0"] > 0 for entry in log)
    print(f"\nIn {above} of {len(log)} steps answers to other prompts had become likelier: z0 > 0.")

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError, FloatingPointError) as error:
        print(str(error).partition("\n")[0], file=sys.stderr)
        sys.exit(2)
