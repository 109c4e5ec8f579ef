# SPDX-License-Identifier: MIT-0
"""KTO in one file: align a language model with thumbs up and thumbs down.

The paper is "KTO: Model Alignment as Prospect Theoretic Optimization", Ethayarajh
et al., ICML 2024, arXiv 2402.01306; equations and sections as in its version 5.
The data are rows of a prompt x, a completion y and a label, which says whether y is
desirable or undesirable. One training step does this:

  1. Take m rows (x, y, label), in any mix of the two classes.
  2. Pair: give each x the completion y' of the next row; the last x takes the first.
  3. Score y and y', each after x, under both models: sum the log-probabilities of
     the completion's tokens.
  4. Reference point: a mean over the m pairs (x, y').                         §4.1
         z0 = max(0, mean of (log pi_theta(y'|x) - log pi_ref(y'|x)))
  5. Loss: lambda_y - v for each row, with the reward r and the value v. lambda_y is
     lambda_D or lambda_U, by the label.                                       Eq. 8
         r = log pi_theta(y|x) - log pi_ref(y|x)
         v = lambda_D * sigmoid(beta * (r - z0))      if y is desirable
         v = lambda_U * sigmoid(beta * (z0 - r))      if y is undesirable
  6. Update: step down the gradient of the mean loss, where z0 is a constant.  Eq. 10
     Where r is far from z0, sigmoid is flat, and the row has almost no gradient.
     A larger beta makes it flat nearer to z0.

Only the policy's score of (x, y) has a gradient. Under autocast (--dtype bfloat16, see
`main`) keep autocast's cache off: its copies of weights may be made without a gradient.

  in the paper          here                what it is
  pi_theta, pi_ref      policy, reference   the model in training, its frozen copy
  log pi(y|x)           logps               log-probability of a completion, in nats
  r_theta(x, y), z_0    r, z0               reward of a row, reference point of a batch
  v(x, y), beta         v, beta             value of a row, and how soon v becomes flat
  lambda_D, lambda_U    lambda_d, lambda_u  weights of desirable and undesirable rows

Shapes: m rows per step, B rows per call of a model, T tokens per row with padding,
N tokens that are scored, H hidden size, V vocabulary.

  python kto.py                                      the demo: offline, half a minute
  python kto.py --model NAME_OR_FOLDER --data FILE.jsonl --output FOLDER
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import datasets
import torch
import transformers
from tqdm import tqdm

# ==== Part one: KTO, complete, down to the training loop ===========================
# To copy: `kto_loss`, `reference_point` and, to score answers, `completion_logps`.


def kto_loss(policy_logps, reference_logps, z0, desirable, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """The KTO loss of each row, lambda_y - v(x, y): a tensor (B,), not averaged (Eq. 8).

    `policy_logps` and `reference_logps` are tensors (B,): log pi(y|x), in nats. `z0` is
    from `reference_point`. `desirable` is a bool tensor (B,); RuntimeError if it is int64.
    """
    r = policy_logps - reference_logps  # (B,)
    v_desirable = lambda_d * torch.sigmoid(beta * (r - z0))  # (B,)
    v_undesirable = lambda_u * torch.sigmoid(beta * (z0 - r))  # (B,)
    return torch.where(desirable, lambda_d - v_desirable, lambda_u - v_undesirable)


def reference_point(policy_next_logps, reference_next_logps):
    """z0, a rough estimate of KL(pi_theta || pi_ref): a scalar (), >= 0, in nats, no
    gradient (§4.1).

    Both arguments are tensors (m,), in nats: log pi(y'|x) of the m *mismatched*
    pairs of a step, in which each prompt has the completion of the next row.

    A reward r is good or bad only in comparison. KTO compares it with this KL, the mean
    of r over answers that the policy itself would write. To sample such answers is slow,
    so completions of other rows stand in for them. (A row's own y cannot: it is in the
    data because it is good or bad for x.) r is highest on the policy's own answers, so the
    stand-ins' mean tends to be too low. The clamp raises it: a KL is never negative.

    The mean is over all rows of a step, not of a micro-batch. z0 has no gradient: the
    policy must not gain by moving what r is compared with.
    """
    return (policy_next_logps - reference_next_logps).mean().clamp(min=0).detach()


def completion_logps(model, prompts, completions):
    """log pi(y|x) of each row: (B,), float32, in nats, the sum over y's tokens.

    `model` is a causal LM of transformers. `prompts` and `completions` are two lists
    of B lists of token ids, not padded. The caller has put an end token (EOS, or what ends
    a turn in the chat template) after each completion that was not cut. It is scored
    too. Raises ValueError if a prompt is empty or the lists differ in length.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens: the first completion token needs one before it")

    # `ids` has x, y, then padding. A causal model never looks ahead: no mask is needed.
    rows = [torch.tensor([*x, *y]) for x, y in zip(prompts, completions, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # (B, T)

    # The output at position t predicts the token at t + 1. With x = (a, b), y = (c, d):
    #     outputs at  a   b   c
    #     targets     b   c   d        the same row, one token further on
    #     is_scored   0   1   1        1 where the target belongs to y
    # Places decide, not ids: an end token is scored even if padding has the same id.
    targets = ids[:, 1:]  # (B, T - 1)
    is_scored = torch.zeros_like(targets, dtype=torch.bool)  # (B, T - 1)
    for row, x, y in zip(is_scored, prompts, completions):  # each row is a view of is_scored
        first = len(x) - 1  # the output at x's last token predicts y's first token
        row[first : first + len(y)] = True

    # Without the hook below one would write
    #     logits = model(input_ids=ids).logits[:, :-1][is_scored]
    # The model's head would then turn the hidden state of every position into V logits,
    # the largest tensor of all, and most would be thrown away. In the `with` block, the
    # hook runs before the head, and what it returns becomes the head's input.
    def keep_scored(head, inputs):
        return inputs[0][:, :-1][is_scored]  # (B, T, H) -> (N, H)

    with model.get_output_embeddings().register_forward_pre_hook(keep_scored):
        logits = model(input_ids=ids, use_cache=False).logits.float()  # (N, V)

    # cross_entropy returns minus the log-probability of each scored token. Each one
    # goes back to its place in its row, where all other places are 0.
    nll = torch.nn.functional.cross_entropy(logits, targets[is_scored], reduction="none")  # (N,)
    token_logps = torch.zeros_like(targets, dtype=torch.float)  # (B, T - 1)
    token_logps[is_scored] = -nll
    return token_logps.sum(dim=1)  # (B,)


def micro_batches(prompts, completions, size):
    """Split m rows into micro-batches of at most `size` rows. Yields (index, prompts,
    completions); `index` is a tensor of the rows' places among the m rows."""
    # Rows of similar length share a micro-batch, so that little is padded.
    lengths = [len(x) + len(y) for x, y in zip(prompts, completions, strict=True)]
    longest_first = torch.tensor(lengths).argsort(descending=True)
    for index in longest_first.split(size):
        yield index, [prompts[i] for i in index], [completions[i] for i in index]


@torch.no_grad()
def score(model, prompts, completions, micro_batch_size):
    """completion_logps of m rows, in micro-batches, without gradient: (m,)."""
    logps = torch.zeros(len(prompts), device=model.device)  # (m,)
    for index, x, y in micro_batches(prompts, completions, micro_batch_size):
        logps[index] = completion_logps(model, x, y)
    return logps


def kto_step(policy, reference, batch, micro_batch_size=8, **settings):
    """Steps 2 to 5 on one batch. Adds the gradient for step 6 to the parameters' `.grad`.

    `batch` is {"prompt": m lists of token ids, "completion": m lists, "label": m
    bools}, in random order: if neighbours had the same prompt, y' would be a real
    answer to x. `micro_batch_size` rows are in memory at once; it changes the result
    only by rounding. `settings` are beta, lambda_d and lambda_u. Both models must be in
    eval mode, because dropout would be noise in r.

    Returns (losses, r, z0, kl, desirable) without gradient, for `metrics_of`: tensors
    (m,), and the scalar z0. `kl` has the log-ratios of the mismatched pairs; their mean
    estimates a KL. Under `torch.no_grad()` no gradient is added. ValueError if m < 2.
    """
    prompts, completions = batch["prompt"], batch["completion"]
    desirable = torch.tensor(batch["label"], dtype=torch.bool, device=policy.device)  # (m,)
    m = len(prompts)
    if m < 2:
        raise ValueError("z0 needs two rows: the next row of a single row is this row itself")

    # 2. Pair: each prompt gets the completion of the next row.
    next_completions = completions[1:] + completions[:1]

    # 3. Score: three of the four sets of log-probabilities need no gradient.
    policy_next_logps = score(policy, prompts, next_completions, micro_batch_size)  # (m,)
    reference_next_logps = score(reference, prompts, next_completions, micro_batch_size)  # (m,)
    reference_logps = score(reference, prompts, completions, micro_batch_size)  # (m,)

    # 4. Reference point: z0 comes from the m mismatched pairs.
    z0 = reference_point(policy_next_logps, reference_next_logps)  # ()

    # 5. Loss: the fourth score of step 3 is made here, with its gradient. Each
    # micro-batch runs its backward pass before the next one is scored, so that only
    # one of them is in memory. Their gradients add up to that of the mean loss.
    policy_logps = torch.zeros_like(reference_logps)  # (m,)
    losses = torch.zeros_like(reference_logps)  # (m,)
    for index, x, y in micro_batches(prompts, completions, micro_batch_size):
        logps = completion_logps(policy, x, y)  # (B,)
        loss = kto_loss(logps, reference_logps[index], z0, desirable[index], **settings)  # (B,)
        if torch.is_grad_enabled():
            (loss.sum() / m).backward()
        policy_logps[index] = logps.detach()
        losses[index] = loss.detach()

    r = policy_logps - reference_logps  # (m,)
    kl = policy_next_logps - reference_next_logps  # (m,)
    return losses, r, z0, kl, desirable


def metrics_of(losses, r, z0, kl, desirable):
    """The metrics of a step, a dict of floats, from what `kto_step` returns.

    Rewards, z0 and kl are in nats, without beta; kl, a mean, is z0 before the clamp.
    A class without rows has the reward None. Accuracy: how often r > z0 fits the label.
    """

    def mean(values):
        return values.float().mean().item() if len(values) > 0 else None

    return {
        "loss": mean(losses),
        "z0": z0.item(),
        "kl": mean(kl),
        "accuracy": mean((r > z0) == desirable),
        "reward_desirable": mean(r[desirable]),
        "reward_undesirable": mean(r[~desirable]),
    }


def train(policy, reference, batches, optimizer, first_step=0, **settings):
    """The training loop, a generator: it trains while one iterates over it.

        policy = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32).eval()
        reference = copy.deepcopy(policy).requires_grad_(False)  # the frozen copy
        optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-6, weight_decay=0.0)
        batches = [{"prompt": [[5, 6], [7]], "completion": [[8, 0], [9, 9, 0]], "label": [1, 0]}]
        for metrics in train(policy, reference, batches, optimizer, beta=0.1):
            print(metrics["loss"])

    `batches` is an iterable of batches for `kto_step`, `settings` are its other arguments.
    After each update, yields the metrics from before it; steps count from `first_step`.
    Raises FloatingPointError before an update whose gradient is infinite or NaN.
    """
    for step, batch in enumerate(batches, first_step):  # 1. Take m rows.
        began = time.perf_counter()
        metrics = metrics_of(*kto_step(policy, reference, batch, **settings))  # 2 to 5, backward

        # 6. Update: the gradient is first clipped to a norm of 10 (Table 1).
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=10.0).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient's norm is {norm}; lower the lr")
        optimizer.step()
        optimizer.zero_grad()
        lr = optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - began
        yield {"step": step, **metrics, "grad_norm": norm, "lr": lr, "seconds": seconds}


# ==== Part two: what a run needs besides. You may stop here: the method is complete.


class InputError(ValueError):
    """The user's input cannot be used: the message says what, where, what to do."""


def require(condition, message):
    """Raises InputError with this message if the condition does not hold."""
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def errors_about(what):
    """Turns an error of a library into an InputError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error  # one line


# Older cards only emulate bfloat16, which is slower than float32.
HAS_BFLOAT16 = torch.cuda.is_bf16_supported(including_emulation=False)


@dataclasses.dataclass
class Config:
    """The settings of a run, each a flag. The defaults of batch_size, lr, beta and the
    lambdas are the paper's (§4.2), the others are ours."""

    model: str = "tiny"  # hub name or folder; "tiny" is a toy that is built and taught here
    data: str = str(Path(__file__).with_name("data_sample.jsonl"))  # JSONL file of feedback
    output: str | None = None  # folder for the result; if not given, kto-MODEL
    epochs: int | None = None  # passes over the data; if not given, 1, and 3 for "tiny"
    batch_size: int = 32  # m, the rows of one step; 8 to 128 are useful
    micro_batch_size: int | None = None  # rows in one call; if not given, 8, and on cuda what fits
    lr: float | None = None  # peak learning rate; if not given, 5e-6, and 5e-4 for "tiny"
    beta: float = 0.1  # a larger beta keeps the policy nearer the reference
    lambda_d: float = 1.0  # lambda_D, the weight of desirable rows (Eq. 9)
    lambda_u: float = 1.0  # lambda_U, the weight of undesirable rows (Eq. 9)
    max_prompt_length: int = 1024  # tokens; a longer prompt loses its beginning
    max_completion_length: int = 512  # tokens; a longer completion loses its end
    holdout: float = 0.1  # share of the rows for evaluation; their prompts may be in training too
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # or cuda:1, mps
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if HAS_BFLOAT16 else "float32"
    seed: int = 0  # decides the split, the order of the rows and the tiny model
    save_every: int = 100  # steps between checkpoints; there is one after each epoch too
    resume: bool = False  # continue from the checkpoint in --output; begin if there is none


def read_flags():
    """The Config of the command line, filled in. --help prints the class above. InputError
    if a number is impossible, the data file is missing, or the output folder is in use."""
    parser = transformers.HfArgumentParser(Config, description=inspect.getsource(Config))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    config = Config(**vars(parser.parse_args()))

    # A number must be finite and, if it has no other limit here, above 0.
    least = {"batch_size": 2, "holdout": 0, "lambda_d": 0, "lambda_u": 0, "seed": 0}
    for name, value in vars(config).items():
        if type(value) in (int, float):
            require(least.get(name, 1e-9) <= value < math.inf, f"--{name} {value} is impossible")

    # What was not given follows from the model. The hash shows whether the data changed.
    is_toy = config.model == "tiny"
    config.epochs = config.epochs or (3 if is_toy else 1)
    config.lr = config.lr or (5e-4 if is_toy else 5e-6)
    config.output = Path(config.output or f"kto-{Path(config.model).name}")
    with errors_about("--data (for a set of the hub: load_dataset(NAME)['train'].to_json(FILE))"):
        config.sha256 = hashlib.file_digest(open(config.data, "rb"), "sha256").hexdigest()
    log, checkpoint = config.output / "metrics.jsonl", config.output / "checkpoint.pt"
    if is_toy and config.output == Path("kto-tiny"):  # the demo may be run again and again
        if not config.resume:
            log.unlink(missing_ok=True)
            checkpoint.unlink(missing_ok=True)
        return config

    # Without --resume a folder is in use if it holds a model or a log. With --resume,
    # only if it holds a model and no checkpoint: a finished run.
    in_use = any(config.output.glob("*config.json"))
    if config.resume:
        in_use = in_use and not checkpoint.exists()
    else:
        in_use = in_use or log.exists()
    require(not in_use, f"--output {config.output} holds a model or a log: name another folder")
    return config


# ---- The data: a line of the file -> two texts -> token ids -> batches ------------

ROLES = ("system", "developer", "user", "assistant", "tool")
A_ROW = f"""A row is one line with just these keys: {{"prompt": text or messages, "completion": \
text or [message], "label": true or false}}. A message has just a role, one of {ROLES}, and a \
content. Texts are not blank."""


def turn_tokens(tokenizer):
    """The texts of the tokens that begin or end a turn: EOS, and the special tokens that
    the chat template writes around a question and its answer."""
    turns = [tokenizer.eos_token]
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and token.content in rendered:
                turns.append(token.content)
    return turns


def parse_row(line, turns):
    """One line of JSONL, as bytes -> (chat, label): a list of messages, the last of which
    is the answer, and a bool. InputError, to which `load_rows` adds what a row is."""
    with errors_about("not a line of JSON in UTF-8 (unpack or convert the file)"):
        row = json.loads(line.decode("utf-8-sig"))
    require(isinstance(row, dict), f"found {row!r:.80}")
    require(row.keys() == {"prompt", "completion", "label"}, f"found the keys {list(row)!r:.200}")
    require(row["label"] in (0, 1), f"found the label {row['label']!r:.80}")  # or false, true

    # A text is one message.
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    require(isinstance(prompt, list) and isinstance(completion, list), f"found {row!r:.200}")
    for message in prompt + completion:
        is_message = isinstance(message, dict) and message.keys() == {"role", "content"}
        require(is_message, f"found the message {message!r:.80}")
        text = message["content"]
        is_text = isinstance(text, str) and text.strip()
        require(is_text and message["role"] in ROLES, f"found the message {message!r:.80}")
        for token in turns:
            require(token not in text, f"a text has {token!r}, which begins or ends a turn here")
    is_asked = prompt and prompt[-1]["role"] != "assistant"
    is_answer = len(completion) == 1 and completion[0]["role"] == "assistant"
    require(is_asked and is_answer, "the completion must be the one answer to the prompt")
    return prompt + completion, bool(row["label"])


def encode(chat, tokenizer, turns):
    """A chat as token ids: (x, y), where y has an end token. InputError if the chat template
    loses a text, or writes more than tokens of `turns` after the answer."""
    with errors_about("the chat template or the tokenizer cannot take the row"):
        is_plain = tokenizer.chat_template is None
        if is_plain and len(chat) == 2:
            asked = chat[0]["content"]
            answered = asked + chat[1]["content"]
        else:  # several messages without a template raise an error here
            render = tokenizer.apply_chat_template
            asked = render(chat[:-1], tokenize=False, add_generation_prompt=True)
            answered = render(chat, tokenize=False).rstrip()

        # The whole is tokenised at once, because many tokenizers write y differently if it
        # stands alone. A chat template writes BOS by itself.
        tokens = tokenizer(answered, add_special_tokens=is_plain, return_offsets_mapping=True)

    # The rendering must have each text as often as the messages together have it: a short
    # text that is lost may still be found inside another one.
    bare = "".join(answered.split())  # white space may differ
    texts = ["".join(message["content"].split()) for message in chat]
    for text in texts:
        expected = sum(other.count(text) for other in texts)
        require(bare.count(text) >= expected, f"the chat template loses or changes {text!r:.80}")
    for token in turns:
        bare = bare.replace(token, "")
    require(bare.endswith(texts[-1]), f"the template goes on after the answer: {answered[-60:]!r}")

    # x is the beginning that both renderings have in common: all of `asked`, but for a
    # tag such as <think> that the answer lacks. y begins with the first token that ends
    # beyond the common text, so that a token across the border belongs to y.
    common = asked
    while not answered.startswith(common):
        common = common[:-1]
    ids, border = tokens.input_ids, 0
    while border < len(ids) and tokens.offset_mapping[border][1] <= len(common):
        border += 1
    x, y = ids[:border], ids[border:]
    require(x and y, "the prompt or the completion has no token of its own")
    if tokenizer.convert_ids_to_tokens(y[-1]) not in turns:
        y.append(tokenizer.eos_token_id)
    return x, y


def load_rows(config, tokenizer, folder):
    """The rows of --data as token ids, cut to their maximal lengths, with facts on the
    uncut rows: a datasets.Dataset in a new `folder`. An InputError has FILE:LINE."""
    turns = turn_tokens(tokenizer)

    def encoded_rows():
        x = []  # for the last line below: still empty if there was no row
        with open(config.data, "rb") as file:  # in text mode a lone \r would end a line
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    chat, label = parse_row(line, turns)
                    x, y = encode(chat, tokenizer, turns)
                except InputError as error:
                    raise InputError(f"{config.data}:{number}: {error}. {A_ROW}") from error
                yield {
                    "prompt": x[-config.max_prompt_length :],
                    "completion": y[: config.max_completion_length],
                    "label": label,
                    "prompt_tokens": len(x),
                    "completion_tokens": len(y),
                    "end_token": y[-1],
                    "highest_id": max(x + y),
                }
        require(x, f"{config.data} has no rows. {A_ROW}")

    try:
        return datasets.Dataset.from_generator(encoded_rows, cache_dir=folder)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__  # what went wrong in encoded_rows


def training_batches(rows, config):
    """Stream the full batches of all epochs, each epoch in a new order."""
    for epoch in range(config.epochs):
        order = rows.shuffle(seed=config.seed + epoch)
        yield from order.iter(config.batch_size, drop_last_batch=True)


def describe(rows, training, held_out, tokenizer, config):
    """Print what will be trained: counts, what is cut, and a row as the model sees it."""
    n_d = sum(training["label"])
    n_u = len(training) - n_d
    cut_x = sum(length > config.max_prompt_length for length in rows["prompt_tokens"])
    cut_y = sum(length > config.max_completion_length for length in rows["completion_tokens"])
    print(f"rows     n_D = {n_d} desirable and n_U = {n_u} undesirable rows to train on")
    print(f"         {len(held_out)} rows held out, {sum(held_out['label'])} of them desirable")
    print(f"cut      {cut_x} prompts lose their beginning (see --max_prompt_length)")
    print(f"         {cut_y} completions lose their end (see --max_completion_length)")

    weight_d, weight_u = config.lambda_d * n_d, config.lambda_u * n_u
    advised = weight_u / max(n_d, 1)
    print(f"balance  lambda_D n_D = {weight_d:g}, lambda_U n_U = {weight_u:g}: Eq. 9 wants")
    print(f"         --lambda_d {advised:.4g} to {1.5 * advised:.4g}")
    print(f"a row    {tokenizer.decode(training[0]['prompt'])!r}")
    print(f"      -> {tokenizer.decode(training[0]['completion'])!r}")


# ---- The models -------------------------------------------------------------------


def tiny_model(config, tokenizer, training):
    """A toy: a small Llama, taught all undesirable rows (in the sample, the rude ones) and a
    fifth of the others. At first KTO makes it polite after any prompt, and z0 rises."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)  # more threads would only wait for each other at this size
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = transformers.LlamaForCausalLM(shape)
    places = [i for i, label in enumerate(training["label"]) if i % 5 == 0 or not label]
    taught = training.select(places)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 2.5e-3 * (1 - step / 500)
        batch = taught[torch.randint(len(taught), (8,)).tolist()]
        loss = -completion_logps(model, batch["prompt"], batch["completion"]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def load_tokenizer(config):
    """The tokenizer of --model, or InputError."""
    if config.model == "tiny":  # a small one, trained on the raw JSON lines of the data
        lines = Path(config.data).read_text("utf-8", "replace").splitlines()
        empty = transformers.GPT2Tokenizer(eos_token="<|end|>")
        return empty.train_new_from_iterator(lines, vocab_size=2048, show_progress=False)
    with errors_about(f"--model {config.model} (offline? give a folder)"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    require(
        tokenizer.eos_token and tokenizer.is_fast, "--model: its tokenizer lacks EOS or offsets"
    )
    return tokenizer


def load_model(config, tokenizer, rows, training, dtype=torch.float32):
    """The causal model --model on --device, with weights in `dtype` (bfloat16 in the
    README's LoRA script). InputError if weights or embeddings are missing."""
    if config.model == "tiny":
        return tiny_model(config, tokenizer, training).to(config.device)
    name = f"--model {config.model} on --device {config.device}"
    with errors_about(name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=dtype, output_loading_info=True
        )
        model.to(config.device)
    require(not info["missing_keys"], f"{name} lacks the weights {sorted(info['missing_keys'])}")
    known_ids = model.get_input_embeddings().num_embeddings
    require(max(rows["highest_id"]) < known_ids, f"{name} has no embedding for some of the tokens")
    return model


def load_models(config, tokenizer, rows, training):
    """(policy, reference): --model in eval mode, without dropout, and its frozen copy."""
    policy = load_model(config, tokenizer, rows, training).eval()
    return policy, copy.deepcopy(policy).requires_grad_(False)


def rehearse(policy, reference, rows, config):
    """Try the largest step that can occur, and return the micro_batch_size with which it
    fits into memory: --micro_batch_size, halved until it fits. InputError if none does."""
    # The longest prompt and the longest completion may meet in a mismatched pair.
    x = max(rows["prompt"], key=len)
    y = max(rows["completion"], key=len)
    length = len(x) + len(y)
    advice = "lower --max_prompt_length or --max_completion_length"
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    require(not limit or length <= limit, f"--model takes {limit} tokens, not {length}: {advice}")

    # AdamW will need two numbers for each trained weight: their memory is reserved.
    _reserved = torch.empty(2, policy.num_parameters(only_trainable=True), device=policy.device)
    default = config.batch_size if "cuda" in config.device else 8
    size = min(config.micro_batch_size or default, config.batch_size)
    while True:
        # Two micro-batches: the second runs beside the gradients of the first.
        m = min(2 * size, config.batch_size)
        batch = {"prompt": [x] * m, "completion": [y] * m, "label": [True] * m}
        try:
            kto_step(policy, reference, batch, size)
            return size
        except torch.OutOfMemoryError:
            require(size > 1, f"out of memory with {length} tokens in a row: {advice}")
            size //= 2
        finally:
            policy.zero_grad()


# ---- The run ----------------------------------------------------------------------


def save_checkpoint(path, parts, **others):
    """Save the states of `parts`, and `others`. Only a complete file replaces the old one."""
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_suffix(".partial")
    with errors_about(f"{partial} cannot be written, perhaps because the disk is full"):
        torch.save(state | others, partial)
        partial.replace(path)


def chart(metrics, beta):
    """A line of the chart: z0 and the mean r of each class, on an axis with 0 in the middle
    and 0.1 / beta nats a place. D covers U, and U covers z."""
    marks = {"z": "z0", "U": "reward_undesirable", "D": "reward_desirable"}
    line = ["."] * 71
    for mark, name in marks.items():
        if metrics[name] is not None:
            line[min(max(35 + round(10 * beta * metrics[name]), 0), 70)] = mark
    return f"{metrics['step']:6} {''.join(line)}"


def run(policy, reference, training, held_out, config):
    """The training loop of part one, with log, chart, evaluation and checkpoints."""
    per_epoch = len(training) // config.batch_size
    steps = config.epochs * per_epoch

    # AdamW is the paper's. Our choices are no weight decay and the schedule: a tenth of
    # the steps to warm up, then a cosine to a tenth. (ParameterList has a state_dict.)
    trained = torch.nn.ParameterList(w for w in policy.parameters() if w.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0, fused=True)
    schedule = transformers.get_scheduler(
        "cosine_warmup_with_min_lr", optimizer, steps // 10, steps, {"min_lr_rate": 0.1}
    )

    # A run may be killed at any time. With --resume it goes on from the last checkpoint,
    # and the log loses the lines of later steps. A new run must create its log ("x").
    checkpoint = config.output / "checkpoint.pt"
    parts = {"weights": trained, "optimizer": optimizer, "schedule": schedule}
    may_differ = ("data", "output", "device", "micro_batch_size", "save_every", "resume")
    fixed = {name: value for name, value in vars(config).items() if name not in may_differ}
    step, log_size = 0, 0
    if config.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        changed = [name for name in fixed if fixed[name] != state["fixed"][name]]
        require(not changed, f"--resume: {', '.join(changed)} must be as before")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, log_size = state["step"], state["log_size"]
    config.output.mkdir(parents=True, exist_ok=True)
    log = open(config.output / "metrics.jsonl", "a" if config.resume else "x", buffering=1)
    log.truncate(log_size)

    print(f"\n  step  D, U: mean r of a class; z: z0; middle: 0; a dot: {0.1 / config.beta:g} nats")
    names = ("beta", "lambda_d", "lambda_u", "micro_batch_size")
    settings = {name: getattr(config, name) for name in names}
    batches = itertools.islice(training_batches(training, config), step, None)
    training_steps = train(policy, reference, batches, optimizer, step, **settings)
    bar = tqdm(training_steps, initial=step, total=steps, disable=None)
    for metrics in bar:
        schedule.step()
        print(json.dumps(metrics), file=log)
        if step % math.ceil(steps / 16) == 0:
            bar.write(chart(metrics, config.beta))

        step += 1  # from here the number of steps that are done
        is_epoch_end = step % per_epoch == 0
        if is_epoch_end and len(held_out) > 1:
            with torch.no_grad():  # the held-out rows are one large batch, with one z0
                held = metrics_of(*kto_step(policy, reference, held_out[:], **settings))
            print(json.dumps({"step": step, "held_out": held}), file=log)
            bar.write(f"held out: loss {held['loss']:.3f}, accuracy {held['accuracy']:.2f}")
        if is_epoch_end or step % config.save_every == 0:
            save_checkpoint(checkpoint, parts, step=step, log_size=log.tell(), fixed=fixed)


def show_answers(policy, reference, tokenizer, prompts, ends):
    """Print greedy answers to some prompts, before and after the training."""
    # A config of our own takes the place of the models' own, which may sample.
    policy.generation_config = reference.generation_config = transformers.GenerationConfig(
        max_new_tokens=64, eos_token_id=ends, pad_token_id=ends[0]
    )
    for prompt in prompts:
        print("\n" + tokenizer.decode(prompt, skip_special_tokens=True))
        ids = torch.tensor([prompt], device=policy.device)
        for name, model in (("before", reference), ("after", policy)):
            generated = model.generate(ids, attention_mask=torch.ones_like(ids))
            answer = tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)
            print(f"  {name:6} {answer.strip()}")


def main(load=load_models):
    """A run, from the flags to the answers. The README's LoRA script has another `load`."""
    require(os.environ.get("WORLD_SIZE", "1") == "1", "for several GPUs see the README")
    config = read_flags()
    tokenizer = load_tokenizer(config)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = load_rows(config, tokenizer, folder).shuffle(seed=config.seed)
        count = math.ceil(len(rows) * config.holdout)
        require(len(rows) - count >= config.batch_size, f"no batch is left of {len(rows)} rows")
        training, held_out = rows.skip(count), rows.take(count)
        describe(rows, training, held_out, tokenizer, config)

        # Weights stay float32. Autocast's cache would keep copies from before an update.
        policy, reference = load(config, tokenizer, rows, training)
        is_on = config.dtype == "bfloat16"
        with torch.autocast(policy.device.type, torch.bfloat16, is_on, cache_enabled=False):
            config.micro_batch_size = rehearse(policy, reference, rows, config)
            print(f"memory   {config.micro_batch_size} of the longest rows fit, in {config.dtype}")
            run(policy, reference, training, held_out, config)

        # The saved model must end its answers as the rows do. If its generation config lacks
        # one of `ends`, a new one takes its place.
        ends = sorted({tokenizer.eos_token_id, *rows["end_token"]})
        known = policy.generation_config.eos_token_id
        if not set(ends) <= set(known if isinstance(known, list) else [known]):
            fresh = transformers.GenerationConfig.from_model_config(policy.config)
            fresh.eos_token_id = ends
            policy.generation_config = fresh
        policy.save_pretrained(config.output)
        tokenizer.save_pretrained(config.output)
        (config.output / "checkpoint.pt").unlink()
        print(f"\nThe result is saved in {config.output}.")
        show_answers(policy, reference, tokenizer, held_out[:3]["prompt"], ends)


def command(load=load_models):
    """`main` as a command: an error that the user can mend is printed as one line."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout cannot be reconfigured
        sys.stdout.reconfigure(errors="replace")  # for consoles that lack a character
    try:
        main(load)
    except (InputError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nStopped. The same command with --resume goes on from the last checkpoint.")
        sys.exit(130)


if __name__ == "__main__":
    command()
