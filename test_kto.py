# SPDX-License-Identifier: MIT-0
"""Why kto.py is right: each test is a claim, in the order of the file. Offline, on a CPU.

  pytest                  the claims; a few need TRL, or a chat model's folder in KTO_TEST_MODEL
  python test_kto.py      the paper in miniature: KTO beside DPO and SFT, four minutes
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import numpy
import pytest
import tokenizers
import torch
import transformers
from torch import tensor
from torch.testing import assert_close
from tqdm import tqdm

import kto

torch.set_num_threads(1)  # which is faster for models as small as these
gc.freeze()  # no search for garbage in what was imported: a tenth of the time

# ---- Set-up of many tests ------------------------------------------------------------------------

def random_model(architecture="llama", std=0.5, **settings):
    """Two layers, 300 tokens, EOS = pad = 0. Every weight is large, so that every mistake shows."""
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
             "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(architecture, **small | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data.zero_()
    return add_noise(model, std, seed=0)

def add_noise(model, std, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += std * torch.randn(weight.shape, generator=generator)
    return model

def byte_tokenizer(template=None, adds_bos=False, pad="<pad>", eos="</s>"):
    """One token for a byte, and five special ones, so that decoded text shows every token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: number for number, byte in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"])
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=pad,
        chat_template=template)

CHATML = (  # the end token is not EOS, and a newline follows it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def write_rows(path, rows):
    """Write `rows` of (prompt, completion, label) as JSONL; returns the path as text."""
    keys = ("prompt", "completion", "label")
    path.write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    return str(path)

# ---- The loss and the reference point ------------------------------------------------------------

def desirable(letters):
    """"DUU" is one desirable row, then two undesirable ones: a bool tensor."""
    return tensor([letter == "D" for letter in letters])

def test_three_rows_worked_by_hand():
    # The mismatched pairs differ by 4, -1 and 0 nats: z0 = 3 / 3 = 1. (Clamped one by one: 4 / 3.)
    policy_next, reference_next = tensor([-6.0, -9.0, -7.0]), tensor([-10.0, -8.0, -7.0])
    z0 = kto.reference_point(policy_next, reference_next)
    assert z0 == 1

    # With beta = 1/2, beta (r - z0) is ln 3, ln 3 and 0. We know sigmoid(ln 3) = 3/4,
    # sigmoid(-ln 3) = 1/4 and sigmoid(0) = 1/2. With lambda_d = 2 and lambda_u = 4:
    #   D    v = 2 * 3/4    loss = 2 - 3/2 = 1/2    slope = -2 * 1/2 * 3/4 * 1/4 = -3/16
    #   U    v = 4 * 1/4    loss = 4 - 1   = 3      slope = +4 * 1/2 * 1/4 * 3/4 = +3/8
    #   D    v = 2 * 1/2    loss = 2 - 1   = 1      slope = -2 * 1/2 * 1/2 * 1/2 = -1/4
    ln_3 = math.log(3)
    r = tensor([1 + 2 * ln_3, 1 + 2 * ln_3, 1.0], requires_grad=True)
    losses = kto.kto_loss(r, torch.zeros(3), z0, desirable("DUD"), 0.5, 2.0, 4.0)
    losses.sum().backward()
    assert_close(losses, tensor([0.5, 3.0, 1.0]))
    assert_close(r.grad, tensor([-3 / 16, 3 / 8, -1 / 4]))

# The code of the paper's authors: ContextualAI/HALOs, commit 4831988, KTOTrainer.loss in
# train/trainers.py, run unchanged in float32 with torch 2.13.0 on a CPU. Four batches of log-probs
# and labels went in; z0, losses and the gradient of the mean loss came out. D: 1 if desirable.
HALOS = [
    # z0, (beta, lambda_d, lambda_u)
    (0.969537, (0.1, 1.0, 1.7), """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
         -36.1593   -34.8083  -245.7608  -247.9992   1  0.557755 -0.00493329
        -102.7383  -102.3106  -260.3434  -261.0626   0  0.790714  0.00845865
        -205.8741  -202.1323  -252.5092  -249.5890   1  0.615652 -0.00473249
         -35.9153   -38.6803  -279.9997  -281.2710   0  0.926103  0.00843186
        -122.1140  -121.7887  -233.3775  -236.9165   0  0.795046  0.00846447"""),
    # The raw KL is -4.2.
    (0.0, (0.1, 1.4, 1.0), """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
        -186.3869  -180.5016   -92.3519   -87.9203   0  0.356972  0.00459086
         -42.3944   -37.5244  -202.7547  -195.5823   1  0.867159 -0.00660083
         -64.1773   -53.7609   -85.3548   -75.5255   1  1.034833 -0.00539839
         -73.0085   -72.6348  -165.0435  -167.6018   0  0.490659  0.00499826
        -188.7975  -181.9478  -237.4356  -235.1268   1  0.930786 -0.00623911"""),
    (21.644724, (0.05, 13.33, 1.0), """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
        -110.0761  -112.9572  -286.2141  -303.8955   0  0.281268  0.00336927
         -90.6101   -92.9806   -81.7758   -98.0912   0  0.276136  0.00333141
         -42.1689   -48.4457  -285.5660  -316.5034   1  9.106708 -0.04808739"""),
    (2.862381, (0.25, 1.0, 1.0), """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
         -45.5757   -36.4654  -303.5955  -305.5703   0  0.047735  0.00284105
         -82.2280   -73.4197  -230.3614  -237.5157   0  0.051287  0.00304104
        -123.6518  -124.4447  -162.7621  -161.0788   0  0.373467  0.01462434
        -120.4360  -128.5651  -160.9534  -164.9571   0  0.788629  0.01041834"""),
]

@pytest.mark.parametrize("z0, weights, table", HALOS, ids=range(4))
def test_value_and_gradient_are_those_of_the_papers_authors(z0, weights, table):
    columns = tensor(numpy.loadtxt(table.splitlines())).T
    policy, reference, policy_next, reference_next, labels, losses, gradient = columns
    policy.requires_grad_()
    policy_next.requires_grad_()

    def loss_of(policy):
        z0 = kto.reference_point(policy_next, reference_next)
        return kto.kto_loss(policy, reference, z0, labels == 1, *weights)

    loss_of(policy).mean().backward()
    assert policy_next.grad is None  # z0 is a constant

    # As near as their float32, here rounded, allows.
    assert kto.reference_point(policy_next, reference_next).item() == pytest.approx(z0, abs=1e-5)
    assert_close(loss_of(policy), losses, rtol=2e-6, atol=1e-6)
    assert_close(policy.grad, gradient, rtol=2e-6, atol=1e-8)

def test_a_row_far_from_z0_is_finite_and_has_no_gradient():  # Proposition 4.1
    r = tensor([1e4, -1e30, 1e30, -1e4], requires_grad=True)
    losses = kto.kto_loss(r, torch.zeros(4), 5.0, desirable("DDUU"))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert not r.grad.any()

def test_a_label_that_is_not_bool_is_refused():
    with pytest.raises(RuntimeError, match="bool"):
        kto.kto_loss(torch.zeros(2), torch.zeros(2), 0.0, tensor([1, 0]))

# ---- Scoring -------------------------------------------------------------------------------------

# Five rows, one token for each letter. "!" is token 0, which to the models is EOS and padding.
TEXTS = {
    "prompt": ["abc", "k", "wonder", "a!b", "zz"],
    "completion": ["no!</s>", "perhaps!</s>", "!</s>", "y!e!</s>", "quite</s>"],
}
PROMPTS = byte_tokenizer()(TEXTS["prompt"])["input_ids"]
COMPLETIONS = byte_tokenizer()(TEXTS["completion"])["input_ids"]

ARCHITECTURES = """
    bloom cohere falcon gemma2 gemma3_text gpt2 gpt_neox gpt_oss granite llama
    mamba mistral mixtral olmo2 opt phi phi3 qwen2 qwen3 stablelm
"""
PECULIAR = {  # sizes that some need, a window shorter than the rows, factors behind the head
    "ffn_dim": 48,
    "final_logit_softcapping": 5.0,
    "logit_scale": 0.25,
    "logits_scaling": 8.0,
    "num_local_experts": 4,
    "sliding_window": 4,
    "word_embed_proj_dim": 32,
}

def plain_logps(model, prompts, completions):
    """log pi(y|x) of each row on its own: no batch, no padding, one token after the other."""
    logps = torch.zeros(len(prompts))
    for i, (x, y) in enumerate(zip(prompts, completions)):
        logits = model(tensor([x + y]), use_cache=False).logits[0].double()
        for position, token in enumerate(y, start=len(x)):
            logps[i] += logits[position - 1].log_softmax(dim=0)[token]
    return logps

@pytest.mark.parametrize("architecture", ARCHITECTURES.split())
def test_log_probs_of_a_ragged_batch_equal_those_of_each_row_alone(architecture):
    model = random_model(architecture, **PECULIAR)
    logps = kto.completion_logps(model, PROMPTS, COMPLETIONS)
    assert_close(logps, plain_logps(model, PROMPTS, COMPLETIONS), rtol=1e-5, atol=0)

def test_each_completion_token_is_scored_eos_too_and_no_other_position_reaches_the_head():
    # All weights are 0: each of the 300 tokens has probability 1/300, and a sum counts tokens.
    model, shapes = random_model(std=0.0), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: shapes.append(logits.shape))
    counts = kto.completion_logps(model, PROMPTS, COMPLETIONS) / -math.log(300)
    assert_close(counts, tensor([4.0, 9.0, 2.0, 5.0, 6.0]))
    assert shapes == [(4 + 9 + 2 + 5 + 6, 300)]

def test_log_probs_are_summed_in_float32_when_the_model_computes_in_bfloat16():
    # The sum is near -800, where bfloat16 knows only multiples of 4.
    model, y = random_model().bfloat16(), list(range(1, 121))
    logps = kto.completion_logps(model, [[5]], [y])
    assert_close(logps, plain_logps(model, [[5]], [y]), rtol=1e-6, atol=0)

def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        kto.completion_logps(None, [[5], []], COMPLETIONS[:2])
    with pytest.raises(ValueError, match="shorter"):
        kto.completion_logps(None, PROMPTS, COMPLETIONS[:4])

def test_rows_of_like_length_go_together_and_the_longest_come_first():
    # 1 + 5, 4 + 1, 1 + 8, 1 + 3 and 6 + 1 letters, which is 6, 5, 9, 4 and 7.
    prompts = "a aaaa a a aaaaaa".split()
    completions = "bbbbb b bbbbbbbb bbb b".split()
    parts = kto.micro_batches(prompts, completions, size=2)
    assert [index.tolist() for index, x, y in parts] == [[2, 4], [0, 1], [3]]

# ---- The step ------------------------------------------------------------------------------------

SETTINGS = {"beta": 0.3, "lambda_d": 1.4, "lambda_u": 0.7}

def batch_of(letters):
    return {"prompt": PROMPTS, "completion": COMPLETIONS, "label": desirable(letters).tolist()}

def policy_and_reference(raw_kl=1):
    """Two equal models, then noise on one. Exchanging them turns the sign of the raw KL."""
    policy, reference = random_model(std=0.3), random_model(std=0.3)
    add_noise(reference, std=0.1, seed=4)
    return (policy, reference) if raw_kl > 0 else (reference, policy)

def gradient_of(model):
    return [weight.grad for weight in model.parameters()]

def by_the_paper(r, z0, labels, beta, lambda_d, lambda_u):
    """Losses by Eq. 8, and the gradient of their mean by Eq. 10, in Python's own numbers."""
    rows = []
    for reward, is_desirable in zip(r, labels):
        weight, sign = (lambda_d, 1) if is_desirable else (lambda_u, -1)
        s = 1 / (1 + math.exp(-sign * beta * (reward - z0)))
        rows.append([weight - weight * s, -sign * weight * beta * s * (1 - s) / len(r)])
    return tensor(rows).T

def plain_step(policy, reference, letters):
    """What kto_step does, one row after the other."""
    next_completions = COMPLETIONS[1:] + COMPLETIONS[:1]
    ratios = plain_logps(policy, PROMPTS, next_completions)
    ratios -= plain_logps(reference, PROMPTS, next_completions)
    kl = ratios.mean().detach()
    z0 = max(tensor(0.0), kl)

    logps = plain_logps(policy, PROMPTS, COMPLETIONS)
    r = (logps - plain_logps(reference, PROMPTS, COMPLETIONS)).detach()
    labels = desirable(letters)
    losses, gradient = by_the_paper(r, z0, labels, **SETTINGS)
    logps.backward(gradient)

    good, bad = r[labels], r[~labels]
    right = (good > z0).sum() + (bad <= z0).sum()
    d = good.mean().item() if "D" in letters else None
    u = bad.mean().item() if "U" in letters else None
    return {
        "loss": losses.mean().item(),
        "accuracy": right.item() / 5,
        "z0": z0.item(),
        "kl": kl.item(),
        "reward_desirable": d,
        "reward_undesirable": u,
        "margin": d - u if letters == "DUUDU" else None,  # the batch with both classes
    }

@pytest.mark.parametrize("micro_batch_size, raw_kl, letters", [
    (1, 1, "DUUDU"),
    (3, 1, "DUUDU"),
    (8, -1, "DUUDU"),
    (3, 1, "DDDDD"),
    (8, 1, "UUUUU"),
])
def test_a_step_equals_the_plain_computation_whatever_the_micro_batch(
        micro_batch_size, raw_kl, letters):
    policy, reference = policy_and_reference(raw_kl)
    logged = kto.kto_step(policy, reference, batch_of(letters), **SETTINGS,
                          micro_batch_size=micro_batch_size)
    gradient = gradient_of(policy)
    policy.zero_grad()
    plain = plain_step(policy, reference, letters)
    assert plain["kl"] * raw_kl > 0
    assert_close(logged, plain, rtol=1e-5, atol=1e-5)
    assert_close(gradient, gradient_of(policy), rtol=1e-4, atol=1e-6)
    assert set(gradient_of(reference)) == {None}

def test_a_step_scores_no_pair_twice_with_a_model_and_no_more_rows_at_once_than_it_may(monkeypatch):
    learned, scored = [], []

    def spy(model, prompts, completions):
        assert len(prompts) <= 3
        pairs = learned if torch.is_grad_enabled() else scored
        pairs.extend(map("".join, zip(prompts, completions)))
        return torch.zeros(len(prompts), requires_grad=True)

    monkeypatch.setattr(kto, "completion_logps", spy)
    batch = {"prompt": "abcde", "completion": "ABCDE", "label": [True] * 5}  # a letter for a list
    kto.kto_step(random_model(), random_model(), batch, micro_batch_size=3)

    # Only the policy's own pairs are scored with a gradient. Without one, the reference scores
    # these too, and both models score the next row's.
    assert sorted(learned) == "aA bB cC dD eE".split()
    assert sorted(scored) == "aA aB aB bB bC bC cC cD cD dD dE dE eA eA eE".split()

def test_evaluation_gives_the_figures_of_a_step_and_leaves_no_gradient():
    policy, reference = policy_and_reference()
    batch = batch_of("DUUDU")
    with torch.no_grad():
        figures = kto.kto_step(policy, reference, batch, **SETTINGS)
    assert set(gradient_of(policy)) == {None}
    assert figures == kto.kto_step(policy, reference, batch, **SETTINGS)

# ---- The training loop ---------------------------------------------------------------------------

def adamw_and_schedule(model):
    """The learning rate rises to 0.004 in three steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    return optimizer, schedule

def test_training_is_a_plain_loop_of_step_clip_adamw_and_schedule():
    settings = {"beta": 0.3, "lambda_d": 30.0, "lambda_u": 15.0}
    batches = list(map(batch_of, ["DUUDU", "DDDDD", "UUUUU", "DUDUU"]))
    policy, reference = policy_and_reference()
    entries = kto.train(policy, reference, batches, *adamw_and_schedule(policy), 7, **settings)

    plain, _ = policy_and_reference()
    optimizer, schedule = adamw_and_schedule(plain)
    norms = []
    for step, batch, lr in zip([7, 8, 9, 10], batches, [0.001, 0.002, 0.003, 0.004]):
        entry = next(entries)
        optimizer.zero_grad()
        logged = kto.kto_step(plain, reference, batch, **settings)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 10.0).item()
        optimizer.step()
        schedule.step()

        assert entry.pop("seconds") > 0
        assert_close(entry, {"step": step, **logged, "grad_norm": norm, "lr": lr})
        assert_close(list(policy.parameters()), list(plain.parameters()))
        norms.append(norm)

    assert list(entries) == []
    assert min(norms) < 10 < max(norms)  # so some steps are clipped, and some are not

@pytest.mark.parametrize("lambda_d", [1e38, math.inf])  # the norm: inf, then nan
def test_a_gradient_that_is_not_finite_stops_training_before_it_does_harm(lambda_d):
    policy, reference = policy_and_reference()
    optimizer, schedule = adamw_and_schedule(policy)
    entries = kto.train(policy, reference, [batch_of("DUUDU")], optimizer, schedule,
                        lambda_d=lambda_d)
    with pytest.raises(FloatingPointError, match="step 0"):
        next(entries)
    assert optimizer.state == {}  # it has not moved the weights

# ---- TRL -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw_kl", [1, -1])
def test_trl_has_the_same_loss_z0_and_gradient_norm(raw_kl, tmp_path):
    trl = pytest.importorskip("trl", reason="needs: pip install trl==1.16.0")
    policy, reference = policy_and_reference(raw_kl)
    logged = kto.kto_step(policy, reference, batch_of("DUUDU"), **SETTINGS)
    norm = torch.nn.utils.get_total_norm(gradient_of(policy)).item()
    policy.zero_grad()

    # TRL pairs x with the completion of the row *before*: in reverse order, that is the row after.
    columns = {**TEXTS, "label": desirable("DUUDU").tolist()}
    rows = datasets.Dataset.from_dict(columns).select([4, 3, 2, 1, 0])
    settings = trl.KTOConfig(
        str(tmp_path),
        per_device_train_batch_size=5,
        logging_steps=1,
        bf16=False,
        beta=SETTINGS["beta"],
        desirable_weight=SETTINGS["lambda_d"],
        undesirable_weight=SETTINGS["lambda_u"],
    )
    trainer = trl.KTOTrainer(policy, reference, settings, train_dataset=rows,
                             processing_class=byte_tokenizer())
    trainer.train()
    log = trainer.state.log_history[0]
    figures = [log["loss"], log["kl"], log["grad_norm"]]  # what TRL calls kl is our z0
    assert figures == pytest.approx([logged["loss"], logged["z0"], norm], rel=1e-5)

# ---- The flags -----------------------------------------------------------------------------------

@pytest.fixture
def read_flags(monkeypatch):
    """read_flags("--a 1 --b 2") is the settings of `python kto.py --a 1 --b 2`."""
    def read(command=""):
        monkeypatch.setattr(sys, "argv", ["kto.py", *command.split()])
        return kto.read_flags()

    return read

def test_what_is_not_given_is_the_papers_or_follows_from_the_model(read_flags):
    toy, named = read_flags(), read_flags("--model someone/chat-1B")
    assert (toy.beta, toy.lambda_d, toy.lambda_u, toy.batch_size) == (0.1, 1, 1, 32)
    assert (toy.output, named.output) == ("kto-tiny", "kto-chat-1B")
    assert (toy.lr, named.lr) == (5e-4, 5e-6)

def test_an_impossible_value_is_refused_with_its_flag(read_flags):
    impossible = """--batch_size 1, --micro_batch_size 0, --epochs 0, --max_prompt_length 0,
        --max_completion_length 0, --holdout -1, --save_every -1, --seed -1, --beta -1,
        --lambda_d -0.1, --lambda_u -1, --beta 0, --lr 0, --lr nan, --lr inf"""
    for flag in impossible.split(","):
        with pytest.raises(kto.InputError, match=flag.strip()):
            read_flags(flag)
    with pytest.raises(SystemExit, match="2"):
        read_flags("--dtype float16")

@pytest.mark.parametrize("card, flags, expected", [
    ("none", "", "cpu float32"),
    ("computes in it", "", "cuda bfloat16"),
    ("computes in it", "--device cuda:1", "cuda:1 bfloat16"),
    ("computes in it", "--device cpu", "cpu float32"),
    ("emulates it", "", "cuda float32")  # T4, V100, RTX 20xx: they say that they can
])
def test_auto_is_bfloat16_only_on_a_card_that_computes_in_it(
        read_flags, monkeypatch, card, flags, expected):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or card == "computes in it"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: card != "none")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    config = read_flags(flags)
    assert f"{config.device} {config.dtype}" == expected

# ---- The rows of a file --------------------------------------------------------------------------

GOOD = '{"prompt": "Hi", "completion": "Hello", "label": true}'

def refusal(folder, line):
    """What is said about `line`, which an editor shows as line 3 of rows.jsonl."""
    file = folder / "rows.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", "latin-1")  # an accent is no UTF-8
    # Always one line, that says where.
    with pytest.raises(kto.InputError, match=f"^{file}:3: .{{5,500}}$") as error:
        list(kto.read_rows(kto.Config(data=str(file)), byte_tokenizer()))
    return str(error.value)

# In the two tables, pieces of what is said of the row stand behind the arrow, with ... between.
# The first row of the first table ends in what follows each message: what a row is.

BAD_ROWS = """\
[{"prompt": "a"}, {"prompt": "b"}]  ->  JSON object ... '[{"prompt": "a"}, ... true or false
[  ->  JSON object ... '['
"text"  ->  JSON object ... '"text"'
prompt,completion,label  ->  JSON object ... 'prompt,completion,label'
{"prompt": "a", "compl  ->  Unterminated string
{'prompt': 'a', 'completion': 'b', 'label': True}  ->  double quotes
{"prompt": "a", "completion": "b", "label": 1} {}  ->  Extra data
{"prompt": "é", "completion": "b", "label": true}  ->  can't decode byte 0xe9
{"conversations": [], "kto_tag": true}  ->  no prompt ... ['conversations', 'kto_tag']
{"messages": [], "label": true}  ->  no prompt ... ['messages', 'label']
{"prompt": "a", "chosen": "b"}  ->  no completion ... ['prompt', 'chosen']
{"prompt": "a", "completion": "b"}  ->  no label ... ['prompt', 'completion']
{"prompt": "a", "completion": "b", "label": "false"}  ->  'false'; write true or false, without
{"prompt": "a", "completion": "b", "label": "good"}  ->  label is 'good'
{"prompt": "a", "completion": "b", "label": 2}  ->  label is 2
{"prompt": "a", "completion": "b", "label": -1}  ->  label is -1
{"prompt": "a", "completion": "b", "label": 0.5}  ->  label is 0.5
{"prompt": "a", "completion": "b", "label": null}  ->  label is None
{"prompt": "a", "completion": "b", "label": NaN}  ->  label is nan
{"prompt": "a", "completion": "b", "label": [1]}  ->  label is [1]
{"prompt": "a", "completion": [{"role": "user", "content": "b"}], "label": 1}  ->  the assistant
{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}, \
{"role": "assistant", "content": "c"}], "label": 1}  ->  one message of the assistant"""

@pytest.mark.parametrize("case", BAD_ROWS.splitlines())
def test_each_kind_of_bad_row_is_refused_with_what_is_there_and_what_should_be(tmp_path, case):
    line, found = case.split("  ->  ")
    message = refusal(tmp_path, line)
    for words in found.split(" ... "):
        assert words in message

NO_MESSAGES = r"""5  ->  neither a text nor a list of messages: 5
null  ->  neither a text nor a list of messages: None
[]  ->  neither a text nor a list of messages: []
{"role": "assistant", "content": "a"}  ->  neither a text nor a list of messages: {'role'
["a"]  ->  the role of a message must be a text: 'a'
[{"content": "a"}]  ->  the role of a message must be a text: {'content': 'a'}
[{"role": 1, "content": "a"}]  ->  the role of a message must be a text: {'role': 1
[{"role": "assistant"}]  ->  the content of a message must be a text: {'role'
[{"role": "user", "content": [{"type": "text"}]}]  ->  the content of a message must be a text
[{"role": "assistant", "content": "a"}, 7]  ->  the role of a message must be a text: 7
"\ud83d"  ->  surrogates not allowed"""

@pytest.mark.parametrize("case", NO_MESSAGES.splitlines())
def test_what_is_neither_text_nor_messages_is_refused_on_either_side(tmp_path, case):
    value, found = case.split("  ->  ")
    assert found in refusal(tmp_path, GOOD.replace('"Hi"', value))
    assert found in refusal(tmp_path, GOOD.replace('"Hello"', value))

def test_a_bad_row_is_refused_before_a_model_is_loaded_and_not_shown_whole(read_flags, tmp_path):
    # The folder has a tokenizer and no model: had it been asked for, the message would say so.
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(GOOD + "\n" + "[" * 100_000)
    read_flags(f"--model {tmp_path}/model --data {tmp_path}/rows.jsonl --output {tmp_path}/new")
    with pytest.raises(kto.InputError, match="rows.jsonl:2: not a JSON object.{,500}$"):
        kto.main()

def decoded(prompt, completion):
    """Ids as text, with all special tokens."""
    tokenizer = byte_tokenizer()
    return f"{tokenizer.decode(prompt)} -> {tokenizer.decode(completion)}"

def test_odd_but_usable_lines_are_read(tmp_path):
    lines = (
        "\ufeff" + GOOD + "\r\n"  # a byte order mark, and the end of a line on Windows
        " \t\r\n"
        '{"id": 7, "label": 0, "prompt": "2024-01-01", "completion": "12.50"}\n'
        '{"prompt": "a\u2028b\x85c", "completion": " d ", "label": 1}\n')  # no ends of lines
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines.encode())

    # By 2, the second row is held out, although its line is the third.
    read = []
    for row in kto.read_rows(kto.Config(data=str(file), holdout=2), byte_tokenizer()):
        text = decoded(row["prompt"], row["completion"])
        read.append(f"{text} {row['label']} {row['is_held_out']}")
    assert read == ["Hi -> Hello</s> True False", "2024-01-01 -> 12.50</s> False True",
                    "a\u2028b\x85c ->  d </s> True False"]

def settings_for(folder, letters, holdout=0, **others):
    """Settings of a run on a row for each letter, its prompt and completion; capitals are good."""
    rows = [(letter, letter, letter.isupper()) for letter in letters]
    return kto.Config(data=write_rows(folder / "rows.jsonl", rows), device="cpu", holdout=holdout,
                      **others)

# ---- A row as the model sees it ------------------------------------------------------------------

LLAMA = (  # writes BOS itself, closes an answer with EOS, knows no system turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system turn') }}{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
BARE = (  # no end token at all
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}")
PHI = (  # EOS follows each chat that does not ask for an answer
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% else %}{{ eos_token }}{% endif %}")
THINK_DROPPED = (  # a thought is opened when asked, of which an answered chat has nothing
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
THINK_CLOSED = (  # a thought is opened when asked, which an answered chat closes at once
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CHAT = [{"role": "system", "content": "Be kind"}, USER, ANSWER, {"role": "user", "content": "Bye"}]

def texts(tokenizer, prompt="Hi", completion="Hello"):
    return decoded(*kto.encode({"prompt": prompt, "completion": completion}, tokenizer))

def test_plain_texts_stay_as_they_are_between_the_tokenizers_bos_and_one_eos():
    assert texts(byte_tokenizer(), "Hi ", " Hello\n") == "Hi  ->  Hello\n</s>"
    assert texts(byte_tokenizer(adds_bos=True)) == "<s>Hi -> Hello</s>"
    assert texts(byte_tokenizer(pad="</s>"), completion="Hello</s>") == "Hi -> Hello</s>"
    assert texts(byte_tokenizer(), completion="A<pad>") == "Hi -> A<pad></s>"  # no end of a text

def test_a_completion_is_tokenised_as_it_follows_the_prompt():
    tokenizer = byte_tokenizer(adds_bos=True)
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    assert texts(tokenizer) == "<s> Hi -> Hello</s>"  # each text on its own would get a space
    tokenizer.add_tokens(["iH"])
    assert texts(tokenizer) == "<s> Hi ->  Hello</s>"  # a token lies across the border

@pytest.mark.parametrize("template, expected", [
    (CHATML, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n -> Hello<|im_end|>"),
    (LLAMA, "<s>[INST]Hi[/INST] ->  Hello</s>"),
    (BARE, "user: Hi\nassistant:  -> Hello</s>"),
    (PHI, "u:Hi<|im_end|>a: -> Hello<|im_end|></s>"),
    (THINK_DROPPED, "<|user|>Hi<|assistant|> -> Hello</s>"),
    (THINK_CLOSED, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>"
                   " -> </think>Hello<|im_end|>")
])
def test_a_chat_is_what_its_template_writes_and_ends_once(template, expected):
    # The tokenizer would add BOS to a text, and pads with EOS: neither makes a difference here.
    tokenizer = byte_tokenizer(template, adds_bos=True, pad="</s>")
    assert texts(tokenizer) == texts(tokenizer, [USER], [ANSWER]) == expected

def test_an_answer_that_starts_like_a_thought_is_left_whole():
    assert "<|assistant|> -> <b></s>" in texts(byte_tokenizer(THINK_DROPPED), completion="<b>")

def test_the_prompt_of_several_turns_is_what_inference_asks_with():
    tokenizer = byte_tokenizer(CHATML)
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert "Be kind" in asked
    assert texts(tokenizer, CHAT) == asked + " -> Hello<|im_end|>"

SHOWS = "{% for m in messages if m.role == 'ROLE' %}{{ m.content }}{% endfor %}"

@pytest.mark.parametrize("template, prompt, completion, found", [
    (None, [USER], "Hello", "template cannot render it: .* is not set"),
    (None, "Hi", [ANSWER], "template cannot render it: .* is not set"),
    (LLAMA, CHAT, "Hello", "template cannot render it: no system turn"),
    ("Say: {{ messages[-1].content }}", "Hi", "Bye", "changes 'Hi'"),  # of the prompt
    (SHOWS.replace("ROLE", "user"), "Hi", "Hello", "no token at all"),
    (SHOWS.replace("ROLE", "assistant"), "Hi", "Hello", "no token at all")
])
def test_a_chat_that_a_template_cannot_take_is_refused_in_words(
        template, prompt, completion, found):
    with pytest.raises(ValueError, match=found):
        texts(byte_tokenizer(template), prompt, completion)

@pytest.mark.parametrize("x_tokens, y_tokens, expected", [
    (7, 8, "Tell me -> Tell me</s>"),
    (8, 7, "<s>Tell me -> Tell me"),  # it did not end there: no EOS
    (2, 1, "me -> T")
])
def test_of_a_prompt_the_end_is_kept_and_of_a_completion_the_start(
        tmp_path, x_tokens, y_tokens, expected):
    config = settings_for(tmp_path, ["Tell me"], max_prompt_length=x_tokens,
                      max_completion_length=y_tokens)
    row = next(kto.read_rows(config, byte_tokenizer(adds_bos=True)))
    assert decoded(row["prompt"], row["completion"]) == expected
    assert row["prompt"].itemsize == row["completion"].itemsize == 4  # bytes for an id

# ---- Batches -------------------------------------------------------------------------------------

def trained_on(config):
    """The letters of each batch, as one text."""
    tokenizer = byte_tokenizer()
    batches = kto.training_batches(config, tokenizer)
    return ["".join(map(tokenizer.decode, batch["prompt"])) for batch in batches]

def test_an_epoch_has_each_row_once_in_an_order_of_its_own_but_those_that_fill_no_batch(
        tmp_path, monkeypatch):
    shuffle = datasets.IterableDataset.shuffle

    def shuffle_less(rows, seed, buffer_size):  # as if the file had more rows than the buffer
        return shuffle(rows, seed, buffer_size=5)

    monkeypatch.setattr(datasets.IterableDataset, "shuffle", shuffle_less)

    # 13 = 3 * 4 + 1: the last row would be its own partner.
    config = settings_for(tmp_path, "abcdefghijklm", batch_size=4, epochs=2)
    batches = trained_on(config)
    first, second = "".join(batches[:3]), "".join(batches[3:])
    assert len(first) == len(second) == len(set(first)) == len(set(second)) == 12
    assert first != second and "abcdefghijkl" not in (first, second)

    # The seed decides the order.
    config.seed = 1
    assert trained_on(config) != batches

def test_every_kth_row_is_held_out_and_never_trained_on(tmp_path):
    config = settings_for(tmp_path, "abCdeFghijkl", holdout=3, batch_size=4)  # C, F, i, l
    held_out = kto.survey(config, byte_tokenizer())[0]
    held_out = " ".join(map(decoded, held_out["prompt"], held_out["completion"]))
    assert held_out == "C -> C</s> F -> F</s> i -> i</s> l -> l</s>"
    assert set("".join(trained_on(config))) == set("abdeghjk")

# ---- The survey ----------------------------------------------------------------------------------

def survey(folder, letters, **others):
    """(held-out rows, steps of an epoch, longest x and y)"""
    return kto.survey(settings_for(folder, letters, **others), byte_tokenizer())

def test_what_will_be_trained_on_is_counted_and_one_row_shown_as_the_model_sees_it(
        tmp_path, capsys):
    # By 5, J and t are held out. The 8 capitals and 3 small letters left are 3 batches of 3 rows,
    # and 2 rows are left over.
    assert survey(tmp_path, "ABCDJEFGHtxyz", holdout=5, batch_size=3)[1] == 3
    printed = capsys.readouterr().out
    for fact in ("n_D = 8, n_U = 3; held out 2 rows, 1 of them desirable\n",
                 "3 an epoch; 2 rows are left over", "\nlast row z -> z</s>\n"):
        assert fact in printed

def test_the_longest_prompt_and_the_longest_completion_are_found_held_out_or_not(tmp_path):
    rows = [("along", "b", True), ("a", "b", True), ("a", "below", True)]  # the third is held out
    config = kto.Config(data=write_rows(tmp_path / "rows.jsonl", rows), holdout=3, batch_size=2)
    longest = kto.survey(config, byte_tokenizer())[2]
    assert decoded(**longest) == "along -> below</s>"

def test_a_file_whose_rows_fill_no_batch_is_refused(tmp_path):
    for letters in ("", "abcdefg", "abcdefgh"):  # the eighth is held out
        with pytest.raises(kto.InputError, match="[07] rows .*--batch_size"):
            survey(tmp_path, letters, batch_size=8, holdout=8)

@pytest.mark.parametrize("letters, lambda_d, lambda_u, advice", [
    ("Abcdefghijk", 1, 1, "= 0.1;.*--lambda_d 10 to 15\n"),  # 1 for 10, the example of §4.2
    # 4 / (0.5 * 5) = 1.6. The weight is 0.5 * 5 / 4 = 0.625, or half more.
    ("ABCDefghi", 1, 0.5, "= 1.6;.*--lambda_d 0.625 to 0.9375\n"),
    ("abcd", 1, 1, "WARNING  only one class"),
    ("AbcD", 1, 0, "WARNING  only one class")  # the other weighs nothing
])
def test_unequal_classes_get_the_weight_of_eq_9_and_one_alone_a_warning(
        tmp_path, capsys, letters, lambda_d, lambda_u, advice):
    survey(tmp_path, letters, batch_size=2, lambda_d=lambda_d, lambda_u=lambda_u)
    assert re.search(advice, capsys.readouterr().out)

# ---- The models ----------------------------------------------------------------------------------

def load_with(folder, x=[5] * 64, y=[6] * 60, device="cpu"):
    """As in a run whose longest prompt is x, and whose longest completion is y."""
    return kto.load_model(kto.Config(model=str(folder), device=device), byte_tokenizer(), x, y)

def load_error(folder, **others):
    """What is said, in one line, of a model that cannot be used."""
    with pytest.raises(kto.InputError, match=f"^--model {folder} on --device .*$") as error:
        load_with(folder, **others)
    return str(error.value)

def test_a_model_is_loaded_in_float32_on_the_device_that_is_named(tmp_path):
    # In bfloat16, of 8 bits, the updates of a small learning rate are rounded away.
    random_model().bfloat16().save_pretrained(tmp_path)
    assert load_with(tmp_path).dtype == torch.float32
    load_error(tmp_path, device="nowhere")

def test_weights_that_are_lacking_are_named(tmp_path):
    model = random_model()
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]  # would be random
    model.save_pretrained(tmp_path, state_dict=weights)
    assert "lacks the weights ['model.layers.1.mlp.up_proj.weight']" in load_error(tmp_path)

def test_weights_that_are_cut_short_are_refused(tmp_path):
    random_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "incomplete" in load_error(tmp_path)

def test_a_model_that_is_too_short_is_refused_with_a_flag_to_lower(tmp_path):
    random_model("gpt2").save_pretrained(tmp_path)
    load_with(tmp_path)  # 64 tokens, and an answer of 64, fit into 128
    assert "128 tokens, not 129" in load_error(tmp_path, x=[5] * 65)
    assert "--max_prompt_length" in load_error(tmp_path, y=[6] * 65)

def test_a_model_that_names_no_length_takes_any(tmp_path):
    model = random_model("bloom")
    del model.config.max_position_embeddings
    model.save_pretrained(tmp_path)
    load_with(tmp_path, x=[5] * 1000)

def test_an_id_without_an_embedding_is_refused(tmp_path):
    random_model("bloom", vocab_size=258).save_pretrained(tmp_path)
    load_with(tmp_path)  # the highest id is EOS, 257
    assert "fewer embeddings" in load_error(tmp_path, y=[258])
    random_model("bloom", vocab_size=257).save_pretrained(tmp_path)
    assert "fewer embeddings" in load_error(tmp_path)

def test_an_encoder_is_refused_since_it_sees_to_the_right(tmp_path):
    random_model("bert", is_decoder=False).save_pretrained(tmp_path)
    assert "causal" in load_error(tmp_path)

def test_a_tokenizer_that_cannot_be_found_or_has_no_end_token_is_refused(tmp_path):
    config = kto.Config(model=str(tmp_path))
    with pytest.raises(kto.InputError, match=f"--model {tmp_path} .*give a folder"):
        kto.load_tokenizer(config)
    byte_tokenizer(eos=None).save_pretrained(tmp_path)
    with pytest.raises(kto.InputError, match="no EOS token"):
        kto.load_tokenizer(config)

# ---- The toy -------------------------------------------------------------------------------------

def test_the_toy_is_taught_the_undesirable_rows_and_every_fourth_row(tmp_path, monkeypatch):
    config = settings_for(tmp_path, "AbcDEFGhIJKL", holdout=3)
    tokenizer, taught = byte_tokenizer(), []

    def record(model, prompts, completions):
        taught.extend(map(tokenizer.decode, prompts))
        return model.lm_head.weight.sum(dim=1)  # to be quick, no log-probs

    # Held out are c, F, I and L. Of the others, A b D E G h J K, the undesirable b and h are taught
    # and each fourth, which is A and G.
    monkeypatch.setattr(kto, "completion_logps", record)
    weights = []
    for seed in (0, 0, 1):
        config.seed = seed
        weights.append(kto.tiny_model(config, tokenizer).lm_head.weight)
    assert set(taught) == set("bhAG")

    # The same seed makes the same toy, another one another.
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])

# ---- A small run ---------------------------------------------------------------------------------

# Of 21 rows every fifth, 4 in all, is held out. The 17 others make 4 steps of 4 rows an epoch, with
# one left over, and 20 steps in all. Beta and the lambdas are those of SETTINGS.
ROWS = [(f"Say {number}", "no" * (number % 4 + 1), number % 2 == 0) for number in range(21)]
FLAGS = "--epochs 5 --batch_size 4 --holdout 5 --lr 0.01 --beta 0.3 --lambda_d 1.4 --lambda_u 0.7"

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a model, which has dropout, and rows, for runs of less than a second."""
    folder = tmp_path_factory.mktemp("small")
    model = random_model("gpt2", std=0.3, num_hidden_layers=1, resid_pdrop=0.1)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder

def command(small, output, more):
    """A command line as it would be typed; of a flag that is there twice, the later counts."""
    files = f"--model {small}/model --data {small}/rows.jsonl --output {output}"
    return f"kto.py {files} {FLAGS} {more}".split()

def start(small, output, more=""):
    """python kto.py in this process, which then gets its Ctrl-C back; returns what is printed."""
    ctrl_c, printed = signal.getsignal(signal.SIGINT), io.StringIO()
    argv = mock.patch("sys.argv", command(small, output, more))
    try:
        with argv, contextlib.redirect_stdout(printed):
            kto.main()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # no longer only heard
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return printed.getvalue()

@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The output of a run that nothing interrupts. What it printed lies beside the folder."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "printed.txt").write_text(start(small, folder / "output"))
    return folder / "output"

def stop_in_step(number, sent, small, output):
    """The same run, which is sent a signal in the midst of this step, before the update."""
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count()

    def clip_and_send(*args, **settings):
        if next(steps) == number:
            signal.raise_signal(sent)
        return clip(*args, **settings)

    with mock.patch("torch.nn.utils.clip_grad_norm_", clip_and_send):
        with pytest.raises(SystemExit, match=str(128 + sent)):
            start(small, output)

@pytest.fixture(scope="session")
def stopped(small, tmp_path_factory):
    """The output of the same run, stopped by Ctrl-C in step 7."""
    output = tmp_path_factory.mktemp("stopped")
    stop_in_step(7, signal.SIGINT, small, output)
    return output

def read_log(output):
    """The lines of the log, without the seconds, which are never the same."""
    log = []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        log.append(json.loads(line))
        assert log[-1].pop("seconds") > 0
    return log

def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}

def assert_same_result(output, whole):
    """Bit for bit the same files, nothing left of the checkpoint, and in the log the same lines."""
    log = {"metrics.jsonl": read_log(whole)}
    assert contents(output) | {"metrics.jsonl": read_log(output)} == contents(whole) | log

@pytest.fixture
def refused(small, capfd):
    """refused(output, flags) are the lines on stderr of a program that ends with status 2."""
    def run(output, more):
        argv = mock.patch("sys.argv", command(small, output, more))
        with argv, mock.patch("signal.signal"), pytest.raises(SystemExit, match="2"):
            runpy.run_path(kto.__file__, run_name="__main__")
        return capfd.readouterr().err.splitlines()

    return run

# ---- Checkpoints ---------------------------------------------------------------------------------

def test_a_checkpoint_is_named_after_all_that_decides_the_result(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("some rows")
    config = kto.Config(data=data, output="here")
    path = kto.checkpoint_path(config)
    free = {"output", "device", "micro_batch_size", "save_every", "resume"}
    for setting in vars(config).keys() - {"data"}:
        other = dataclasses.replace(config, **{setting: "another"})
        assert (kto.checkpoint_path(other).name == path.name) == (setting in free)

    # The same place does not make it the same data.
    data.write_text("other rows")
    assert kto.checkpoint_path(config) != path

def test_a_run_does_not_go_on_with_other_settings_and_is_left_alone(
        stopped, whole, refused, tmp_path):
    before = contents(stopped)
    assert "--resume needs a checkpoint" in refused(stopped, "--resume --beta 0.2")[-1]
    assert contents(stopped) == before

    # Neither does a run go on that is complete, or never began.
    before = contents(whole)
    refused(whole, "--resume")
    refused(tmp_path / "new", "--resume")
    assert contents(whole) == before and not (tmp_path / "new").exists()

class Code:
    """Loading its pickle makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("it ran",)

def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_is_run(
        stopped, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = shutil.copytree(stopped, tmp_path / "output")
    [path] = output.glob("checkpoint-*.pt")
    cut_short = path.read_bytes()[:-1000]
    for content in (b"", b"junk", cut_short, pickle.dumps(Code(), protocol=2)):
        path.write_bytes(content)
        before = contents(output)
        assert "--resume needs a checkpoint" in refused(output, "--resume")[-1]
        assert contents(output) == before
    assert not Path("it ran").exists()

def test_a_process_killed_while_it_saves_goes_on_from_the_checkpoint_before(
        small, whole, tmp_path):
    save, saved, left = torch.save, [], tmp_path / "left"

    def save_half_the_third(state, path):
        save(state, path)
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half of it")
            shutil.copytree(path.parent, left)  # what is on the disk if the process dies here

    with mock.patch("torch.save", save_half_the_third):
        start(small, tmp_path / "output", "--save_every 3")

    # It died after 9 steps, with a checkpoint after 6: of the log, 3 lines come again.
    assert len(read_log(left)) == 9
    start(small, left, "--resume --save_every 3")
    assert_same_result(left, whole)

# ---- The run -------------------------------------------------------------------------------------

def test_the_log_has_each_step_once_and_held_out_figures_at_the_end_of_each_epoch(whole):
    log = read_log(whole)
    figures = log[0].keys() - {"step", "grad_norm", "lr"}
    assert log[3].keys() - log[0].keys() == {f"eval_{name}" for name in figures}
    assert [entry["step"] for entry in log] == list(range(20))
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [3, 7, 11, 15, 19]

def test_the_learning_rate_warms_up_not_from_0_and_falls_to_a_tenth_along_a_cosine(whole):
    # Of 20 steps a tenth, 2, is warm-up: 1/2, 2/2. The other 18 go from 1 down to 0.1: after 6,
    # where the cosine of 60 degrees is 0.5, there is left 0.1 + 0.9 * (1 + 0.5) / 2 = 0.775.
    lr = [entry["lr"] / 0.01 for entry in read_log(whole)]
    assert [lr[0], lr[1], lr[7], lr[19]] == pytest.approx([0.5, 1.0, 0.775, 0.1])

def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

def test_the_saved_model_has_the_figures_of_all_held_out_rows_together(small, whole):
    # They are one batch of four, so that each meets the completion of the next.
    config = kto.Config(data=small / "rows.jsonl", holdout=5, batch_size=4)
    held_out = kto.survey(config, byte_tokenizer())[0]
    with torch.no_grad():
        figures = kto.kto_step(load(whole), load(small / "model"), held_out, **SETTINGS)
    last = read_log(whole)[-1]
    for name, value in figures.items():
        assert last[f"eval_{name}"] == pytest.approx(value, rel=1e-4)

@pytest.fixture(scope="session")
def watched(small, tmp_path_factory):
    """(output, arguments, settings) of a run, the last two as its training loop gets them."""
    output = tmp_path_factory.mktemp("watched")
    with mock.patch("kto.train", wraps=kto.train) as train:
        start(small, output, "--epochs 1 --micro_batch_size 2 --seed 2 --dtype bfloat16")
    return output, *train.call_args

def test_adamw_trains_the_policy_alone_with_the_settings_that_were_given(watched):
    _, (policy, _, _, optimizer, *_), settings = watched
    assert settings == {**SETTINGS, "micro_batch_size": 2}
    [group] = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["weight_decay"] == 0.0
    assert list(map(id, group["params"])) == list(map(id, policy.parameters()))

def test_at_first_policy_and_reference_are_equal_in_spite_of_dropout_then_no_more(watched):
    # A loss is lambda / 2. As no r is above z0, the accuracy is the share of undesirable rows: one
    # of four, in the order that seed 2 gives.
    first, second = read_log(watched[0])[:2]
    assert first["margin"] == first["kl"] == first["z0"] == 0 != second["kl"]
    assert first["accuracy"] == 1 / 4
    assert first["loss"] == pytest.approx((3 * 1.4 + 0.7) / 4 / 2)

def test_policy_and_reference_end_as_what_is_saved_and_as_what_was_loaded(small, watched):
    # bfloat16 is for the forward passes of each of the two; its weights stay float32.
    output, (policy, reference, *_), _ = watched
    for model, folder in ((policy, output), (reference, small / "model")):
        assert model.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            expected = kto.completion_logps(load(folder), PROMPTS, COMPLETIONS)
        assert torch.equal(kto.completion_logps(model, PROMPTS, COMPLETIONS), expected)

def test_fewer_than_two_held_out_rows_are_not_evaluated(small, tmp_path):
    start(small, tmp_path, "--epochs 1 --holdout 20")
    assert "eval_loss" not in read_log(tmp_path)[-1]

def test_a_run_stopped_by_the_keyboard_goes_on_to_the_same_bits(small, stopped, whole, tmp_path):
    # Step 7 was finished, with the evaluation after it.
    assert read_log(stopped) == read_log(whole)[:8]

    # Places may change. If the policy of the checkpoint became the reference, the rewards would
    # start at 0 again.
    shutil.copytree(stopped, tmp_path / "moved")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    start(small, tmp_path / "moved", f"--resume --data {data} --save_every 4")
    assert_same_result(tmp_path / "moved", whole)

def test_sigterm_in_the_last_step_loses_nothing_either(small, whole, tmp_path):
    stop_in_step(19, signal.SIGTERM, small, tmp_path)
    start(small, tmp_path, "--resume --micro_batch_size 2")
    assert_same_result(tmp_path, whole)

# ---- The chart -----------------------------------------------------------------------------------

def chart(z0, undesirable, desirable):
    """The line of step 7. Of its 71 columns 35 is 0; with this beta a column is 0.2 nats."""
    entry = {"step": 7, "z0": z0, "reward_undesirable": undesirable, "reward_desirable": desirable}
    return kto.chart(entry, beta=0.5)

def test_the_chart_puts_each_mark_in_its_place():
    # U is at 35 - 2.0 / 0.2 = 25, z at 35, and D at 35 + 3.12 / 0.2 = 50.6, rounded 51.
    line = chart(z0=0.0, undesirable=-2.0, desirable=3.12)
    assert line == f"     7 {'.' * 25}U{'.' * 9}z{'.' * 15}D{'.' * 19}"

def test_what_is_too_far_for_the_chart_is_at_its_edge_and_what_is_absent_nowhere():
    assert chart(z0=7.2, undesirable=-7.2, desirable=None) == f"     7 U{'.' * 69}z"

# ---- The command ---------------------------------------------------------------------------------

def test_a_run_shows_chart_figures_and_three_answers_before_and_after(small, whole):
    printed = (whole.parent / "printed.txt").read_text()
    log, tokenizer = read_log(whole), transformers.AutoTokenizer.from_pretrained(whole)

    # 20 steps in at most 16 lines: every second one.
    lines = [kto.chart(entry, beta=0.3) for entry in log[::2]]
    assert re.findall(r" +\d+ [.zUD]{71}", printed) == lines
    above = [entry for entry in log if entry["z0"] > 0]
    assert f"In {len(above)} of 20 steps" in printed

    # The answers to the first three held-out prompts, of which this is the third.
    assert printed.count("  before ") == 3
    answers = printed.partition("\nSay 14\n")[2]
    ids = tokenizer("Say 14", return_tensors="pt").input_ids
    for name, folder in (("before", small / "model"), ("after ", whole)):
        prompt_and_answer = load(folder).generate(ids, max_new_tokens=64, do_sample=False)[0]
        answer = tokenizer.decode(prompt_and_answer[6:], skip_special_tokens=True).strip()
        assert f"  {name} {answer}\n" in answers

def test_an_output_that_is_in_use_is_refused(whole, stopped, refused):
    for output in (whole, stopped):
        before = contents(output)
        assert "is in use" in refused(output, "--model tiny")[-1]
        assert contents(output) == before

def test_the_toy_may_be_run_again_and_again_in_its_own_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mock.patch("kto.tiny_model", return_value=random_model(vocab_size=999)):
        start(small, "kto-tiny", "--model tiny --epochs 2 --holdout 0")
        start(small, "kto-tiny", "--model tiny --epochs 1 --holdout 0")
    assert len(read_log(Path("kto-tiny"))) == 5
    with pytest.raises(kto.InputError, match="in use"):
        start(small, "kto-tiny")  # another model

def test_what_cannot_be_used_is_one_line_and_status_2(refused, tmp_path):
    data, output = tmp_path / "rows.jsonl", tmp_path / "output"
    data.write_bytes(b"\xe9")
    [line] = refused(output, f"--model tiny --data {data}")
    assert line.startswith(f"{data}:1: ")
    [line] = refused(output, f"--data {tmp_path}/none")
    assert "No such file" in line
    assert not output.exists()
    assert "norm is nan; lower the lr" in refused(output, "--lr 1e30 --save_every 1")[-1]
    assert list(output.glob("checkpoint-*.pt"))  # of the step before

# ---- It learns what the paper says it learns: the task -------------------------------------------
# 64 questions of one token; an answer is one of 16 tokens, then END. A table says what is right.
# The reference was taught right and random answers, half and half. What it answers is labelled,
# right = desirable, and the policy is told nothing else. Success is counted: the share of right
# answers among 1,024 that are sampled at temperature 1. The comments give it for seeds 0 to 5.

SEED = 0
END = 16
QUESTIONS = range(17, 81)
RIGHT = dict(zip(QUESTIONS, random.Random(5).choices(range(16), k=64)))

@functools.cache
def half_right(seed):
    """The reference: it answers about half of the questions right."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    config = transformers.LlamaConfig(
        vocab_size=81, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=None, eos_token_id=END)
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())

    for step in range(100):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 100)
        rows = []
        for question in dice.choices(QUESTIONS, k=64):
            answer = RIGHT[question] if dice.random() < 0.5 else dice.randrange(16)
            rows.append({"prompt": [question], "completion": [answer, END]})
        loss = -logps(model, rows).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)

def sampled(model, per_question, length, seed):
    """Answers of `length` tokens to each question: a list of (question, answer)."""
    torch.manual_seed(seed)
    x = tensor([[question] for question in QUESTIONS] * per_question)
    texts = model.generate(x, attention_mask=torch.ones_like(x), do_sample=True, top_k=0,
                           max_new_tokens=length, pad_token_id=END)
    return [(question, answer) for question, *answer in texts.tolist()]

def success(model, seed, length=2):
    """The share of 1,024 sampled answers that are right and, if length is 2, then end."""
    right = []
    for question, answer in sampled(model, 16, length, seed):
        right.append(answer == [RIGHT[question], END][:length])
    return sum(right) / len(right)

def feedback(seed, wrong=0.0, phrase=()):
    """2,048 rows: the reference's answers, `phrase` after each, a share of the labels wrong."""
    dice = random.Random(seed)
    rows = []
    for question, [answer] in sampled(half_right(seed), 32, 1, seed):
        label = answer == RIGHT[question]
        if dice.random() < wrong:
            label = not label
        rows.append({"prompt": [question], "completion": [answer, *phrase, END], "label": label})
    return rows

def by_label(rows):
    """(the desirable rows, the undesirable ones)"""
    good = [row for row in rows if row["label"]]
    bad = [row for row in rows if not row["label"]]
    return good, bad

# What a method passes over, in a new order each time: all rows, or what it makes of them.

def shuffled(rows, dice):
    return dice.sample(rows, len(rows))

def desirable_only(rows, dice):
    good, _ = by_label(rows)
    return shuffled(good, dice)

def paired(rows, dice):
    """For DPO: a desirable row, an undesirable one of the same question, and so on in turn.

    No row is lost, since the rarer of a question's two classes is repeated; each pass pairs anew,
    and takes as many pairs as make up len(rows) rows.
    """
    pairs = []
    order = shuffled(rows, dice)
    for question in QUESTIONS:
        asked = [row for row in order if row["prompt"] == [question]]
        good, bad = by_label(asked)
        turns = zip(itertools.cycle(good), itertools.cycle(bad))  # none if there is no good or bad
        pairs += itertools.islice(turns, max(len(good), len(bad)))
    return sum(dice.sample(pairs, len(rows) // 2), ())

def judged(rows, dice):
    """Pairs as judges of pairs give them: each fifth is turned round, the same in each pass."""
    rows = paired(rows, random.Random(SEED))
    pairs = list(zip(rows[0::2], rows[1::2]))
    pairs[::5] = zip(rows[1::10], rows[0::10])
    return sum(shuffled(pairs, dice), ())

# ---- The other losses ----------------------------------------------------------------------------

def dpo_loss(policy_logps, reference_logps, beta):
    """The DPO loss of each pair (Rafailov et al. 2023, Eq. 7); chosen and rejected take turns."""
    r = policy_logps - reference_logps  # (B,)
    return -torch.nn.functional.logsigmoid(beta * (r[0::2] - r[1::2]))  # (B / 2,)

def sft_loss(policy_logps, completions):
    """The SFT loss of a batch: minus the log-prob of a completion token, mean over all of them."""
    tokens = sum(len(y) for y in completions)
    return -policy_logps.sum() / tokens

def logistic_loss(policy_logps, reference_logps, z0, desirable, beta):
    """kto_loss with -log sigmoid for 1 - sigmoid: it is steepest where a row is farthest off."""
    r = policy_logps - reference_logps  # (B,)
    gain = torch.where(desirable, r - z0, z0 - r)
    return -torch.nn.functional.logsigmoid(beta * gain)

def no_reference_point(policy_logps, reference_logps):
    return tensor(0.0)

def test_the_other_losses_worked_by_hand():
    # beta = 1/2. DPO: r is 2 ln 3 + 1 and 1, -log sigmoid(ln 3) = ln 4/3. With the pair turned
    # round it is -log sigmoid(-ln 3) = ln 4. With z0 = 1 the logistic loss has the same values.
    high, values = 2 * math.log(3) + 1, tensor([math.log(4 / 3), math.log(4)])
    r = tensor([high, 1.0, 1.0, high])
    assert_close(dpo_loss(r - 20, tensor(-20.0), beta=0.5), values)
    assert_close(logistic_loss(r[0], 0.0, 1.0, desirable("DU"), beta=0.5), values)

    # SFT: 6 nats over three tokens and 1 nat over one are 7/4 a token. (Mean of rows: 3/2.)
    assert sft_loss(tensor([-6.0, -1.0]), [[5, 6, 0], [0]]).item() == 1.75

# ---- Training, the same for each method ----------------------------------------------------------

def logps(model, rows):
    """log pi(y|x) of each row: (B,)."""
    x = [row["prompt"] for row in rows]
    y = [row["completion"] for row in rows]
    return kto.completion_logps(model, x, y)

def kto_batch(policy, reference, rows, beta, loss=kto.kto_loss, point=kto.reference_point,
              **weights):
    """The mean KTO loss of a batch, or that of a variant with another loss or reference point."""
    x = [row["prompt"] for row in rows]
    y = [row["completion"] for row in rows]
    y_next = y[1:] + y[:1]
    policy_logps, policy_kl = kto.completion_logps(policy, x + x, y + y_next).chunk(2)
    reference_logps, reference_kl = kto.completion_logps(reference, x + x, y + y_next).chunk(2)
    z0 = point(policy_kl, reference_kl)
    desirable = tensor([row["label"] for row in rows])
    return loss(policy_logps, reference_logps, z0, desirable, beta, **weights).mean()

def dpo_batch(policy, reference, rows, beta):
    """The mean DPO loss of a batch in which chosen and rejected rows take turns."""
    return dpo_loss(logps(policy, rows), logps(reference, rows), beta).mean()

def sft_batch(policy, reference, rows, beta):
    """The SFT loss of a batch, which knows neither reference nor beta."""
    return sft_loss(logps(policy, rows), [row["completion"] for row in rows])

def train(rows, seed, batch_loss, items, beta, learning_rate, passes, **settings):
    """The trained policy. The reference, its copy, never gets a gradient."""
    reference = half_right(seed)
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    dice = random.Random(seed)

    for _ in range(passes):
        order = items(rows, dice)
        for start in range(0, len(order) - 1, 32):  # a last batch of one row is left out
            batch = order[start : start + 32]
            loss = batch_loss(policy, reference, batch, beta, **settings)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return policy

# Each method at its own best setting for each share of wrong labels: beta, learning rate, passes.
# Tuned on seeds from 100 on, which the table does not use. With a fifth wrong: four seeds, the same
# grid for each method, learning rate 5e-4, 1e-3, 2e-3, passes 1, 2, 4, beta 0.1, 0.3, 1, and wider
# where the best lay at an edge. For the other shares: three seeds, the best three to six of these.
METHODS = {
    "KTO": (kto_batch, shuffled,
            {0.0: (1.0, 2e-3, 4), 0.2: (1.0, 1e-3, 4), 0.3: (1.0, 1e-3, 2)}),
    "logistic KTO": (functools.partial(kto_batch, loss=logistic_loss), shuffled,
                     {0.0: (0.3, 2e-3, 4), 0.2: (0.1, 1e-3, 4), 0.3: (0.1, 1e-3, 4)}),
    "DPO": (dpo_batch, paired,
            {0.0: (0.3, 2e-3, 4), 0.2: (0.3, 2e-3, 2), 0.3: (0.3, 5e-4, 4)}),
    "SFT": (sft_batch, desirable_only,
            {0.0: (None, 2e-3, 8), 0.2: (None, 2e-3, 1), 0.3: (None, 2e-3, 2)}),
}

@functools.cache
def learned(name, wrong, seed, passes=None):
    """The success of a method with a share of the labels wrong, with its own number of passes."""
    batch_loss, items, best = METHODS[name]
    beta, learning_rate, best_passes = best[wrong]
    rows = feedback(seed, wrong)
    policy = train(rows, seed, batch_loss, items, beta, learning_rate, passes or best_passes)
    return success(policy, seed)

def unequal(seed, lambda_d):
    """The success where one row is desirable for nine that are not."""
    good, bad = by_label(feedback(seed))
    rows = good[: len(bad) // 9] + bad  # about 115 + 1,030: some questions have no desirable row
    policy = train(rows, seed, kto_batch, shuffled, 0.5, 2e-3, 2, lambda_d=lambda_d)
    return success(policy, seed)

def likelier(seed, point):
    """Where all completions grow likelier: (success, margin in r at the end).

    Another hand added four tokens to every answer, which the reference never writes there, and
    three rows of four are desirable: so the phrase is learned first, and all r grow, good or bad.
    """
    good, bad = by_label(feedback(seed, phrase=(20, 30, 40, 50)))
    bad = bad[: len(good) // 3]
    policy = train(good + bad, seed, kto_batch, shuffled, 0.5, 2e-3, 2, point=point)

    reference = half_right(seed)
    r_good = (logps(policy, good) - logps(reference, good)).mean()
    r_bad = (logps(policy, bad) - logps(reference, bad)).mean()
    return success(policy, seed, length=1), (r_good - r_bad).item()

# ---- What it learns ------------------------------------------------------------------------------

def test_labels_alone_teach_what_is_right_as_well_as_pairs_do():
    after = learned("KTO", 0.0, SEED, passes=1)
    assert 0.4 < success(half_right(SEED), SEED) < 0.6  # 0.47 0.52 0.46 0.48 0.50 0.46
    assert after > 0.9  # 0.99 0.99 0.96 0.99 0.99 0.96
    pairs = learned("DPO", 0.0, SEED, passes=1)
    assert 0.85 < pairs < after + 0.05  # 0.95 0.98 0.92 0.92 0.87 0.94

def test_a_fifth_of_the_labels_may_be_wrong():
    after = learned("KTO", 0.2, SEED, passes=2)  # of the table's four, to be quicker
    assert after > 0.85  # 0.94 0.97 0.92 0.95 0.95 0.94
    assert after > learned("DPO", 0.2, SEED) - 0.05  # 0.94 0.94 0.93 0.90 0.91 0.92
    assert after > learned("SFT", 0.2, SEED) + 0.1  # 0.75 0.78 0.75 0.78 0.80 0.74

def test_further_passes_help_kto_on_wrong_labels_and_harm_dpo_on_wrong_pairs():
    # Rows that look wrong lie where KTO's loss is flat (Proposition 4.1); DPO's is steepest there.
    # KTO goes from 0.89 0.95 0.87 0.88 0.90 0.88 to 0.94 0.97 0.92 0.95 0.95 0.94.
    assert learned("KTO", 0.2, SEED, passes=2) > learned("KTO", 0.2, SEED, passes=1)
    shares = []
    for passes in (1, 4):
        policy = train(feedback(SEED), SEED, dpo_batch, judged, 0.3, 2e-3, passes)
        shares.append(success(policy, SEED))
    # DPO goes from 0.78 0.84 0.86 0.78 0.89 0.81 to 0.72 0.74 0.76 0.67 0.76 0.69.
    assert shares[1] < shares[0] - 0.02

def test_one_desirable_row_for_nine_is_enough_with_the_weights_of_eq_9_and_only_so():
    assert unequal(SEED, lambda_d=9.0) > 0.8  # 0.95 0.97 0.89 0.90 0.91 0.91
    assert unequal(SEED, lambda_d=1.0) < 0.65  # 0.00 0.00 0.51 0.00 0.00 0.00

def test_z0_keeps_the_loss_from_saturating_where_all_completions_grow_likelier():
    # z0 grows with all r, and what is left to gain is r - z0: good rows must get more than bad.
    # Held at 0, beta * r soon is 10: no good row can get better and no bad row is worth a try, both
    # are left without gradient (Eq. 10), and right and wrong answers stay as likely as they were.
    share, margin = likelier(SEED, kto.reference_point)
    assert share > 0.8  # 0.94 0.95 0.92 0.97 0.96 0.93
    assert margin > 4  # 7.4 7.2 7.5 8.4 8.0 5.9
    share, margin = likelier(SEED, no_reference_point)
    assert share < 0.75  # 0.59 0.60 0.60 0.54 0.54 0.47
    assert margin < 3  # 0.7 0.3 0.9 0.6 0.5 0.5

# ---- The first command, a real model, and what the README says -----------------------------------

README = Path(kto.__file__).with_name("README.md").read_text()

def readme_block(start):
    """The README's block of code that starts so."""
    return re.search(rf"```\w+\n({start}.*?)```", README, flags=re.DOTALL)[1]

def defined_by(start):
    names = {}
    exec(readme_block(start), names)
    return names

def test_the_first_command_learns_and_its_reference_point_lives(
        read_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the sample is found from any folder
    read_flags()
    with mock.patch("signal.signal"):
        kto.main()
    log = read_log(Path("kto-tiny"))
    assert sum(entry["z0"] > 0 for entry in log) > len(log) / 2
    assert log[-1]["eval_accuracy"] > 0.9

    # Before, it is rude in words of an undesirable row; after, polite in those of a desirable one.
    answers = re.findall(r"before (.*?)\..*\n  after  (.*?)\.", capsys.readouterr().out)
    sample = Path(kto.Config.data).read_text()
    assert len(answers) == 3
    for before, after in answers:
        assert re.search(f'"{before}.*false', sample) and re.search(f'"{after}.*true', sample)

@pytest.mark.skipif("KTO_TEST_MODEL" not in os.environ, reason="needs KTO_TEST_MODEL=FOLDER")
def test_a_real_model_starts_at_its_reference_and_learns(small, tmp_path):
    folder = os.environ["KTO_TEST_MODEL"]
    start(small, tmp_path, f"--model {folder} --epochs 2 --batch_size 21 --holdout 0 --lr 2e-5")
    first, last = read_log(tmp_path)  # of two steps, each with all rows
    assert first["margin"] == first["kl"] == 0
    assert last["loss"] < first["loss"]

def test_the_readmes_three_rows_are_right():
    z0 = kto.reference_point(tensor([3.0, -1.0, 1.0]), torch.zeros(3))
    losses = kto.kto_loss(tensor([4.0, -1.0, -6.0]), torch.zeros(3), z0, desirable("DUD"))
    for loss in losses:
        assert f"| {loss:.4f} |\n" in README
    assert f"is their mean, {losses.mean():.3f}" in README

def test_the_readmes_training_step_has_the_loss_of_kto_step():
    step = defined_by("import torch\nfrom kto")["kto_training_step"]
    policy, reference = policy_and_reference()
    with torch.no_grad():
        expected = kto.kto_step(policy, reference, batch_of("DUUDU"))["loss"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    batch = (PROMPTS, COMPLETIONS, desirable("DUUDU"))
    assert step(policy, reference, optimizer, *batch) == pytest.approx(expected, rel=1e-5)

def test_the_readmes_converters_make_rows():
    make = defined_by("def thumbs_to_rows")
    events = [{"question": "a", "answer": "b", "thumb": thumb} for thumb in ("down", None, "up")]
    rows = make["thumbs_to_rows"](events)
    rows += make["pair_to_rows"]({"prompt": "a", "chosen": "b", "rejected": "c"})
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows.append(make["sharegpt_to_row"](turns, True))
    assert [row["label"] for row in rows] == [False, True, True, False, True]
    for row, answer in zip(rows, "bbbcb"):
        assert texts(byte_tokenizer(BARE), row["prompt"], row["completion"]) == (
            f"user: a\nassistant:  -> {answer}</s>")

def test_the_readmes_rows_are_rows_and_its_metrics_those_of_the_log(whole):
    for line in readme_block('{"prompt"').splitlines():
        kto.encode(kto.parse_row(line.encode()), byte_tokenizer(CHATML))
    explained = set(re.findall(r"`(\w+)`", README.split("## Read the log")[1]))
    assert explained >= read_log(whole)[0].keys() - {"step"}

def test_the_readmes_script_takes_the_same_rows_to_trl(small, tmp_path):
    pytest.importorskip("trl", reason="needs: pip install trl==1.16.0")
    script, output = tmp_path / "kto_with_trl.py", tmp_path / "output"
    script.write_text(readme_block("# kto_with_trl.py"))
    program = [sys.executable, script, small / "model", small / "rows.jsonl", output]
    printed = subprocess.check_output(program, text=True)
    assert "'loss': '0.5'" in printed and "'kl': '0'" in printed  # the first step
    assert (output / "model.safetensors").exists()

# ---- The paper in miniature: python test_kto.py --------------------------------------------------

def mean(function, *arguments, **settings):
    """The mean of what `function` returns with the seeds 0 to 3."""
    results = [function(*arguments, seed=seed, **settings) for seed in tqdm(range(4))]
    return tensor(results).mean(dim=0).tolist()

def main():
    print("right answers, mean of seeds 0 to 3; in brackets beta, learning rate, passes")
    print(f"{'':14}{'labels clean':25}{'a fifth wrong':25}30% wrong")
    for name, method in METHODS.items():
        best = method[2]
        line = f"{name:14}"
        for wrong, setting in best.items():
            share = mean(learned, name, wrong)
            line += f"{share:.2f} {str(setting):20}"
        print(line)

    print("\none desirable row for nine                    success")
    for lambda_d in (9.0, 1.0):
        share = mean(unequal, lambda_d=lambda_d)
        print(f"KTO, lambda_d = {lambda_d} {share:34.2f}")

    print("\nall completions grow likelier                 success  margin in nats")
    for name, point in (("KTO", kto.reference_point), ("KTO, z0 = 0", no_reference_point)):
        share, margin = mean(likelier, point=point)
        print(f"{name:45} {share:7.2f} {margin:15.2f}")

if __name__ == "__main__":
    main()
