# SPDX-License-Identifier: MIT-0
"""KTO in one file: align a language model with thumbs up and thumbs down.

The paper is "KTO: Model Alignment as Prospect Theoretic Optimization", Ethayarajh
et al., ICML 2024, arXiv 2402.01306. Equations and sections are numbered as in its
version 5.

The data are rows of a prompt x, a completion y and a label, which says whether y is
desirable or undesirable. One training step does this:

  1. Take m rows (x, y, label), in any mix of the two classes.
  2. Pair: give each x the completion y' of the next row, and the last x the
     completion of the first row.
  3. Score y and y', each after x, under both models: sum the log-probabilities of
     the completion's tokens.
  4. Reference point: a mean over the m pairs (x, y').                         §4.1
         z0 = max(0, mean of (log pi_theta(y'|x) - log pi_ref(y'|x)))
  5. Loss: lambda_y - v for each row, with the reward r and the value v. By the
     label, lambda_y is lambda_D or lambda_U.                                  Eq. 8
         r = log pi_theta(y|x) - log pi_ref(y|x)
         v = lambda_D * sigmoid(beta * (r - z0))      if y is desirable
         v = lambda_U * sigmoid(beta * (z0 - r))      if y is undesirable
  6. Update: step down the gradient of the mean loss, where z0 is a constant.  Eq. 10
     Where r is far from z0, sigmoid is flat, and the row has almost no gradient.
     A larger beta makes it flat nearer to z0.

A step costs four forward passes, three of them without gradient, and one backward
pass.

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
import json
import math
import os
import re
import signal
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


def kto_loss(policy_logps, reference_logps, z0, desirable, beta=0.1, lambda_d=1.0, lambda_u=1.0):
    """The KTO loss of each row, lambda_y - v(x, y): a tensor (B,), not yet averaged
    (Eq. 8).

    `policy_logps` and `reference_logps` are tensors (B,): log pi(y|x) of each row,
    in nats. `z0` is the scalar that `reference_point` returns. `desirable` is a bool
    tensor (B,), True for a desirable row; any mix of the classes is allowed. If
    it is int64 and not bool, RuntimeError is raised.
    """
    r = policy_logps - reference_logps  # (B,)
    v_desirable = lambda_d * torch.sigmoid(beta * (r - z0))  # (B,)
    v_undesirable = lambda_u * torch.sigmoid(beta * (z0 - r))  # (B,)
    return torch.where(desirable, lambda_d - v_desirable, lambda_u - v_undesirable)


def reference_point(policy_next_logps, reference_next_logps):
    """z0, an estimate of KL(pi_theta || pi_ref): a scalar (), >= 0, in nats, no
    gradient (§4.1).

    Both arguments are tensors (m,), in nats: log pi(y'|x) of the m *mismatched*
    pairs of a step, in which each prompt has the completion of the next row. They
    are not the log-probabilities that `kto_loss` takes: with those, z0 would be the
    mean reward.

    What z0 is for: a reward r is good or bad only in comparison, here with the KL,
    which is the mean of r over the policy's own answers. If the policy made every
    completion more likely, good or bad, r and z0 would rise together and no value would
    be gained.
    - Why mismatched pairs: z0 is about answers in general, but a row's own y is in
      the data because it is good or bad for x. So the rows exchange their
      completions. From the rows (x1, y1) and (x2, y2), z0 uses the pairs (x1, y2)
      and (x2, y1). The estimate is biased. An unbiased estimate would need answers that
      are sampled from the policy, which is slow.
    - Why the mean over all m rows of a step: the number of rows that fit into memory
      at once must not change the result.
    - Why the clamp: a KL divergence is never negative, but its estimate from m pairs
      can be.
    - Why no gradient: r is measured from z0, and the policy must not gain by moving
      z0. In this file the pairs are scored without gradient anyway; `detach` is for
      readers who copy this function into code that scores them with gradient.
    """
    return (policy_next_logps - reference_next_logps).mean().clamp(min=0).detach()


def completion_logps(model, prompts, completions):
    """log pi(y|x) of each row: (B,), float32, in nats, the sum over y's tokens.

    `model` is a causal LM of transformers; `prompts` and `completions` are two lists
    of B lists of token ids, not padded. The caller has put the end token at the end
    of each completion. It is scored like any other token. (A completion that was cut
    to a maximal length has no end token, because it did not end there.) Raises
    ValueError if a prompt is empty or if the two lists differ in length.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens: the first completion token needs one before it")

    # A row is x, then y, then padding. A causal model never looks to the right, so
    # the padding changes nothing, and no attention mask is needed.
    rows = [torch.tensor([*x, *y]) for x, y in zip(prompts, completions, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # (B, T)

    # The output at position t predicts the token at t + 1. An example is
    # x = (a, b) and y = (c, d):
    #     outputs at  a   b   c
    #     targets     b   c   d        the same row, one token further on
    #     is_scored   0   1   1        1 where the target belongs to y
    # Positions decide what is scored, not token ids: an end token counts even if
    # padding has the same id.
    targets = ids[:, 1:]  # (B, T - 1)
    is_scored = torch.zeros_like(targets, dtype=torch.bool)  # (B, T - 1)
    for row, x, y in zip(is_scored, prompts, completions):  # each row is a view of is_scored
        first = len(x) - 1  # the output at x's last token predicts y's first token
        row[first : first + len(y)] = True

    # Without the hook below one would write
    #     logits = model(input_ids=ids).logits[:, :-1][is_scored]
    # The model's last layer, its head, would then turn the hidden state of every
    # position into V logits, and most of these would be thrown away. Logits are the
    # largest tensor of all. The hook runs before the head, and what it returns
    # becomes the head's input: the hidden states whose targets are scored. The hook
    # is removed where the `with` block ends.
    def keep_scored(head, inputs):
        return inputs[0][:, :-1][is_scored]  # (B, T, H) -> (N, H)

    with model.get_output_embeddings().register_forward_pre_hook(keep_scored):
        logits = model(input_ids=ids, use_cache=False).logits.float()  # (N, V)

    # cross_entropy returns minus the log-probability of each scored token. With the
    # sign turned round, each one goes back to its place in its row. All other places
    # are 0, and each row is summed.
    nll = torch.nn.functional.cross_entropy(logits, targets[is_scored], reduction="none")  # (N,)
    token_logps = torch.zeros_like(targets, dtype=torch.float)  # (B, T - 1)
    token_logps[is_scored] = -nll
    return token_logps.sum(dim=1)  # (B,)


def micro_batches(prompts, completions, size):
    """Split m rows into micro-batches. One call of a model scores one micro-batch.

    Yields (index, prompts, completions) of at most `size` rows. `index` is a tensor
    of the rows' places among the m rows.
    """
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
    """Steps 2 to 5 on one batch, and the gradient for step 6, which it adds to the
    policy's `.grad`.

    `batch` is {"prompt": m lists of token ids, "completion": m lists, "label": m
    bools}. Its rows must be in random order, so that neighbours rarely have the same
    prompt. If they had, the mismatched completion would be a real answer to this
    prompt, and z0 would measure the same as the rewards. The `micro_batch_size`
    changes the memory that is needed, and the result only by rounding. `settings`
    are beta, lambda_d and lambda_u. Both models must be in eval mode, because
    dropout would be noise in r.

    Returns (losses, r, z0, kl, desirable), tensors (m,) without gradient, for
    `metrics_of`. The one z0 of the step is repeated m times, so that `evaluate` can
    join the rows of several steps. The kl of a row is
    log pi_theta(y'|x) - log pi_ref(y'|x), where y' is the completion of the next
    row. The mean of the m values of kl, clamped at 0, is z0. Under
    `torch.no_grad()` the step only evaluates. Raises ValueError if m < 2.
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

    # 5. Loss: the fourth score of step 3 is made here too, because it needs the
    # gradient. Each micro-batch runs its backward pass before the next one is
    # scored, so that only one of them is in memory. The sum of their gradients is
    # the gradient of the mean loss.
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
    return losses, r, z0.expand(m), kl, desirable


def metrics_of(losses, r, z0, kl, desirable):
    """The metrics of one step, or of several: means over rows, a dict of floats.

    The arguments are tensors (m,), as `kto_step` returns them. Rewards, margin, z0
    and kl are in nats and are not multiplied by beta. The reward of a class without
    rows is None. A desirable row is accurate if r > z0, and an undesirable row if
    not. At step 0 all r and z0 are 0, so that r > z0 is false everywhere and the
    accuracy is the share of undesirable rows.
    """
    reward_desirable = r[desirable].mean().item() if desirable.any() else None
    reward_undesirable = r[~desirable].mean().item() if not desirable.all() else None
    margin = None
    if reward_desirable is not None and reward_undesirable is not None:
        margin = reward_desirable - reward_undesirable
    return {
        "loss": losses.mean().item(),
        "z0": z0.mean().item(),
        "kl": kl.mean().item(),
        "accuracy": ((r > z0) == desirable).float().mean().item(),
        "reward_desirable": reward_desirable,
        "reward_undesirable": reward_undesirable,
        "margin": margin,
    }


def train(policy, reference, batches, optimizer, first_step=0, **settings):
    """The training loop, as a generator: it trains while one iterates over it, and
    only then.

        policy = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
        policy.eval()  # no dropout
        reference = copy.deepcopy(policy).requires_grad_(False)  # the frozen copy
        optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-6, weight_decay=0.0)
        for metrics in train(policy, reference, batches, optimizer, beta=0.1):
            print(metrics["loss"])

    `batches` is an iterable of what `kto_step` takes. `settings` are the keyword
    arguments of `kto_step`: micro_batch_size, beta, lambda_d and lambda_u. After
    each update, yields the metrics that were measured before it; the steps are
    numbered from `first_step`. Raises FloatingPointError before an update whose
    gradient is infinite or NaN.
    """
    for step, batch in enumerate(batches, start=first_step):  # 1. Take m rows.
        began = time.perf_counter()
        metrics = metrics_of(*kto_step(policy, reference, batch, **settings))  # Steps 2 to 5.

        # 6. Update: the gradient is first clipped to a norm of 10 (Table 1).
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=10.0).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step}: the gradient's norm is {norm}: start anew with a lower lr"
            )
        optimizer.step()
        optimizer.zero_grad()
        yield {
            "step": step,
            **metrics,
            "grad_norm": norm,
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - began,  # on cuda the update may go on after this
        }


# ==== Part two: what a run needs besides. You may stop here: the method is complete.


class InputError(ValueError):
    """The user's input cannot be used: the message says what, where, what to do."""


@contextlib.contextmanager
def errors_about(what):
    """Turns an error of a library into an InputError that begins with `what`.

    The block holds little more than calls of libraries, on something that the user
    named. An error elsewhere stays what it is, so that a bug keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {error}") from error


@dataclasses.dataclass
class Config:
    """The settings of a run, each a flag. The defaults of batch_size, lr, beta and the
    lambdas are the paper's (§4.2), the others are ours."""

    model: str = "tiny"  # hub name or folder; "tiny" is a toy that is built and taught here
    data: str = str(Path(__file__).with_name("data_sample.jsonl"))  # JSONL file of feedback
    output: str | None = None  # folder for the result; if not given, kto-MODEL
    epochs: int = 3  # passes over the data
    batch_size: int = 32  # m, the rows of one step; 8 to 128 are useful
    micro_batch_size: int | None = None  # rows in one call; if not given, 8, and on cuda what fits
    lr: float | None = None  # peak learning rate; if not given, 5e-6, and 5e-4 for "tiny"
    beta: float = 0.1  # a larger beta keeps the policy nearer the reference
    lambda_d: float = 1.0  # lambda_D, the weight of desirable rows (Eq. 9)
    lambda_u: float = 1.0  # lambda_U, the weight of undesirable rows (Eq. 9)
    max_prompt_length: int = 512  # tokens; a longer prompt loses its beginning
    max_completion_length: int = 512  # tokens; a longer completion loses its end
    holdout: float = 0.1  # share of the rows for evaluation; their prompts may be in training too
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto is cuda if there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if the card has it
    seed: int = 0  # decides the split, the order of the rows and the tiny model
    save_every: int = 0  # steps between checkpoints; there is one at the end of each epoch anyway
    resume: bool = False  # continue from the checkpoint in --output; start if there is none


def read_flags():
    """The Config of the command line, completed. --help prints the class above."""
    parser = transformers.HfArgumentParser(
        Config,
        description=inspect.getsource(Config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config = Config(**vars(parser.parse_args()))

    # Every number must be finite and at least 0, and some must be larger.
    least = {"batch_size": 2, "micro_batch_size": 1, "epochs": 1, "beta": 1e-3, "lr": 1e-9}
    least |= {"max_prompt_length": 1, "max_completion_length": 1}
    for name, value in vars(config).items():
        if isinstance(value, (int, float)) and not least.get(name, 0) <= value < math.inf:
            raise InputError(f"--{name} {value}: must be finite and {least.get(name, 0)} or more")

    config.output = Path(config.output or f"kto-{Path(config.model).name}")
    config.lr = config.lr or (5e-4 if config.model == "tiny" else 5e-6)
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto":  # older cards only emulate bfloat16, which is slower than float32
        config.dtype = "float32"
        if "cuda" in config.device and torch.cuda.is_bf16_supported(including_emulation=False):
            config.dtype = "bfloat16"
    return config


# ---- The data: a line of the file -> texts -> token ids -> batches ----------------

A_ROW = """A row is one whole line, and a line is one row: {"prompt": text or messages, \
"completion": text or [message], "label": true or false}. If the file is one array of rows, write \
each row on a line of its own, without brackets and commas around it. Write a preference pair as \
two rows."""

# These columns of a row, and keys of a message, are meant to change what is trained.
# This file cannot use them, so it refuses them. Other columns are ignored, and
# `describe` prints their names. Here systemprompt stands for system_prompt and
# systemPrompt too.
NOT_SUPPORTED = """
    system systemprompt systemmessage instruction instructions input context history
    documents tools functions toolcalls toolinvocations functioncall chattemplatekwargs
    thought thinking reasoning reasoningcontent reasoningdetails attachments
    image images imagepath imageurl imageurls video videos audio audios"""


def refuse_unsupported(fields):
    """Raises InputError if a row or a message has a key that must not be ignored, with
    a value that is not empty."""
    for key, value in fields.items():
        name = re.sub(r"[\W_]", "", key.lower())
        if name in NOT_SUPPORTED.split() and value:
            raise InputError(f"{key} is not used here: say it in the prompt, or delete it")


def parse_row(line):
    """One line of JSONL, as bytes -> a dict with prompt, completion and label, or
    InputError."""
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
        # This raises ValueError if a text has half of a surrogate pair, such as
        # "\ud800" alone, which no tokenizer takes.
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text, so unpack or convert the file: {error}") from error
    except (ValueError, RecursionError) as error:
        what = str(error).replace("line 1 column", "column")  # json knows only this one line
        raise InputError(f"not one row of JSON: {what}") from error

    if not isinstance(row, dict):
        raise InputError(f"not a JSON object: {row!r:.80}")
    for key in ("prompt", "completion", "label"):
        if key not in row:
            raise InputError(f"no {key} among its keys {list(row)!r:.200}")
    if row["label"] not in (0, 1):  # false and true are equal to 0 and 1
        raise InputError(f"label is {row['label']!r:.80}; write true or false, without quotes")
    refuse_unsupported(row)
    return row


def as_messages(value, role, special):
    """Returns messages: a text becomes one message, a list stays as it is.

    Raises InputError if this cannot be, or if `special`, the pattern that
    `special_tokens` returns, is found in a text.
    """
    if not isinstance(value, (str, list)) or not value:
        raise InputError(
            f"prompt and completion must be texts or messages, not empty: {value!r:.80}"
        )
    if isinstance(value, str):
        # Python, pandas or numpy may have printed a message, or a list of them, as text.
        a_list = r"(array\()?\[\s*\{\s*[\"'](role|content|from)\b"
        a_message = r"\{\s*[\"']role[\"']\s*:\s*[\"']\w+[\"']\s*,\s*[\"']content\b"
        if re.match(f"\\s*({a_list}|{a_message})", value):
            raise InputError(f"messages must be a list, and not the text of one: {value!r:.80}")
        value = [{"role": role, "content": value}]
    for message in value:
        if not isinstance(message, dict):
            raise InputError(f"a message must have a role and a content: {message!r:.80}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"the {key} of a message must be a text: {message!r:.80}")
        if message["role"] not in ("system", "developer", "user", "assistant", "tool"):
            raise InputError(
                f"unknown role {message['role']!r:.80}: take for example user or assistant"
            )
        refuse_unsupported(message)
        found = special.search(message["content"])
        if found:
            raise InputError(
                f"{found[0]!r} is a special token or a template's tag: delete or change it, and "
                "write texts as a person reads them"
            )
    return value


def special_tokens(tokenizer):
    """A pattern that finds what does not belong in a text, such as EOS, <|im_start|>
    and [INST]."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # A text may have been rendered for another model. Therefore the tags of other
    # models are found too. The wide bar is that of DeepSeek. </s> counts only at the
    # end of a text, because elsewhere it may be a tag of HTML.
    of_others = (
        r"<[|｜][^|｜<>\s]{2,}[|｜]>|<\|turn>|<turn\|>|<(?:start|end)_of_(?:turn|utterance)>",
        r"<eos>|</s>\s*$|\[/?INST\]|<</?SYS>>",
    )
    return re.compile("|".join([*of_others, *map(re.escape, tokens)]))


def render(row, tokenizer, special):
    """A row as the model sees it: {"prompt", "completion", "goes_on"}, three texts.

    goes_on is what the template writes after the prompt when it asks for an answer, and
    what is not counted to the prompt here. Either the template leaves it out when an
    answer follows, or the answer of this row begins with it. It is usually empty; with
    some reasoning models it is <think>.

    Without a chat template, the texts of the row stay as they are, and nothing is
    put between prompt and completion. With one, see `render_chat`. `special` is the
    pattern of `special_tokens`. Raises InputError if the row cannot be rendered.
    """
    messages = as_messages(row["prompt"], "user", special)
    answer = as_messages(row["completion"], "assistant", special)
    if len(answer) != 1 or answer[0]["role"] != "assistant" or not answer[0]["content"].strip():
        raise InputError(
            "completion must be a text or one message of the assistant, not blank; "
            "the messages before it belong to the prompt"
        )
    if messages[-1]["role"] == "assistant":
        raise InputError(
            "prompt ends with a message of the assistant: move its text to the completion"
        )
    if tokenizer.chat_template is not None:
        return render_chat(messages, answer, tokenizer, special)
    if isinstance(row["prompt"], list) or isinstance(row["completion"], list):
        raise InputError("messages need a chat template, and this tokenizer has none")
    return {"prompt": row["prompt"], "completion": row["completion"], "goes_on": ""}


def render_chat(messages, answer, tokenizer, special):
    """The three texts of `render`, from the tokenizer's chat template.

    Two renderings are made: `asked` is the chat that waits for an answer, `answered`
    is the chat with the answer. The prompt is the beginning that both have in common,
    at most up to the answer's own text. The completion is the rest of `answered`, and
    goes_on is the rest of `asked`. For example, some templates of reasoning models
    end `asked` with <think>, which `answered` lacks, and then goes_on is <think>.

    Raises InputError if the template loses or changes a text, writes text after the
    answer, or writes something before an answer that brings its own <think> block.
    """
    with errors_about("the chat template cannot render it"):
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages + answer, tokenize=False)

    def bare(text):  # without special tokens and white space, as both may be added or changed
        return "".join(special.sub("", text).split())

    # After the answer's own text, only special tokens and white space may follow.
    bare_chat, bare_answer = bare(answered), bare(answer[0]["content"])
    if not bare_chat.endswith(bare_answer):
        raise InputError(
            f"the chat template changes the completion, or writes text after it: {answered[-80:]!r}"
        )

    # The prompt is the longest common beginning of both, but it must end before the
    # answer's own text. For example, where `asked` ends with <think> and the answer
    # begins with <think>, the common beginning would take the answer's <think>.
    before_answer = len(bare_chat) - len(bare_answer)  # bare letters before the answer
    prompt = asked
    while not answered.startswith(prompt) or len(bare(prompt)) > before_answer:
        prompt = prompt[:-1]

    bare_prompt = bare(prompt)
    for message in messages:
        if bare(message["content"]) not in bare_prompt:
            raise InputError(
                f"the chat template loses or changes this message: {message!r:.80}; write it as "
                "the template would, for example an earlier answer without its thought, or the "
                "text of a system message in a message of the user"
            )
    completion = answered[len(prompt) :].rstrip()  # no newline after the end token
    # Some templates write an empty thought before an answer that has none. It is
    # accepted, and trained as part of the completion. But before an answer that
    # brings its own thought it would be a second one.
    if "<think>" in bare_answer and bare(completion) != bare_answer:
        raise InputError(
            "the chat template writes something before the thought of the completion: "
            f"{completion[:80]!r}; leave the thought out, or take another template"
        )
    return {"prompt": prompt, "completion": completion, "goes_on": asked[len(prompt) :]}


def read_rows(path, tokenizer):
    """Stream the rows of a JSONL file as texts. Raises InputError with FILE:LINE."""
    special = special_tokens(tokenizer)
    count = 0
    # The file is read as bytes: as text, a line would also end at a lone \r, and the
    # numbers of the lines would be wrong.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = parse_row(line)
                texts = render(row, tokenizer, special)
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}. {A_ROW}") from error

            # `describe` needs two facts: the names of the columns that are not used,
            # as one text, and whether the completion begins with the whole prompt.
            not_used = row.keys() - {"prompt", "completion", "label"}
            beginning = row["completion"][: len(row["prompt"])]
            facts = {"not_used": "\n".join(not_used), "repeats": beginning == row["prompt"]}
            yield texts | facts | {"label": bool(row["label"]), "line": number}
            count += 1
    if count == 0:
        raise InputError(f"{path} has no rows. {A_ROW}")


def tokenise(texts, tokenizer):
    """Token ids of many rows: x is each prompt, joined is each prompt with its
    completion.

    One call with many texts is faster than many calls.
    """
    both = [prompt + answer for prompt, answer in zip(texts["prompt"], texts["completion"])]
    is_plain = tokenizer.chat_template is None  # a chat template writes BOS by itself
    return {
        "x": tokenizer(texts["prompt"], add_special_tokens=is_plain).input_ids,
        "joined": tokenizer(both, add_special_tokens=is_plain).input_ids,
    }


def split_ids(row, tokenizer, place):
    """Split the token ids of a row into those of prompt and completion: (x, y, goes_on).

    `row` has the texts of `render` and the ids of `tokenise`. `place` is for the
    InputError that is raised if prompt or completion has no token, or if they cannot
    be split.
    """
    x, joined, goes_on = row["x"], row["joined"], row["goes_on"]
    if tokenizer.chat_template is None and x[-1:] == [tokenizer.eos_token_id]:
        x = x[:-1]  # some tokenizers end every text with EOS; after y it is welcome

    # Usually the ids of the joined text begin with x, and y is the rest of them. (y
    # is not tokenised alone, because some tokenizers put a space before a text that
    # stands alone.) It is not so if a token of the joined text lies across the
    # border of prompt and completion. Then there are two cases.
    #
    # The first case: goes_on is not empty. At inference the model reads x and then
    # goes_on, and the border between these two is ours to choose. So the last tokens
    # of x move to goes_on until the joined ids begin with x. For example, where
    # `asked` goes on with <think> and `answered` with </think>, what both have in
    # common ends with a lone "<", which is only a part of a token of `joined`.
    while goes_on and joined[: len(x)] != x:
        goes_on = tokenizer.decode(x[-1:]) + goes_on
        x = x[:-1]

    if joined[: len(x)] == x:
        y = joined[len(x) :]
    else:
        # The second case: goes_on is empty. At inference the model reads exactly x,
        # so that x must stay, and y is tokenised alone after all. If this changes
        # the text, the row is refused.
        y = tokenizer(row["completion"], add_special_tokens=False).input_ids
        apart = tokenizer.decode(x + y, skip_special_tokens=True)
        if apart != tokenizer.decode(joined, skip_special_tokens=True):
            raise InputError(
                f"{place}: the tokenizer changes the text between prompt and completion, "
                "usually because it adds a space: move a space "
                "at the end of the prompt to the completion, or begin the completion with one"
            )
    if not x or not y:
        raise InputError(f"{place}: prompt or completion becomes no token")
    return x, y, goes_on


def closed(y, tokenizer):
    """The ids y of a completion, with an end token.

    Most chat templates close an answer with a special token. A token is special if
    `skip_special_tokens` removes it. If the last token is not EOS already, EOS is added
    in three cases: there is no template, the last token is not special, or it only
    stands for unknown letters.
    """
    last, eos = y[-1:], [tokenizer.eos_token_id]
    is_plain = tokenizer.chat_template is None
    is_text = tokenizer.decode(last) == tokenizer.decode(last, skip_special_tokens=True)
    is_unknown = last == [tokenizer.unk_token_id]
    if last != eos and (is_plain or is_text or is_unknown):
        return y + eos
    return y


def encode(row, tokenizer, config):
    """Turn one row, with the texts of `render` and the ids of `tokenise`, into token
    ids and facts, or raise InputError.

    The ids are those of the prompt, and those of the completion with an end token.
    Both are cut to their maximal lengths. The facts are the two lengths before the
    cut, the end token, the highest id, goes_on, and a digest of all but the label, by
    which equal answers to equal prompts are found.
    """
    x, y, goes_on = split_ids(row, tokenizer, f"{config.data}:{row['line']}")
    y = closed(y, tokenizer)
    encoded = {
        "prompt": x[-config.max_prompt_length :],
        "completion": y[: config.max_completion_length],
        "prompt_tokens": len(x),
        "completion_tokens": len(y),
        "end_token": y[-1],
        "highest_id": max(x + y),
        "goes_on": goes_on,
    }
    encoded["digest"] = hashlib.sha256(str(encoded).encode()).hexdigest()
    return encoded


def load_rows(config, tokenizer, folder):
    """The rows of --data as token ids, and facts about each: a datasets.Dataset, on
    disk in `folder`.

    The folder must be new. In a used one, the cache of `datasets` could return older
    rows.
    """
    source = {"path": config.data, "tokenizer": tokenizer}
    try:
        texts = datasets.Dataset.from_generator(read_rows, cache_dir=folder, gen_kwargs=source)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__  # what went wrong in read_rows

    settings = {"tokenizer": tokenizer}
    with errors_about(f"--model {config.model}: its tokenizer cannot encode --data"):
        rows = texts.map(tokenise, batched=True, fn_kwargs=settings)

    # What `encode` returns replaces prompt, completion and goes_on, and is added to
    # the other columns.
    settings["config"] = config
    return rows.map(encode, fn_kwargs=settings, remove_columns=["x", "joined"])


def training_batches(rows, config, first_step):
    """Stream the full batches of all epochs from `first_step` on, each epoch in a
    new order."""
    m = config.batch_size
    per_epoch = len(rows) // m
    for step in range(first_step, config.epochs * per_epoch):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first_step:
            shuffled = rows.shuffle(seed=config.seed + epoch)
        yield shuffled[place * m : place * m + m]


def describe(facts, training, held_out, tokenizer, config):
    """Print what will be trained: counts, what is cut or not used, a row as the
    model sees it.

    `facts` is a pandas table with a line for each row of the file, those that are
    held out included.
    """
    n_d = sum(training["label"])
    n_u = len(training) - n_d
    steps, left_over = divmod(len(training), config.batch_size)
    print(f"rows     n_D = {n_d} desirable and n_U = {n_u} undesirable rows to train on")
    print(f"         {len(held_out)} rows held out, {sum(held_out['label'])} of them desirable")
    print(f"steps    {steps} an epoch; {left_over} rows are left over in each")

    has_both_labels = facts.groupby("digest").label.nunique() == 2
    print(f"labels   {has_both_labels.sum()} answers have both labels")
    print(f"         {facts.repeats.sum()} completions begin with their whole prompt")
    not_used = sorted(set("\n".join(facts.not_used).split("\n")) - {""}) or ["none"]
    print(f"columns  not used: {', '.join(not_used)}")

    cut_x = facts.prompt_tokens > config.max_prompt_length
    cut_y = facts.completion_tokens > config.max_completion_length
    print(f"cut      {cut_x.sum()} prompts lose their beginning (BOS, system messages)")
    print(f"         {cut_y.sum()} completions lose their end (see --max_completion_length)")
    if cut_y.mean() > 0.5:
        print("WARNING  most completions are cut, so that the model does not learn to end")

    weight_d, weight_u = config.lambda_d * n_d, config.lambda_u * n_u
    if weight_d * weight_u == 0:
        print("WARNING  a class has no rows or no weight: KTO only imitates, or only unlearns")
    else:
        print(f"balance  lambda_D n_D / (lambda_U n_U) = {weight_d / weight_u:.3g}; Eq. 9 wants")
        print(f"         1 to 1.5: --lambda_d {weight_u / n_d:.4g} to {1.5 * weight_u / n_d:.4g}")

    row = training[0]
    template = "without a" if tokenizer.chat_template is None else "with the tokenizer's"
    print(f"a row    as the model sees it, {template} chat template:")
    print(f"  prompt      {tokenizer.decode(row['prompt'])!r}")
    print(f"  completion  {tokenizer.decode(row['completion'])!r}")
    if row["goes_on"]:
        print(f"  At inference, the prompt goes on with {row['goes_on']!r}.")


# ---- The models -------------------------------------------------------------------


def tiny_model(config, tokenizer, training):
    """A toy: a small Llama, taught the undesirable rows and every fifth row.

    In the sample, the desirable completions are polite. So the toy finds most polite
    words unlikely. At first, KTO makes them likelier after any prompt, so also in the
    mismatched pairs, and one can see z0 rise.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)  # more threads would only wait for each other at this size
    settings = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = transformers.LlamaForCausalLM(settings)
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
    """The tokenizer of --model, which must have an end token; InputError if not."""
    if config.model == "tiny":  # a small one, trained on the raw JSON lines of the data
        lines = Path(config.data).read_text("utf-8", "replace").splitlines()
        with errors_about("--model tiny needs transformers 5"):
            empty = transformers.GPT2Tokenizer(eos_token="<|end|>")
        return empty.train_new_from_iterator(lines, vocab_size=2048, show_progress=False)
    with errors_about(f"--model {config.model} (offline? give a folder)"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {config.model}: its tokenizer has no EOS token; give it one")
    return tokenizer


def load_model(config, tokenizer, training, facts, dtype=torch.float32):
    """The causal model --model, whose generation config gets the end tokens of all rows,
    which are in `facts`. InputError if weights or embeddings are missing.

    `training`, the rows to train on, is for the tiny model only. `dtype` is that of the
    weights; --dtype is that of the forward passes. The README's script for LoRA asks for
    bfloat16 here, because it does not train these weights.
    """
    if config.model == "tiny":
        return tiny_model(config, tokenizer, training)
    name = f"--model {config.model}"
    with errors_about(name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=dtype, output_loading_info=True
        )
    # From the folder of an adapter, transformers loads a model whose weights are all
    # frozen.
    if model.num_parameters(only_trainable=True) == 0:
        raise InputError(f"{name} is an adapter: merge it first, as the README does")
    if info["missing_keys"]:
        raise InputError(f"{name} lacks the weights {sorted(info['missing_keys'])}")
    if facts.highest_id.max() >= model.get_input_embeddings().num_embeddings:
        raise InputError(f"{name} has fewer embeddings than its tokenizer has ids")

    # A base model with a chat template learns an end token that is not its own. Its
    # generation config must know this token, so that answers stop there.
    generation = model.generation_config
    known = generation.eos_token_id
    if not isinstance(known, list):
        known = [known]
    ends = {*known, *facts.end_token} - {None}
    if ends != set(known):
        generation.eos_token_id = sorted(ends)
        # Some generation configs have a fault. Once such a config has been changed,
        # transformers refuses to save it. The user must know it now, and not after
        # the training.
        with errors_about(f"{name}: mend its generation_config.json, or delete it"):
            generation.validate(strict=True)
    return model


def check_model(model, x, y, config):
    """Raises InputError if the longest prompt x with the longest completion y is too long
    for the model, if log-probabilities are not finite, or if the model is not causal.

    Its weights must be in float32: the comparison below is too fine for bfloat16.
    """
    # `show_answers` writes up to 64 tokens. The few tokens of goes_on are neglected.
    length = len(x) + max(len(y), 64)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise InputError(
            f"--model takes {limit} tokens, not {length}: "
            "lower --max_prompt_length or --max_completion_length"
        )

    # completion_logps uses no mask, because padding on the right makes no difference
    # to a causal model. Here the first token of y is scored alone, and then in a
    # batch that pads it. This runs before `two_models` sets up bfloat16, which would
    # round differently for other lengths.
    alone = score(model, [x], [y[:1]], 1)
    padded = score(model, [x, x], [y[:1], y], 2)
    if not padded.isfinite().all():
        raise InputError(f"--model {config.model}: its log-probabilities are infinite or NaN")
    if not torch.allclose(alone, padded[:1], atol=1e-3):
        raise InputError(f"--model {config.model} is not causal: it looks to the right")


def two_models(policy, config):
    """(policy, reference): the model and its frozen copy, with forward passes in
    --dtype."""
    reference = copy.deepcopy(policy).requires_grad_(False)

    # bfloat16 is for the forward passes; weights stay float32, so that small updates
    # are not lost. autocast is set up after the copy: a copy of a wrapped forward
    # would still call the policy.
    if config.dtype == "bfloat16":
        for model in (policy, reference):
            model.forward = torch.autocast(model.device.type, torch.bfloat16)(model.forward)
    return policy, reference


def load_models(config, tokenizer, training, facts, x, y):
    """(policy, reference) of --model, checked with the longest prompt x and the
    longest completion y."""
    model = load_model(config, tokenizer, training, facts)
    with errors_about(f"--device {config.device}"):
        model.to(config.device).eval()  # eval mode: no dropout, which would be noise in r
    check_model(model, x, y, config)
    return two_models(model, config)


def rehearse(policy, reference, x, y, config):
    """Try the step that needs the most memory, and return the micro_batch_size that
    fits into memory.

    `x` is the longest prompt and `y` is the longest completion. The first size that is
    tried is --micro_batch_size. If it is not given, it is the whole batch on cuda, and 8
    elsewhere. On cuda it is halved until a step fits. This changes no result but for
    rounding, because z0 and the loss are means over all rows of a batch. Raises
    InputError if not even one row fits.
    """
    default = config.batch_size if "cuda" in config.device else 8
    size = min(config.micro_batch_size or default, config.batch_size)
    # AdamW will need two numbers for each trained weight. Their place is held until
    # the function returns.
    trained = policy.num_parameters(only_trainable=True)
    _reserved = torch.empty(2, trained, device=policy.device)
    while True:
        # Try two micro-batches if a batch has more than one: during the second, the
        # gradients of the first are in memory already.
        m = min(2 * size, config.batch_size)
        batch = {"prompt": [x] * m, "completion": [y] * m, "label": [True] * m}
        try:
            kto_step(policy, reference, batch, size)
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise InputError(
                    f"out of memory with one row of {len(x + y)} tokens: "
                    "lower --max_prompt_length and --max_completion_length, or take a smaller model"
                ) from None
        finally:
            policy.zero_grad()
        torch.cuda.empty_cache()
        size //= 2


# ---- The run ----------------------------------------------------------------------


def decisive_settings(config, facts, policy):
    """The settings that decide the result of a run, and digests of its rows and of the
    policy's first weights, which stand for --data and --model. A resumed run must have
    the same. All other settings change the result by rounding at most."""
    names = """epochs batch_size lr beta lambda_d lambda_u max_prompt_length
        max_completion_length holdout dtype seed"""
    rows = hashlib.sha256(facts[["digest", "label"]].to_csv().encode()).hexdigest()
    weights = sum(torch.hash_tensor(weight.cpu()).item() for weight in policy.parameters())
    settings = {name: getattr(config, name) for name in names.split()}
    return settings | {"rows": rows, "weights": weights}


def save_checkpoint(path, parts, **others):
    """Save the state of each part, and the values of `others`.

    The file is written under another name first, so that a broken one replaces no
    good one.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_suffix(".partial")
    with errors_about(f"{partial} cannot be written, perhaps because the disk is full"):
        torch.save(state | others, partial)
        partial.replace(path)


def load_checkpoint(path, parts, decisive):
    """Restore the states of `parts`. Returns the step, and the size of the log at
    that time. Raises InputError with the name of a decisive setting that differs."""
    with errors_about(f"--resume cannot read {path}"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        earlier = state["decisive"]
    for name, value in decisive.items():
        if earlier.get(name) == value:
            continue
        if name == "rows":
            raise InputError(
                "--resume: the rows are not the same: --data or the tokenizer has changed, "
                "or the chat template writes the date"
            )
        if name == "weights":
            raise InputError("--resume: the weights that --model has are not those of before")
        raise InputError(f"--resume: {name} was {earlier.get(name)}, and now it is {value}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["log"]


@torch.no_grad()
def evaluate(policy, reference, held_out, batch_size, **settings):
    """The metrics of the held-out rows, in batches like those of training."""
    steps = []
    for batch in held_out.iter(batch_size):
        if len(batch["label"]) > 1:  # a last batch of one row is left out
            steps.append(kto_step(policy, reference, batch, **settings))
    joined = [torch.cat(parts) for parts in zip(*steps)]  # losses, r, z0, kl, desirable
    metrics = metrics_of(*joined)
    return {f"eval_{name}": value for name, value in metrics.items()}


def note_signals():
    """From now on the first Ctrl-C or SIGTERM is only noted, in the list that is returned.
    A second one ends the process at once."""
    signals = []

    def note(number, frame):
        signals.append(number)
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # in "kto.py 2>&1 | tee FILE", Ctrl-C ends tee too
            os.write(2, b"\nThe run saves after this step and ends. A second signal ends it now.\n")

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, note)
    return signals


def start_or_resume(config, checkpoint, parts, decisive):
    """Load the checkpoint if the run resumes, and delete it if not.

    Returns the step to begin with, and the open log without the lines of later
    steps.
    """
    step, log_size = 0, 0
    if config.resume and checkpoint.exists():
        step, log_size = load_checkpoint(checkpoint, parts, decisive)
    else:
        checkpoint.unlink(missing_ok=True)  # it can only be that of a demo: see `check_places`
    config.output.mkdir(parents=True, exist_ok=True)
    log = open(config.output / "metrics.jsonl", "a", buffering=1)
    log.truncate(min(log.tell(), log_size))  # min: truncate would fill up a shorter log with zeros
    return step, log


def optimizer_and_schedule(policy, steps, config):
    """The paper names AdamW and the learning rate. That there is no weight decay is our
    choice, and so is the schedule: a tenth of the steps to warm up, then a cosine down to
    a tenth of this rate."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    schedule = transformers.get_scheduler(
        "cosine_warmup_with_min_lr", optimizer, steps // 10, steps, {"min_lr_rate": 0.1}
    )
    return optimizer, schedule


def run(policy, reference, training, held_out, config, decisive):
    """Train, with log, chart, evaluation, checkpoints and signals."""
    per_epoch = len(training) // config.batch_size
    steps = config.epochs * per_epoch

    optimizer, schedule = optimizer_and_schedule(policy, steps, config)
    parts = {"policy": policy, "optimizer": optimizer, "schedule": schedule}
    checkpoint = config.output / "checkpoint.pt"
    step, log = start_or_resume(config, checkpoint, parts, decisive)

    signals = note_signals()
    is_saved = step > 0  # whether a checkpoint of this very step exists
    is_epoch_end = is_saved and step % per_epoch == 0  # a run may resume at such an end
    names = ("beta", "lambda_d", "lambda_u", "micro_batch_size")
    settings = {name: getattr(config, name) for name in names}
    batches = training_batches(training, config, step)
    training_steps = train(policy, reference, batches, optimizer, step, **settings)
    # This is the heading of the lines that `chart` draws.
    print(f"\n  step  D, U: mean r of a class; z: z0; middle: 0; a dot: {0.1 / config.beta:g} nats")
    bar = tqdm(initial=step, total=steps, disable=None)
    # At the top of the loop, `step` steps are done. A signal may end the run only
    # where a checkpoint of this very step exists.
    while True:
        # The checkpoint of the epoch was saved before this evaluation. A run that
        # resumes from it cuts the log back to that moment and evaluates again, so that
        # the line is not there twice.
        if is_epoch_end and len(held_out) > 1 and not signals:
            metrics = evaluate(policy, reference, held_out, config.batch_size, **settings)
            print(json.dumps({"step": step, **metrics}), file=log)
            loss, accuracy = metrics["eval_loss"], metrics["eval_accuracy"]
            bar.write(f"held out: loss {loss:.3f}, accuracy {accuracy:.2f}")
        if is_saved and signals:
            raise SystemExit(128 + signals[0])
        if step == steps:
            break

        # The generator of part one does one step, and its metrics go to the log.
        # metrics["step"] is the number of steps before this one, since the metrics
        # were measured before its update.
        metrics = next(training_steps)
        schedule.step()
        step += 1
        print(json.dumps(metrics), file=log)

        # If nothing is saved here, a later signal waits for the next step.
        is_epoch_end = step % per_epoch == 0
        is_due = config.save_every > 0 and step % config.save_every == 0
        is_saved = bool(signals) or is_epoch_end or is_due
        if is_saved:
            save_checkpoint(checkpoint, parts, step=step, log=log.tell(), decisive=decisive)

        # This is shown after the checkpoint is saved, because it fails if the program
        # that reads it, such as tee, has ended.
        bar.update()
        bar.set_postfix({name: metrics[name] for name in ("loss", "z0", "margin")})
        if metrics["step"] % math.ceil(steps / 16) == 0:
            bar.write(chart(metrics, config.beta))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here a signal ends it at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def chart(metrics, beta):
    """A line of the chart, an axis of r with 0 in the middle, on which one place is
    0.1 / beta nats: D and U, the mean of each class, and z, which is z0.

    In the same place D covers U, and U covers z. What lies beyond an end of the axis
    is drawn at this end.
    """
    marks = {"z": "z0", "U": "reward_undesirable", "D": "reward_desirable"}
    line = ["."] * 71
    for mark, name in marks.items():
        if metrics[name] is not None:
            line[min(max(35 + round(10 * beta * metrics[name]), 0), 70)] = mark
    return f"{metrics['step']:6} {''.join(line)}"


def check_places(config):
    """InputError if the data file is missing, if the output folder is in use, or if
    there are several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("one process, please: the README says how to use several GPUs")
    if not Path(config.data).exists():
        raise InputError(
            f"--data {config.data}: no such file. For a set on the hub write one: "
            "datasets.load_dataset(NAME, split='train').to_json(FILE)"
        )
    if (config.model, config.output.name) == ("tiny", "kto-tiny"):
        return  # the demo may be run again and again

    # A folder with a checkpoint holds a run that has not ended, so it may go on. A
    # run that was stopped before its first checkpoint leaves only metrics.jsonl, so it
    # may start again with --resume. A finished run leaves a model with files that end
    # with .json, which must not be overwritten.
    if config.resume and (config.output / "checkpoint.pt").exists():
        return
    if any(config.output.glob("*.json" if config.resume else "*")):
        raise InputError(
            f"{config.output} is in use: name another or delete it; "
            "only a run that has not ended goes on with --resume"
        )


def show_answers(policy, reference, tokenizer, rows):
    """Print greedy answers to the prompts of some rows, before and after the
    training."""
    for prompt, goes_on in zip(rows["prompt"], rows["goes_on"]):
        print("\n" + tokenizer.decode(prompt, skip_special_tokens=True))
        asked = prompt + tokenizer(goes_on, add_special_tokens=False).input_ids
        ids = torch.tensor([asked], device=policy.device)
        mask = torch.ones_like(ids)  # without one, tokens like the padding would be left out
        for name, model in (("before", reference), ("after", policy)):
            generated = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
            answer = tokenizer.decode(generated[0, len(asked) :], skip_special_tokens=True)
            print(f"  {name:6} {answer.strip()}")


def main(models):
    """A run, from the flags to the answers.

    `models` is a function that takes what `load_models` takes, and returns policy
    and reference. The README has another one, for LoRA.
    """
    config = read_flags()
    check_places(config)
    tokenizer = load_tokenizer(config)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = load_rows(config, tokenizer, folder)
        facts = rows.remove_columns(["prompt", "completion"]).to_pandas()
        count = math.ceil(len(rows) * config.holdout)
        if len(rows) - count < config.batch_size:
            raise InputError(
                f"--data has {len(rows)} rows and {count} are held out; the rest is less than "
                f"one batch: lower --batch_size {config.batch_size} or --holdout"
            )
        shuffled = rows.shuffle(seed=config.seed)
        training, held_out = shuffled.skip(count), shuffled.take(count)
        describe(facts, training, held_out, tokenizer, config)

        # x is the longest prompt and y the longest completion, after they were cut.
        # They are usually of two rows, but may meet as a mismatched pair.
        x = rows[facts.prompt_tokens.argmax()]["prompt"]
        y = rows[facts.completion_tokens.argmax()]["completion"]
        policy, reference = models(config, tokenizer, training, facts, x, y)
        config.micro_batch_size = rehearse(policy, reference, x, y, config)
        print(f"model    {config.model}, {policy.num_parameters():,} weights, {config.dtype}")
        print(f"memory   {config.micro_batch_size} rows fit, the longest were tried")

        decisive = decisive_settings(config, facts, policy)
        checkpoint = config.output / "checkpoint.pt"
        try:
            run(policy, reference, training, held_out, config, decisive)
            with errors_about(f"--output {config.output} cannot be written"):
                policy.save_pretrained(config.output)
                tokenizer.save_pretrained(config.output)
            checkpoint.unlink()
            print(f"\nThe result is saved in {config.output}.")
        finally:  # also if the run was stopped, or ends with an error
            if checkpoint.exists():
                print(f"\nThe last checkpoint is {checkpoint}. Unless an error below says")
                print("otherwise, the same command with --resume goes on from there.")
        show_answers(policy, reference, tokenizer, held_out[:3])


def command(models=load_models):
    """`main` as a command: an error that the user can mend is printed without a
    traceback."""
    sys.stdout.reconfigure(errors="replace")  # for consoles that lack a character
    try:
        main(models)
    except (InputError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    command()
