# SPDX-License-Identifier: MIT-0
"""Why kto.py is right: each test is a claim, in the order of the file. Offline, on a CPU."""

import copy
import dataclasses
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook

import kto

torch.set_num_threads(1)  # which is faster for models as small as these
kto.DEVICE = torch.device("cpu")

# ---- Independent versions, written from the paper, and random models to try them on --------------

def paper(policy, reference, policy_kl, reference_kl, desirable, beta, lambda_d, lambda_u):
    """(losses, z0, raw KL, gradient of the mean loss) by Eq. 8 and Eq. 10, in Python's floats."""
    m = len(policy)
    kl = sum(p - q for p, q in zip(policy_kl, reference_kl)) / m
    z0 = max(0.0, kl)
    losses, gradient = [], []
    for p, q, is_desirable in zip(policy, reference, desirable):
        weight, sign = (lambda_d, 1) if is_desirable else (lambda_u, -1)
        s = 1 / (1 + math.exp(-sign * beta * (p - q - z0)))
        losses.append(weight - weight * s)
        gradient.append(-sign * weight * beta * s * (1 - s) / m)
    return losses, z0, kl, gradient

def plain_logp(model, x, y):
    """log pi(y|x) of one row on its own: no batch, no padding, one token after the other."""
    logits = model(torch.tensor([[*x, *y]]), use_cache=False).logits[0].double()
    return sum(logits[len(x) + t - 1].log_softmax(-1)[token] for t, token in enumerate(y))

def plain_step(policy, reference, batch, config):
    """What kto_step does, one row after the other: Eq. 10 into the policy's gradient, the log."""
    x, y = [row["prompt"] for row in batch], [row["completion"] for row in batch]
    desirable = [row["label"] for row in batch]
    logps = [plain_logp(policy, *pair) for pair in zip(x, y)]
    with torch.no_grad():
        p = [logp.item() for logp in logps]
        q = [plain_logp(reference, *pair).item() for pair in zip(x, y)]
        mismatched = [(x[i], y[(i + 1) % len(y)]) for i in range(len(x))]
        kl = [[plain_logp(m, *pair).item() for pair in mismatched] for m in (policy, reference)]
    weights = (config.beta, config.lambda_d, config.lambda_u)
    losses, z0, raw, gradient = paper(p, q, *kl, desirable, *weights)
    sum(g * logp for g, logp in zip(gradient, logps)).backward()
    r = {True: [], False: []}
    for i, label in enumerate(desirable):
        r[label].append(p[i] - q[i])
    d, u = (sum(r[label]) / len(r[label]) if r[label] else None for label in (True, False))
    right = sum(v > z0 for v in r[True]) + sum(v <= z0 for v in r[False])
    return {"loss": sum(losses) / len(losses), "accuracy": right / len(x), "z0": z0, "kl": raw,
            "reward_desirable": d, "reward_undesirable": u,
            "margin": d - u if r[True] and r[False] else None}

def add_noise(model, std, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += std * torch.randn(weight.shape, generator=generator)
    return model

def random_model(architecture="llama", std=0.5, **settings):
    """Two layers, 100 tokens, EOS = pad = 0. Every weight is large, so that every mistake shows."""
    small = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(architecture, **small | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data.zero_()
    return add_noise(model, std, seed=0)

def letters():
    """A tokenizer in which a is 1, b is 2 ... and EOS is 0."""
    ids = {"<eos>": 0} | {chr(96 + i): i for i in range(1, 27)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")

def gradients(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])

def assert_logged(logged, expected, rel):
    for name, value in expected.items():  # None: a class without rows
        assert logged[name] == (value and pytest.approx(value, rel=rel, abs=1e-6)), name

# ---- Scoring -------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 0, 4], [20, 21]]  # 0 is EOS and padding
COMPLETIONS = [[15, 16, 0], [17, 18, 19, 20, 21, 22, 0], [0], [30, 0, 31, 0], [40, 41, 42, 43, 44]]

ARCHITECTURES = {
    "gpt2": {}, "gpt_neox": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "phi": {},
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "olmo2": {}, "phi3": {}, "stablelm": {},
    "mistral": {"sliding_window": 4}, "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4}, "falcon": {}, "bloom": {},
    "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.25}, "mamba": {},
    "mixtral": {"num_local_experts": 4}, "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
}

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_of_a_ragged_batch_equal_those_of_each_row_alone(architecture):
    model = random_model(architecture, **ARCHITECTURES[architecture])
    with torch.no_grad():
        logps = kto.completion_logps(model, PROMPTS, COMPLETIONS)
        alone = [plain_logp(model, x, y).item() for x, y in zip(PROMPTS, COMPLETIONS)]
    assert logps.tolist() == pytest.approx(alone, rel=1e-5)

def test_each_completion_token_is_scored_once_eos_too_and_neither_prompt_nor_padding():
    # All weights are 0, so each token has probability 1/100, and a sum counts the tokens.
    model, scored = random_model(std=0.0), []
    model.lm_head.register_forward_hook(lambda head, args, logits: scored.append(logits.shape))
    logps = kto.completion_logps(model, PROMPTS, COMPLETIONS)
    assert logps.tolist() == pytest.approx([-n * math.log(100) for n in (3, 7, 1, 4, 5)])
    assert scored == [(1, 3 + 7 + 1 + 4 + 5, 100)]  # the large tensor has no other positions either

def test_log_probs_are_summed_in_float32_when_the_model_computes_in_bfloat16():
    # The sum is near -2,600, where bfloat16 knows only multiples of 16.
    model, y = random_model(std=0.5).bfloat16(), list(range(1, 60))
    logp = kto.completion_logps(model, [[5]], [y])
    assert logp.dtype == torch.float32
    assert logp.item() == pytest.approx(plain_logp(model, [5], y).item(), rel=1e-5)

def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="prompt without tokens"):
        kto.completion_logps(random_model(), [[5], []], [[6], [7]])
    with pytest.raises(ValueError):  # two prompts, one completion
        kto.completion_logps(random_model(), [[5], [6]], [[7]])

# ---- The formula ---------------------------------------------------------------------------------

def test_three_rows_worked_by_hand():
    # The mismatched pairs differ by 4, -1 and 0 nats: z0 = 3 / 3 = 1. (Clamped singly: 4 / 3.)
    z0 = kto.reference_point(torch.tensor([-6.0, -9.0, -7.0]), torch.tensor([-10.0, -8.0, -7.0]))
    assert z0.item() == 1.0
    # beta = 1/2 and r - z0 = 2 ln 3, 2 ln 3, 0: sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4,
    # sigmoid(0) = 1/2. With lambda_d = 2, lambda_u = 4 the losses are 2 - 2 * 3/4 = 1/2,
    # 4 - 4 * 1/4 = 3 and 2 - 2 * 1/2 = 1; their slopes, -+lambda * beta * s * (1 - s), are
    # -2/2 * 3/16, +4/2 * 3/16 and -2/2 * 1/4.
    r = torch.tensor([1 + 2 * math.log(3), 1 + 2 * math.log(3), 1.0], requires_grad=True)
    losses = kto.kto_loss(r - 20, torch.tensor(-20.0), z0, torch.tensor([True, False, True]),
                          beta=0.5, lambda_d=2.0, lambda_u=4.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.5, 3.0, 1.0], abs=1e-5)
    assert r.grad.tolist() == pytest.approx([-3 / 16, 3 / 8, -1 / 4], abs=1e-5)

def test_the_defaults_are_the_papers():
    # beta = 0.1 and both weights 1: r = 10 and z0 = 0 give 1 - sigmoid(1) and 1 - sigmoid(-1).
    losses = kto.kto_loss(torch.tensor(10.0), torch.tensor(0.0), 0.0, torch.tensor([True, False]))
    assert losses.tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)
    assert (kto.Config().beta, kto.Config().lambda_d, kto.Config().lambda_u) == (0.1, 1.0, 1.0)

@pytest.mark.parametrize("desirable, beta, lambda_d, lambda_u, drift", [
    ([True, False, True, True, False], 0.1, 1.0, 1.0, 3.0),  # drift: the sign of the raw KL
    ([True, False, True, True, False], 0.3, 1.4, 0.7, -3.0),
    ([False, False, True, False, False, False, False], 0.05, 13.33, 1.0, 20.0),
    ([True, True, False], 1.0, 0.5, 2.0, -1.0),
    ([True, True, True], 0.5, 1.4, 0.7, 2.0),
    ([False, False, False, False, False], 0.25, 1.4, 0.7, 2.0),
])
def test_value_and_gradient_are_those_of_eq_8_and_eq_10(desirable, beta, lambda_d, lambda_u, drift):
    torch.manual_seed(0)
    reference, reference_kl = -300 * torch.rand(2, len(desirable), dtype=torch.float64)
    policy = (reference + drift + 4 * torch.randn(len(desirable))).requires_grad_()
    policy_kl = (reference_kl + drift + torch.randn(len(desirable))).requires_grad_()
    weights = (beta, lambda_d, lambda_u)
    columns = [column.tolist() for column in (policy, reference, policy_kl, reference_kl)]
    losses, z0, raw, gradient = paper(*columns, desirable, *weights)
    assert raw * drift > 0

    point = kto.reference_point(policy_kl, reference_kl)
    result = kto.kto_loss(policy, reference, point, torch.tensor(desirable), *weights)
    result.mean().backward()
    assert point.item() == pytest.approx(z0)
    assert result.tolist() == pytest.approx(losses)
    assert policy.grad.tolist() == pytest.approx(gradient)
    assert not point.requires_grad and policy_kl.grad is None  # z0 is a constant

    def mean_loss(policy):
        return kto.kto_loss(policy, reference, point, torch.tensor(desirable), *weights).mean()

    assert torch.autograd.gradcheck(mean_loss, policy)  # against finite differences

def test_a_row_far_from_z0_is_finite_and_has_no_gradient():  # Proposition 4.1
    r = torch.tensor([1e4, -1e4, 1e30, -1e30] * 2, requires_grad=True)
    desirable = torch.tensor([True] * 4 + [False] * 4)
    losses = kto.kto_loss(r, torch.zeros(8), torch.tensor(5.0), desirable, 0.1, 1.5, 0.5)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1.5, 0.0, 1.5, 0.5, 0.0, 0.5, 0.0]
    assert r.grad.tolist() == [0.0] * 8

def test_a_label_that_is_not_bool_is_refused():
    with pytest.raises(RuntimeError, match="boolean"):
        kto.kto_loss(torch.zeros(2), torch.zeros(2), 0.0, torch.tensor([1, 0]))

# The code of the paper's authors: ContextualAI/HALOs, commit 4831988, KTOTrainer.loss in train/
# trainers.py, run unchanged in float32 with torch 2.13.0 on a CPU. Four cases, in each the columns
# policy, reference, policy_kl, reference_kl, desirable, and what came out: losses, gradient.
HALOS = [
    # z0, beta, lambda_d, lambda_u
    ((0.969537, 0.1, 1.0, 1.7), [
        (-36.1593, -34.8083, -245.7608, -247.9992, True, 0.557755, -0.00493329),
        (-102.7383, -102.3106, -260.3434, -261.0626, False, 0.790714, 0.00845865),
        (-205.8741, -202.1323, -252.5092, -249.589, True, 0.615652, -0.00473249),
        (-35.9153, -38.6803, -279.9997, -281.271, False, 0.926103, 0.00843186),
        (-122.114, -121.7887, -233.3775, -236.9165, False, 0.795046, 0.00846447)]),
    ((0.0, 0.1, 1.4, 1.0), [  # the raw KL is -4.2
        (-186.3869, -180.5016, -92.3519, -87.9203, False, 0.356972, 0.00459086),
        (-42.3944, -37.5244, -202.7547, -195.5823, True, 0.867159, -0.00660083),
        (-64.1773, -53.7609, -85.3548, -75.5255, True, 1.034833, -0.00539839),
        (-73.0085, -72.6348, -165.0435, -167.6018, False, 0.490659, 0.00499826),
        (-188.7975, -181.9478, -237.4356, -235.1268, True, 0.930786, -0.00623911)]),
    ((21.644724, 0.05, 13.33, 1.0), [
        (-110.0761, -112.9572, -286.2141, -303.8955, False, 0.281268, 0.00336927),
        (-90.6101, -92.9806, -81.7758, -98.0912, False, 0.276136, 0.00333141),
        (-42.1689, -48.4457, -285.566, -316.5034, True, 9.106708, -0.0480874)]),
    ((2.862381, 0.25, 1.0, 1.0), [  # one class
        (-45.5757, -36.4654, -303.5955, -305.5703, False, 0.047735, 0.00284105),
        (-82.228, -73.4197, -230.3614, -237.5157, False, 0.051287, 0.00304104),
        (-123.6518, -124.4447, -162.7621, -161.0788, False, 0.373467, 0.0146243),
        (-120.436, -128.5651, -160.9534, -164.9571, False, 0.788629, 0.0104183)]),
]

@pytest.mark.parametrize("settings, rows", HALOS)
def test_losses_z0_and_gradients_equal_those_of_the_papers_authors(settings, rows):
    z0, *weights = settings
    *columns, desirable, losses, gradient = zip(*rows)
    policy, reference, policy_kl, reference_kl = map(torch.tensor, columns)
    point = kto.reference_point(policy_kl, reference_kl)
    policy.requires_grad_()
    result = kto.kto_loss(policy, reference, point, torch.tensor(desirable), *weights)
    result.mean().backward()
    assert point.item() == pytest.approx(z0, abs=1e-5)
    assert result.tolist() == pytest.approx(losses, abs=1e-5)
    assert policy.grad.tolist() == pytest.approx(gradient, rel=2e-5)

# ---- Pairing and step ----------------------------------------------------------------------------

ROWS = [("abc", "no", True), ("k", "perhaps", False), ("what", "yesyes", False), ("ask", "a", True),
        ("zz", "quite", False)]
SETTINGS = kto.Config(beta=0.3, lambda_d=1.4, lambda_u=0.7, micro_batch_size=3, dtype="float32")

def parsed(x, y, label=True):
    """The row that kto.py reads from a line of prompt, completion and label, as of rows.jsonl:3."""
    line = json.dumps({"prompt": x, "completion": y, "label": label}).encode()
    return kto.parse_row(line) | {"where": "rows.jsonl:3"}

def encoded(rows=ROWS):
    return [kto.encode(parsed(*row), letters(), SETTINGS) for row in rows]

def policy_and_reference(raw_kl):
    """Two models some noise apart. Exchanging them changes the sign of the raw KL."""
    policy = random_model(std=0.3)
    reference = add_noise(copy.deepcopy(policy), std=0.1, seed=3)
    return (policy, reference) if raw_kl > 0 else (reference, policy)

@pytest.mark.parametrize("m", [2, 3, 5, 8])
def test_each_prompt_meets_its_own_completion_once_and_the_next_rows_once(monkeypatch, m):
    pairs, learned, score = {"policy": [], "reference": []}, [], kto.completion_logps

    def spy(model, x, y):
        logps, scored = score(model, x, y), list(zip(map(tuple, x), map(tuple, y)))
        pairs["policy" if model is policy else "reference"] += scored
        learned.extend(scored if logps.requires_grad else [])
        return logps

    monkeypatch.setattr(kto, "completion_logps", spy)
    policy, reference = policy_and_reference(raw_kl=1)
    # Row i is (10 + i; i times 50 + i), so lengths differ.
    x, y = [(10 + i,) for i in range(m)], [(50 + i,) * (i + 1) for i in range(m)]
    batch = [{"prompt": x[i], "completion": y[i], "label": i % 3 == 0, "cut": [False, False]}
             for i in range(m)]
    kto.kto_step(policy, reference, batch, SETTINGS)
    following = [y[1], y[0]] if m == 2 else [*y[1:], y[0]]
    expected = sorted([*zip(x, y), *zip(x, following)])
    assert sorted(pairs["policy"]) == sorted(pairs["reference"]) == expected
    assert sorted(learned) == sorted(zip(x, y))  # only these are scored with a graph for gradients

@pytest.mark.parametrize("labels", [[True, False, False, True, False], [True] * 5, [False] * 5])
@pytest.mark.parametrize("raw_kl", [1, -1])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_a_step_equals_the_plain_computation_whatever_the_micro_batch(
        micro_batch_size, raw_kl, labels):
    policy, reference = policy_and_reference(raw_kl)
    plain_policy = copy.deepcopy(policy)
    rows = encoded([(x, y, label) for (x, y, _), label in zip(ROWS, labels)])
    config = dataclasses.replace(SETTINGS, micro_batch_size=micro_batch_size)
    logged = kto.kto_step(policy, reference, rows, config)
    plain = plain_step(plain_policy, reference, rows, config)
    assert plain["kl"] * raw_kl > 0
    assert_logged(logged, plain, rel=1e-4)
    torch.testing.assert_close(gradients(policy), gradients(plain_policy), rtol=1e-4, atol=1e-6)
    assert all(weight.grad is None for weight in reference.parameters())

def test_rows_of_like_length_go_together_and_the_longest_first(monkeypatch):
    # Lengths 6, 2, 9, 4, 7 in micro-batches of 2: what does not fit in memory fails at once.
    lengths = []
    monkeypatch.setattr(kto, "completion_logps", lambda model, x, y: lengths.append(
        [len(a) + len(b) for a, b in zip(x, y)]) or torch.zeros(len(x)))
    config = dataclasses.replace(SETTINGS, micro_batch_size=2)
    kto.score(None, [[1]] * 5, [[2] * n for n in (5, 1, 8, 3, 6)], config)
    assert lengths == [[9, 7], [6, 4], [2]]

def test_evaluation_gives_the_figures_of_a_step_without_its_gradient():
    policy, reference = policy_and_reference(raw_kl=1)
    logged = kto.kto_step(policy, reference, encoded(), SETTINGS, train=False)
    assert all(weight.grad is None for weight in policy.parameters())
    assert logged == kto.kto_step(policy, reference, encoded(), SETTINGS)

def test_bfloat16_is_for_the_forward_passes_and_gradients_are_float32():
    policy, reference = policy_and_reference(raw_kl=1)
    x, y = [row["prompt"] for row in encoded()], [row["completion"] for row in encoded()]
    half = dataclasses.replace(SETTINGS, dtype="bfloat16")
    full, rounded = kto.score(policy, x, y, SETTINGS), kto.score(policy, x, y, half)
    assert not torch.equal(full, rounded)
    torch.testing.assert_close(full, rounded, rtol=0.05, atol=0.0)
    kto.kto_step(policy, reference, encoded(), half)
    assert gradients(policy).dtype == torch.float32

def run_kto(monkeypatch, folder, model, rows, **flags):
    """python kto.py in this process: (policy, reference, settings, optimizer, metrics.jsonl)."""
    output = folder / f"output{len(list(folder.iterdir()))}"
    model.save_pretrained(folder / "model")
    letters().save_pretrained(folder / "model")
    rows = [dict(zip(("prompt", "completion", "label"), row)) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"model": folder / "model", "data": folder / "data.jsonl", "output": output}
    flags = {**files, "holdout": 0, "dtype": "float32", **flags}
    seen = []

    def spy(policy, reference, tokenizer, config, *rest):
        seen.extend([policy, reference, config])
        train(policy, reference, tokenizer, config, *rest)

    with monkeypatch.context() as patch:
        train = kto.train
        patch.setattr(kto, "train", spy)
        patch.setattr(kto.signal, "signal", lambda *_: None)  # leave pytest its Ctrl-C
        patch.setattr("sys.argv", ["kto.py", *(f"--{name}={flags[name]}" for name in flags)])
        hook = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
        kto.main()
        hook.remove()
    return *seen[:4], [json.loads(line) for line in open(output / "metrics.jsonl")]

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_step_0_every_reward_and_z0_are_exactly_0_in_spite_of_dropout(
        monkeypatch, tmp_path, dtype):
    model = random_model("gpt2", std=0.3)
    assert model.config.resid_pdrop == model.config.attn_pdrop == model.config.embd_pdrop == 0.1
    rows = [("abc", "no" * i, i < 3) for i in range(1, 9)]  # of 8 rows 2 are desirable
    first = run_kto(monkeypatch, tmp_path, model, rows, batch_size=8, epochs=1, dtype=dtype,
                    micro_batch_size=3, lambda_d=1.5, lambda_u=0.5)[-1][0]
    expected = {"step": 0, "kl": 0, "z0": 0, "reward_desirable": 0, "reward_undesirable": 0,
                "margin": 0, "loss": (2 * 1.5 + 6 * 0.5) / 8 / 2}
    assert {name: first[name] for name in expected} == expected

def test_a_whole_run_equals_a_plain_loop_and_leaves_the_reference_alone(monkeypatch, tmp_path):
    rows = ROWS + [("one", "more", True), ("cat", "b", False), ("sky", "blue", True),
                   ("ten", "eleven", False), ("ab", "cdefg", False), ("left", "over", True)]
    # 11 rows make 2 steps of 5 an epoch; one row is left over. Of 12 steps, 1 is warm-up.
    flags = {"batch_size": 5, "epochs": 6, "lr": 3e-3, "beta": 0.3, "lambda_d": 30, "lambda_u": 22}
    runs = [run_kto(monkeypatch, tmp_path, random_model(std=0.3), rows, **flags, micro_batch_size=b)
            for b in (1, 3, 8)]

    policy, reference = random_model(std=0.3), random_model(std=0.3).requires_grad_(False)
    before = torch.nn.utils.parameters_to_vector(reference.parameters()).clone()
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    expected = []
    for step, batch in enumerate(kto.batches(runs[0][2])):
        batch = [kto.encode(row, letters(), runs[0][2]) for row in batch]
        policy.zero_grad()
        logged = plain_step(policy, reference, batch, runs[0][2])
        norm = gradients(policy).norm().item()
        for weight in policy.parameters():
            weight.grad *= min(1.0, 10.0 / norm)
        lr = 3e-3 * (step if step < 1 else (1 + math.cos(math.pi * (step - 1) / 11)) / 2)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        expected.append({"step": step, **logged, "grad_norm": norm, "lr": lr})
    assert len(expected) == 12
    assert {step["grad_norm"] > 10 for step in expected} == {True, False}  # clipped, and not
    assert {step["kl"] > 0.1 for step in expected} == {True, False}

    for trained, untrained, _, optimizer, log in runs:
        after = torch.nn.utils.parameters_to_vector(trained.parameters())
        assert (after - before).abs().mean() > 1e-3
        torch.testing.assert_close(
            after, torch.nn.utils.parameters_to_vector(policy.parameters()), rtol=0, atol=1e-5)
        assert torch.equal(torch.nn.utils.parameters_to_vector(untrained.parameters()), before)
        assert not any(w.requires_grad or w.grad is not None for w in untrained.parameters())
        optimized = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
        assert optimized == [id(weight) for weight in trained.parameters()]
        for mine, plain in zip(log, expected, strict=True):
            assert_logged(mine, plain, rel=1e-4)

# ---- TRL -----------------------------------------------------------------------------------------

# What KTOTrainer of TRL 1.16.0 (transformers 5.23.0, torch 2.13.0, CPU) logs for ROWS, SETTINGS and
# these two models in the test below, by the sign of the raw KL: loss, kl (which is z0), grad_norm.
TRL = {1: (0.5147486, 1.4310611, 0.4185264), -1: (0.4808456, 0.0, 0.4750189)}

@pytest.mark.parametrize("raw_kl", [1, -1])
def test_loss_z0_and_gradient_norm_equal_the_numbers_that_trl_gave(raw_kl):
    policy, reference = policy_and_reference(raw_kl)
    logged = kto.kto_step(policy, reference, encoded(), SETTINGS)
    mine = (logged["loss"], logged["z0"], gradients(policy).norm().item())
    assert logged["kl"] * raw_kl > 0
    assert mine == pytest.approx(TRL[raw_kl], rel=4e-5)

@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("raw_kl", [1, -1])
def test_trl_gives_those_numbers(tmp_path, raw_kl):
    trl = pytest.importorskip("trl", reason="needs: pip install trl==1.16.0")
    # TRL pairs x with the completion of the row *before*: in reverse order, that is the row after.
    rows = [dict(zip(("prompt", "completion", "label"), row)) for row in reversed(ROWS)]
    policy, reference = policy_and_reference(raw_kl)
    arguments = trl.KTOConfig(
        str(tmp_path), per_device_train_batch_size=5, max_steps=1, logging_steps=1, use_cpu=True,
        beta=SETTINGS.beta, desirable_weight=SETTINGS.lambda_d, bf16=False, report_to=[],
        undesirable_weight=SETTINGS.lambda_u, save_strategy="no", disable_tqdm=True)
    tokenizer = letters()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.KTOTrainer(policy, reference, arguments, processing_class=tokenizer,
                             train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["loss"], log["kl"], log["grad_norm"]) == pytest.approx(TRL[raw_kl], rel=4e-5)

# ---- The data: rows ------------------------------------------------------------------------------

GOOD = b'{"prompt": "Say hi", "completion": "hi", "label": true}'

def write_rows(path, rows):
    """`rows` of (prompt, completion, label) as JSONL at `path`; the path as text."""
    keys = ("prompt", "completion", "label")
    path.write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    return str(path)

def say(count, n_desirable=None):
    """Rows that differ: the first n_desirable of `count` (default: every other) are desirable."""
    good = [i % 2 == 0 if n_desirable is None else i < n_desirable for i in range(count)]
    return [(f"Say {i}", f"{i}" if is_good else "no", is_good) for i, is_good in enumerate(good)]

def prompt(row):
    return row["prompt"][-1]["content"]

def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["kto.py", *map(str, flags)])
    kto.main()

BAD_ROWS = [
    ('{"prompt": "a", "completion": "b", "label": tr', "Expecting value"),
    ("{'prompt': 'a', 'completion': 'b', 'label': True}", "enclosed in double quotes"),
    ('{"prompt": "a", "completion": "b", "label": true,}', "trailing comma|in double quotes"),
    ("[", "Expecting value"),  # the first line of an array that fills a file
    ("[" * 100_000, "recursion"),
    (f"[{GOOD.decode()}]", r"found \[{'completion': 'hi', 'label': True, 'prompt': 'Say hi'}\]"),
    ('"a"', "found 'a'"),
    ("{}", "found {}"),
    ('{"prompt": "a", "text": "b", "label": 1}', "found {'label': 1, 'prompt': 'a', 'text': 'b'}"),
    ('{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}', "found {'a': 1, 'b': 2, 'c': 3, 'd': 4, 'e': 5}"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}',
     "a pair; write two rows, chosen with label true, rejected with false"),
    *((f'{{"prompt": "a", "completion": "b", "label": {label}}}', f"'label': {shown}, 'prompt'")
      for label, shown in [('"true"', "'true'"), ('"good"', "'good'"), ("2", "2"), ("-1", "-1"),
                           ("0.5", "0.5"), ("null", "None"), ("NaN", "nan"), ("[1]", r"\[1\]")]),
    *((f'{{"prompt": "a", "completion": {y}, "label": true}}', f"{{'completion': {shown}, 'label'")
      for y, shown in [("null", "None"), ("5", "5"), ("[]", r"\[\]"), ('["b"]', r"\['b'\]"),
                       ('[{"role": "user", "content": "b"}]',
                        r"\[{'content': 'b', 'role': 'user'}\]"),
                       ('[{"role": "assistant", "content": "b"}, 1]', r"\[{.*'assistant'}, 1\]"),
                       ('{"role": "assistant", "content": "b"}', "{.* 'assistant'}")]),
    *((f'{{"prompt": {x}, "completion": "b", "label": true}}', f"'prompt': {shown}}}")
      for x, shown in [("5", "5"), ("null", "None"), ("[]", r"\[\]"),
                       ('{"role": "user", "content": "a"}', "{'content': 'a', 'role': 'user'}")]),
    *((f'{{"prompt": "a", "completion": {y}, "label": true}}', f"no role or no text in {shown}")
      for y, shown in [('""', "{'content': '', 'role': 'assistant'}"),
                       ('" \\n\\t"', r"{'content': ' \\n\\t', 'role': 'assistant'}"),
                       ('[{"role": "assistant"}]', "{'role': 'assistant'}"),
                       ('[{"role": "assistant", "content": null}]', "{'content': None, .*}")]),
    *((f'{{"prompt": {x}, "completion": "b", "label": true}}', f"no role or no text in {shown}")
      for x, shown in [('" "', "{'content': ' ', 'role': 'user'}"), ('["a"]', "'a'"),
                       ('[{"content": "a"}]', "{'content': 'a'}"),
                       ('[{"role": 1, "content": "a"}]', "{'content': 'a', 'role': 1}"),
                       ('[{"role": "user", "content": "a"}, {"role": "x"}]', "{'role': 'x'}")]),
    (b'{"prompt": "\xff", "completion": "b", "label": true}', "can't decode byte 0xff"),
    ('{"prompt": "\\ud83d", "completion": "b", "label": true}', "surrogates not allowed"),
]
A_ROW = '; a row is one line of JSON, {"prompt": text, "completion": text, "label": true or false}'

@pytest.mark.parametrize("line, found", BAD_ROWS)
def test_an_unusable_row_is_named_before_a_model_is_loaded(
        line, found, tmp_path, monkeypatch):
    # An editor shows the bad row as line 3. There is no model: had it been asked for, the message
    # would be about that.
    line = line if isinstance(line, bytes) else line.encode()
    file, output = tmp_path / "rows.jsonl", tmp_path / "output"
    file.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(kto.InputError) as error:
        main(monkeypatch, "--data", file, "--model", tmp_path / "no-model", "--output", output)
    message = str(error.value)
    assert message.startswith(f"{file}:3: ") and message.endswith(A_ROW)
    assert re.search(found, message) and "\n" not in message and len(message) < 400
    assert not output.exists()

@pytest.mark.parametrize("content, error, found", [
    (None, OSError, "No such file.*rows.jsonl"), ("a folder", OSError, "directory.*rows.jsonl"),
    (b"", kto.InputError, "rows.jsonl: 0 rows to train on; a step needs two"),
    (b"\n\n", kto.InputError, "rows.jsonl: 0 rows to train on; a step needs two"),
    (GOOD, kto.InputError, "rows.jsonl: 1 rows to train on; a step needs two")])
def test_a_file_without_two_rows_is_refused(content, error, found, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    if content == "a folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=found):
        main(monkeypatch, "--data", file, "--model", tmp_path / "no-model", "--output", tmp_path)

def test_odd_but_usable_files_are_read_without_a_word(tmp_path, capsys):
    long = "word " * 800_000  # 4 MB
    rows = [  # (a line as it stands in the file, what is read from it)
        (b"\xef\xbb\xbf" + GOOD + b"\r\n", ("Say hi", "hi", True, True)),  # byte order mark, CRLF
        (b"\r\n", None),
        (b" \t\n", None),
        (b'{"id": 7, "label": 0, "prompt": "2024-01-01", "completion": "12.50"}\n',
         ("2024-01-01", "12.50", False, True)),
        ('{"prompt": "a\u2028b\x85c\x0bd", "completion": " b ", "label": false}\n'
         .replace("\x0b", "\\u000b").encode(), ("a\u2028b\x85c\x0bd", " b ", False, True)),
        (GOOD + b"\n", ("Say hi", "hi", True, True)),  # a duplicate
        (json.dumps({"prompt": [{"role": "user", "content": "Hi"}], "label": 1,
                     "completion": [{"role": "assistant", "content": long}]}).encode(),
         ("Hi", long, True, False)),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(line for line, _ in rows))
    config = kto.Config(data=str(file), holdout=0)
    read = [(row["prompt"], row["completion"], row["label"], row["plain"], row["where"])
            for row in kto.read_rows(config)]
    assert read == [
        ([{"role": "user", "content": row[0]}], [{"role": "assistant", "content": row[1]}],
         *row[2:], f"{file}:{number}") for number, (_, row) in enumerate(rows, 1) if row]
    assert all(type(label) is bool for _, _, label, *_ in read)
    kto.check_data(config)
    assert "WARNING" not in capsys.readouterr().out

@pytest.mark.parametrize("n_d, n_u, lambda_d, lambda_u, balance", [
    (1, 10, 1, 1, "= 0.1; Eq. 9 wants 1 to 1.5: --lambda_d 10 to 15\n"),  # §4.2
    (1, 10, 10, 1, "= 1; Eq. 9 wants 1 to 1.5\n"),
    (1, 10, 15, 1, "= 1.5; Eq. 9 wants 1 to 1.5\n"),
    (1, 10, 1, 2, "= 0.05; Eq. 9 wants 1 to 1.5: --lambda_d 20 to 30\n"),
    (1, 10, 2, 1, "= 0.2; Eq. 9 wants 1 to 1.5: --lambda_d 10 to 15\n"),
    (4, 5, 1, 0.5, "= 1.6; Eq. 9 wants 1 to 1.5: --lambda_d 0.625 to 0.9375\n"),
    (9, 1, 1, 1, "= 9; Eq. 9 wants 1 to 1.5: --lambda_d 0.1111 to 0.1667\n"),
    (9, 1, 0.1111, 1, "= 1; Eq. 9 wants 1 to 1.5\n"),  # pasted, what is printed suffices
    (9, 1, 0.1667, 1, "= 1.5; Eq. 9 wants 1 to 1.5\n"),
    (2, 2, 1, 1, "= 1; Eq. 9 wants 1 to 1.5\n"),
    (2, 2, 1, 0, None),
    (2, 2, 0, 1, None),
    (2, 0, 1, 1, None),
    (0, 2, 1, 1, None),
])
def test_unequal_classes_get_the_weight_to_paste(
        n_d, n_u, lambda_d, lambda_u, balance, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", say(n_d + n_u, n_d))
    config = kto.Config(data=data, holdout=0, lambda_d=lambda_d, lambda_u=lambda_u)
    kto.check_data(config)
    out = capsys.readouterr().out
    assert f"n_D = {n_d}, n_U = {n_u}; held out 0 and 0\n" in out
    assert (balance or "WARNING  only one class counts") in out
    assert ("WARNING" in out) == (balance is None)

@pytest.mark.parametrize("n_rows, holdout, per_epoch, said", [
    (24, 0, 4, ""), (22, 0, 3, ", one row left over in each"), (21, 0, 3, ""), (21, 7, 3, "")])
def test_the_steps_are_known_before_the_model_is_loaded(
        n_rows, holdout, per_epoch, said, tmp_path, capsys):
    # By 7: 24 = 3 * 7 + 3; 22 = 3 * 7 + 1, a row on its own; 21 = 3 * 7, and 18 = 2 * 7 + 4.
    data = write_rows(tmp_path / "rows.jsonl", say(n_rows))
    config = kto.Config(data=data, holdout=holdout, batch_size=7, epochs=2)
    assert kto.check_data(config) == (per_epoch, 2 * per_epoch)
    assert f"steps    {2 * per_epoch}, {per_epoch} an epoch{said}\n" in capsys.readouterr().out
    assert len(list(kto.batches(config))) == 2 * per_epoch
    assert kto.check_data(dataclasses.replace(config, max_steps=5))[1] == 5

@pytest.mark.parametrize("n_rows, dropped", [(24, 0), (22, 1)])
def test_every_epoch_has_all_rows_in_an_order_of_its_own(n_rows, dropped, tmp_path):
    # 24 = 7 + 7 + 7 + 3 rows; of 22 = 7 + 7 + 7 + 1 the last has no partner and is dropped.
    data = write_rows(tmp_path / "rows.jsonl", say(n_rows))

    def epochs(seed):
        config = kto.Config(data=data, holdout=0, batch_size=7, epochs=2, seed=seed)
        prompts = [[prompt(row) for row in batch] for batch in kto.batches(config)]
        assert [len(batch) for batch in prompts] == 2 * [7, 7, 7, 3][: 4 - dropped]
        prompts = sum(prompts, [])
        return prompts[: n_rows - dropped], prompts[n_rows - dropped :]

    first, second = epochs(seed=0)
    assert len(set(first)) == len(set(second)) == n_rows - dropped
    in_file = [f"Say {i}" for i in range(n_rows - dropped)]
    assert first != in_file and second != in_file and first != second
    assert epochs(seed=0) == (first, second)
    assert epochs(seed=1)[0] != first

def test_a_file_larger_than_the_buffer_of_the_shuffle_loses_and_doubles_no_row(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", say(10_050))
    config = kto.Config(data=data, holdout=0, batch_size=201, epochs=1)
    prompts = [prompt(row) for batch in kto.batches(config) for row in batch]
    assert sorted(prompts) == sorted(f"Say {i}" for i in range(10_050))

def test_every_kth_row_is_held_out_and_never_taught(tmp_path, monkeypatch):
    # 12 rows behind blank lines, holdout 3: rows 2, 5, 8 and 11 are held out, whatever their lines.
    file = tmp_path / "rows.jsonl"
    file.write_text(Path(write_rows(file, say(12))).read_text().replace("\n", "\n\n"))
    held_out = {"Say 2", "Say 5", "Say 8", "Say 11"}
    others = {f"Say {i}" for i in range(12)} - held_out
    config = kto.Config(data=str(file), holdout=3, batch_size=4, epochs=2)
    assert {prompt(row) for row in kto.read_rows(config, held_out=True)} == held_out
    assert {prompt(row) for batch in kto.batches(config) for row in batch} == others
    none = kto.dataclasses.replace(config, holdout=0)
    assert {prompt(row) for batch in kto.batches(none) for row in batch} == others | held_out
    # Nor does the tiny model see them before KTO does; which rows it is taught is the claim here,
    # so the teaching itself is left out.
    seen, encode = set(), kto.encode
    monkeypatch.setattr(kto, "encode", lambda row, *rest: seen.add(prompt(row)) or
                        encode(row, *rest))
    monkeypatch.setattr(kto, "tqdm", lambda steps, **_: [])
    first, second = (kto.tiny_model(config)[1].lm_head.weight for _ in range(2))
    assert seen == others and torch.equal(first, second)  # the same seed, the same model

# ---- The data: tokens ----------------------------------------------------------------------------

CHATML = (  # the end token is not EOS, and a newline follows it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA = (  # writes BOS itself, ends in EOS, knows no system turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system turn') }}{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
BARE = (  # no end token at all
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}")
FORGETS = "{{ messages[-1].content }}"  # an answer changes what stands before it
ASKS = "{{ messages[0].content }}"  # an answer is left out

SYSTEM, USER, ANSWER, USER_2, ANSWER_2 = (
    {"role": role, "content": content} for role, content in [
        ("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"),
        ("assistant", "See you")])

def byte_tokenizer(template=None, adds_bos=False, pad="<pad>", eos="</s>"):
    """One token for a byte, and five special ones, so that decoded text shows every token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"])
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=pad,
        chat_template=template)

def decoded(tokenizer, x, y, **settings):
    row = kto.encode(parsed(x, y), tokenizer, kto.Config(**settings))
    return tokenizer.decode(row["prompt"]), tokenizer.decode(row["completion"]), row["cut"]

@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("template, x, y, prompt, completion", [
    # A plain text: BOS if the tokenizer adds it, and one EOS, which the completion may have.
    (None, "Hi", "Hello", "{bos}Hi", "Hello</s>"),
    (None, "Hi", "Hello</s>", "{bos}Hi", "Hello</s>"),
    (None, "Hi ", " Hello\n", "{bos}Hi ", " Hello\n</s>"),
    # A chat: what the template writes and no more, up to its end token.
    (CHATML, "Hi", "Hello", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
     "Hello<|im_end|>"),
    (CHATML, [USER], "Hello", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
     "Hello<|im_end|>"),
    (CHATML, [SYSTEM, USER, ANSWER, USER_2], [ANSWER_2],
     "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant"
     "\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
     "See you<|im_end|>"),
    (LLAMA, "Hi", [ANSWER], "<s>[INST]Hi[/INST]", "Hello</s>"),
    (LLAMA, [USER, ANSWER, USER_2], [ANSWER_2], "<s>[INST]Hi[/INST]Hello</s>[INST]Bye[/INST]",
     "See you</s>"),
    (BARE, "Hi", "Hello", "user: Hi\nassistant: ", "Hello</s>"),
])
def test_a_prompt_is_what_inference_feeds_and_a_completion_ends_once(
        template, x, y, prompt, completion, adds_bos, pad):
    tokenizer = byte_tokenizer(template, adds_bos, pad)
    prompt = prompt.format(bos="<s>" if adds_bos else "")
    assert decoded(tokenizer, x, y) == (prompt, completion, [False, False])
    if template:  # by the tokenizer's own way of asking for an answer
        x = parsed(x, y)["prompt"]
        ids = tokenizer.apply_chat_template(x, add_generation_prompt=True)["input_ids"]
        assert tokenizer.decode(ids) == prompt

def test_without_chat_template_strings_stay_as_they_are_and_messages_still_need_one():
    tokenizer = byte_tokenizer(CHATML)
    assert decoded(tokenizer, "Hi", "Hello", chat_template=False)[:2] == ("Hi", "Hello</s>")
    assert decoded(tokenizer, "Hi", [ANSWER], chat_template=False)[1] == "Hello<|im_end|>"

def test_eos_follows_a_last_token_that_reads_as_nothing():
    # SentencePiece decoders drop the space of a first token, so that a lone space reads as "";
    # an unknown word is a special token, but not an end.
    spaces = byte_tokenizer()
    spaces.backend_tokenizer.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(" ", 1, 0)])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {"[UNK]": 0, "</s>": 1, "hi": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="[UNK]")
    assert decoded(spaces, "hi", "hi ")[1] == "hi </s>"
    assert decoded(words, "hi", "hi there")[1] == "hi [UNK] </s>"

def test_of_a_long_prompt_the_end_is_kept_and_of_a_long_completion_the_start():
    # "<s>Tell me" is 8 tokens, "Hello</s>" 6.
    tokenizer = byte_tokenizer(adds_bos=True)

    def cut(prompt, completion):
        return decoded(tokenizer, "Tell me", "Hello", max_prompt_length=prompt,
                       max_completion_length=completion)

    assert cut(8, 6) == ("<s>Tell me", "Hello</s>", [False, False])
    assert cut(7, 6) == ("Tell me", "Hello</s>", [True, False])
    assert cut(2, 6) == ("me", "Hello</s>", [True, False])
    assert cut(8, 5) == ("<s>Tell me", "Hello", [False, True])  # it did not end there: no EOS
    assert cut(1, 1) == ("e", "H", [True, True])

def test_a_prompt_that_becomes_no_token_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    with pytest.raises(kto.InputError, match="^rows.jsonl:3: no tokens"):
        decoded(tokenizer, "\u200b", "Hello")

@pytest.mark.parametrize("template, x, found", [
    (None, [USER], "no chat template"), (LLAMA, [SYSTEM, USER], "no system turn"),
    (FORGETS, [USER], "no tokens, or the template changes an answered prompt"),
    (ASKS, [USER], "no tokens, or the template changes an answered prompt")])
def test_a_chat_that_the_template_cannot_take_is_named(template, x, found):
    with pytest.raises(kto.InputError, match=f"^rows.jsonl:3: .*{found}"):
        decoded(byte_tokenizer(template), x, "Hello")

# ---- The run -------------------------------------------------------------------------------------

# 21 rows, of which every 5th, 4 in all, is held out. The 17 others make 6 steps an epoch (five of
# 3 rows and one of 2) and 12 in all.
STEPS, PER_EPOCH = 12, 6
FLAGS = ("--batch_size", 3, "--micro_batch_size", 2, "--epochs", 2, "--holdout", 5, "--lr", 0.01)

@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a model and a file of rows, for runs of about a second."""
    torch.set_num_threads(1)  # threads only wait for each other in a model of this size
    folder = tmp_path_factory.mktemp("small")
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=259))
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", say(21))
    return folder

def command(small, output, *flags):
    return ("--model", small / "model", "--data", small / "rows.jsonl", "--output", output,
            *FLAGS, *flags)

@pytest.fixture
def run(small, monkeypatch):
    """run(output, *flags) is `python kto.py` on the small model and rows, in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield lambda output, *flags: main(monkeypatch, *command(small, output, *flags))
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)

@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The output of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        main(monkeypatch, *command(small, output))
    return output

def read_log(output):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    log = Path(output, "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line, parse_constant=refuse) for line in log]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in log]

def assert_same_result(output, whole):
    weights = "model.safetensors"
    assert Path(output, weights).read_bytes() == Path(whole, weights).read_bytes()
    assert read_log(output) == read_log(whole)
    assert not list(Path(output).glob("checkpoint*"))

def saved_step(output):
    return torch.load(Path(output, "checkpoint.pt"), weights_only=True)["step"]

def at_step(monkeypatch, number, act):
    """Once, at the end of this training step, call act(policy); what it returns goes to the log."""
    kto_step, numbers = kto.kto_step, iter(range(STEPS))

    def acting_step(policy, *args, train=True):
        logged = kto_step(policy, *args, train=train)
        if train and next(numbers) == number:
            monkeypatch.setattr(kto, "kto_step", kto_step)
            logged |= act(policy) or {}
        return logged

    monkeypatch.setattr(kto, "kto_step", acting_step)

class Killed(BaseException):
    """Like SIGKILL, it is heard by nothing in the program."""

def kill(*_):
    raise Killed

def offline(*_):
    raise OSError("We couldn't connect to the hub.\nSee how to run the library in offline mode.")

@pytest.mark.parametrize("flags, found", [
    ("--batch_size 1", "--batch_size 1: must be finite and >= 2"),
    ("--micro_batch_size 0", "--micro_batch_size 0: must be finite and >= 1"),
    ("--epochs 0", "--epochs 0: must be finite and >= 1"),
    ("--max_prompt_length 0", "--max_prompt_length 0: must be finite and >= 1"),
    ("--max_completion_length 0", "--max_completion_length 0: must be finite and >= 1"),
    *((f"--{name} -1", f"--{name} -1") for name in (
        "beta", "lambda_d", "lambda_u", "lr", "holdout", "max_steps", "save_every", "seed")),
    ("--lr nan", "--lr nan"),
    ("--lr inf", "--lr inf"),
    ("--beta large", "--beta: invalid float value: 'large'"),
    ("--dtype float16", "--dtype: invalid choice: 'float16'"),
    ("--batchsize 8", "unrecognized arguments: --batchsize 8"),
    ("--data no-such-file", "No such file or directory: 'no-such-file'"),
    ("--output data_sample.jsonl", "Not a directory: 'data_sample.jsonl"),
    ("--model me/mine", "--model me/mine (offline? give a folder): We couldn't connect to the"),
])
def test_an_impossible_flag_is_one_line_and_status_2(flags, found, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kto.py", *flags.split()])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(kto.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and found in error and error.count("\n") == 1

def test_a_model_that_is_not_there_is_named_and_nothing_written(run, tmp_path):
    with pytest.raises(kto.InputError, match=f"--model {tmp_path}/none .*offline.*: "):
        run(tmp_path / "output", "--model", tmp_path / "none")
    assert not (tmp_path / "output").exists()

def test_a_tokenizer_without_eos_is_refused_in_words(run, small, tmp_path):
    shutil.copytree(small / "model", tmp_path / "model")
    byte_tokenizer(eos=None).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(kto.InputError, match="EOS"):
        run(tmp_path / "output", "--model", tmp_path / "model")

def test_the_program_ends_with_status_2_and_no_traceback(tmp_path):
    file, output = tmp_path / "rows.jsonl", tmp_path / "output"
    file.write_bytes(GOOD + b"\n[]\n")
    done = subprocess.run([sys.executable, kto.__file__, "--data", file, "--output", output],
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{file}:2: found []{A_ROW}\n"
    assert not output.exists()

def test_the_log_has_every_step_once_and_a_held_out_line_around_each_epoch(whole):
    log = read_log(whole)
    steps = [line for line in log if "lr" in line]
    evals = [line for line in log if "lr" not in line]
    assert [line["step"] for line in steps] == list(range(STEPS))
    assert [line["step"] for line in evals] == [0, PER_EPOCH, STEPS]
    rewards = {"reward_desirable", "reward_undesirable"}
    assert steps[0].keys() >= rewards | {"loss", "z0", "kl", "margin", "grad_norm", "lr"}
    assert all('"seconds": ' in line for line in open(whole / "metrics.jsonl") if '"lr"' in line)
    assert evals[0].keys() >= {f"eval_{name}" for name in rewards | {"loss", "accuracy", "z0"}}

def test_the_saved_model_has_the_held_out_figures_of_all_held_out_rows_together(small, whole):
    # The log's last line, from the model in memory, again from the saved one: row by row, all 4
    # held-out rows at once. (They are one batch of 3 rows and one of 1.)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
                         for folder in (whole, small / "model"))
    config = kto.Config(data=str(small / "rows.jsonl"), holdout=5)
    rows = [kto.encode(row, tokenizer, config) for row in kto.read_rows(config, held_out=True)]
    x, y, labels = ([row[key] for row in rows] for key in ("prompt", "completion", "label"))

    def reward(prompt, completion):
        with torch.no_grad():
            p, q = (kto.completion_logps(model, [prompt], [completion]).item()
                    for model in (policy, reference))
        return p - q

    r = [reward(*pair) for pair in zip(x, y)]
    kl = sum(reward(*pair) for pair in zip(x, [y[1], y[2], y[3], y[0]])) / 4
    z0 = max(0, kl)
    losses = [1 / (1 + math.exp(0.1 * (a - z0 if good else z0 - a))) for a, good in zip(r, labels)]
    assert labels == [True, False, True, False]
    assert read_log(whole)[-1] == pytest.approx({
        "step": STEPS,
        "eval_loss": sum(losses) / 4,
        "eval_accuracy": sum((a > z0) == good for a, good in zip(r, labels)) / 4,
        "eval_z0": z0,
        "eval_kl": kl,
        "eval_reward_desirable": (r[0] + r[2]) / 2,
        "eval_reward_undesirable": (r[1] + r[3]) / 2,
        "eval_margin": (r[0] + r[2] - r[1] - r[3]) / 2,
    }, rel=1e-4, abs=1e-5)

def test_one_class_alone_trains_with_a_warning_and_logs_null_for_the_other(run, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", say(6, 6))
    run(tmp_path / "output", "--data", data, "--holdout", 0)
    printed = capsys.readouterr()
    assert printed.out.count("WARNING") == 1 and "only one class counts" in printed.out
    assert "step/s" not in printed.err  # no progress bar where there is no terminal
    for line in read_log(tmp_path / "output"):
        assert line["reward_undesirable"] is None and line["margin"] is None
        assert type(line["reward_desirable"]) is float

@pytest.mark.parametrize("number, status, step", [
    (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, PER_EPOCH - 1)])
def test_an_interrupted_run_goes_on_to_the_same_bits(
        number, status, step, run, small, whole, tmp_path, monkeypatch, capsys):
    # The log is compared too: its rewards would start at 0 again if the policy of the checkpoint
    # had become the reference. What changes no number may change: places and --save_every.
    at_step(monkeypatch, step, lambda policy: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "output")
    assert stopped.value.code == status and "--resume true" in capsys.readouterr().out
    assert saved_step(tmp_path / "output") == step + 1
    # At once: the evaluation that was due after 6 steps is left to the run that goes on.
    assert [line["step"] for line in read_log(tmp_path / "output")] == [0, *range(step + 1)]
    (tmp_path / "output").rename(tmp_path / "moved")
    data = shutil.copy(small / "rows.jsonl", tmp_path)
    run(tmp_path / "moved", "--resume", "true", "--data", data, "--save_every", 4)
    assert_same_result(tmp_path / "moved", whole)

def test_a_killed_run_loses_only_the_steps_since_its_last_save(run, whole, tmp_path, monkeypatch):
    # Killed in step 7, with a checkpoint after 3 and after 6 steps: step 6 is logged, and is run
    # and logged again. An evaluation, too, stands beside the checkpoint at 6.
    at_step(monkeypatch, 7, kill)
    with pytest.raises(Killed):
        run(tmp_path, "--save_every", 3)
    assert saved_step(tmp_path) == 6 and read_log(tmp_path)[-1]["step"] == 6
    run(tmp_path, "--save_every", 3, "--resume", "true")
    assert_same_result(tmp_path, whole)

def test_a_signal_during_an_evaluation_is_obeyed_after_it(run, whole, tmp_path, monkeypatch):
    kto_step = kto.kto_step

    def interrupted(*args, train=True):
        if not train:
            os.kill(os.getpid(), signal.SIGTERM)
        return kto_step(*args, train=train)

    with monkeypatch.context() as patch:
        patch.setattr(kto, "kto_step", interrupted)
        with pytest.raises(SystemExit, match="143"):
            run(tmp_path)
    assert saved_step(tmp_path) == 0 and len(read_log(tmp_path)) == 1
    run(tmp_path, "--resume", "true")
    assert_same_result(tmp_path, whole)

def test_a_run_whose_log_was_lost_goes_on_with_a_new_one(run, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda policy: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    run(tmp_path, "--resume", "true")
    assert [line["step"] for line in read_log(tmp_path) if "lr" in line] == list(range(4, STEPS))

def test_a_kill_during_a_save_leaves_the_older_checkpoint(run, whole, tmp_path, monkeypatch):
    save, saves = torch.save, []

    def half_a_save(state, path):
        save(state, buffer := io.BytesIO())
        saves.append(path)
        if len(saves) == 3:  # after 0, 2 and 4 steps
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            raise Killed
        Path(path).write_bytes(buffer.getvalue())

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(Killed):
        run(tmp_path, "--save_every", 2)
    assert saved_step(tmp_path) == 2
    run(tmp_path, "--resume", "true")
    assert_same_result(tmp_path, whole)

def test_a_process_that_is_killed_can_be_resumed(run, small, tmp_path):
    log, flags = tmp_path / "metrics.jsonl", ("--epochs", 20, "--save_every", 2)
    process = subprocess.Popen(
        [sys.executable, kto.__file__, *map(str, command(small, tmp_path, *flags))],
        stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 7):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    logged = log.read_bytes().count(b'"lr"')
    assert logged - 2 <= saved_step(tmp_path) <= logged
    run(tmp_path, *flags, "--resume", "true")
    steps = [line["step"] for line in read_log(tmp_path) if "lr" in line]
    assert steps == list(range(20 * PER_EPOCH))

def test_another_run_is_never_mixed_in_or_overwritten(run, whole, small, tmp_path, monkeypatch):
    at_step(monkeypatch, 0, lambda policy: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text((small / "rows.jsonl").read_text().replace("true", "false", 1))
    files = [tmp_path / "checkpoint.pt", *whole.iterdir()]
    before = [file.read_bytes() for file in files]
    for output, flags, found in [
        (tmp_path, ("--resume", "true", "--beta", 0.2), "a run with {'beta': 0.1}; use the same"),
        (tmp_path, ("--resume", "true", "--lambda_u", 2), "{'lambda_u': 1.0}"),
        (tmp_path, ("--resume", "true", "--lr", 0.02), "{'lr': 0.01}"),
        (tmp_path, ("--resume", "true", "--seed", 1), "{'seed': 0}"),
        (tmp_path, ("--resume", "true", "--batch_size", 4), "{'batch_size': 3}"),
        (tmp_path, ("--resume", "true", "--epochs", 3), "{'epochs': 2}"),
        (tmp_path, ("--resume", "true", "--holdout", 4), "{'holdout': 5}"),
        (tmp_path, ("--resume", "true", "--model", "tiny"), f"'model': '{small / 'model'}'"),
        (tmp_path, ("--resume", "true", "--data", other), "{'sha256 of the data': '.{64}'};"),
        (tmp_path, (), "is in use; name another or, if cut short, --resume true"),
        (whole, (), "is in use; name another or, if cut short, --resume true"),
        (whole, ("--model", "tiny"), "is in use; name another or, if cut short, --resume true"),
        (whole, ("--resume", "true"), "No such file or directory: .*checkpoint.pt"),
        (tmp_path / "new", ("--resume", "true"), "No such file or directory: .*checkpoint.pt"),
    ]:
        with pytest.raises((kto.InputError, FileNotFoundError), match=found):
            run(output, *flags)
    assert [file.read_bytes() for file in files] == before and not (tmp_path / "new").exists()

def test_a_checkpoint_cannot_run_code(run, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"step": Code()}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        run(tmp_path, "--resume", "true")
    assert not (tmp_path / "it ran").exists()

def test_the_tiny_model_can_be_trained_again_in_its_own_folder(run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kto, "tiny_model", lambda config: kto.load_model(
        kto.dataclasses.replace(config, model=str(small / "model"))))
    again = ("--model", "tiny", "--max_steps", 3, "--holdout", 0, "--save_every", 2)
    for _ in range(2):  # `python kto.py` typed twice
        run("kto-tiny", *again)
    assert [line["step"] for line in read_log("kto-tiny")] == [0, 1, 2]
    with pytest.raises(kto.InputError, match="kto-tiny is in use"):
        run("kto-tiny", "--model", small / "model")
    # The checkpoint of an earlier run is not the later run's.
    for step in (2, 0):
        at_step(monkeypatch, step, kill)
        with pytest.raises(Killed):
            run("kto-tiny", *again)
        assert saved_step("kto-tiny") == step

def test_what_is_too_long_is_counted_before_the_training(run, tmp_path, capsys):
    # A prompt is "<|im_start|>user\nSay N<|im_end|>\n<|im_start|>assistant\n", of 24 or 25 tokens;
    # a completion N<|im_end|> or no<|im_end|>. 21 rows: 11 prompts of two digits, 16 completions
    # of three tokens: 10, 12 ... 20 and each "no".
    run(tmp_path, "--max_prompt_length", 24, "--max_completion_length", 2)
    assert "cut      11 prompts and 16 completions" in capsys.readouterr().out

def test_a_chat_that_the_template_cannot_take_stops_the_run_before_it_trains(
        run, small, tmp_path):
    shutil.copytree(small / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(LLAMA)
    chat = {"prompt": [SYSTEM, USER], "completion": "Hello", "label": True}
    data = tmp_path / "rows.jsonl"
    data.write_bytes((GOOD + b"\n") * 9 + json.dumps(chat).encode())
    with pytest.raises(kto.InputError, match="rows.jsonl:10: .*no system turn"):
        run(tmp_path / "output", "--model", tmp_path / "model", "--data", data)
    assert not (tmp_path / "output").exists()

@pytest.mark.parametrize("act, found", [
    (lambda policy: {"loss": math.nan}, "step 4: loss nan, "),
    (lambda policy: policy.lm_head.weight.grad.fill_(math.inf).sum() and None,
     "step 4: loss .*, grad_norm inf"),
])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(
        act, found, run, tmp_path, monkeypatch):
    at_step(monkeypatch, 4, act)
    with pytest.raises(SystemExit, match=found):
        run(tmp_path, "--save_every", 3)
    assert [line["step"] for line in read_log(tmp_path)] == [0, 0, 1, 2, 3]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert all(weight.isfinite().all() for weight in state["policy"].values())
    assert not (tmp_path / "model.safetensors").exists()

def test_the_chart_puts_each_number_in_its_place(capsys):
    # From -6 to 4 nats over 11 columns: a column is one nat. A later mark of z, U, D covers an
    # earlier one, and an absent class has none.
    def step(number, z0, u, d):
        return {"step": number, "z0": z0, "reward_undesirable": u, "reward_desirable": d}

    kto.chart([step(0, 0.0, 0.0, 0.0), step(1, 1.0, -2.4, 4.0), step(2, 2.0, -6.0, None)], width=11)
    assert capsys.readouterr().out == (
        "\n  step  r from -6.0 to 4.0 nats: D desirable, U undesirable, z = z0\n"
        "     0 |      D    |\n"
        "     1 |    U  z  D|\n"
        "     2 |U       z  |\n")
    # 40 steps are thinned to each third, and equal values do not divide by zero.
    kto.chart([step(number, 0.0, None, None) for number in range(40)])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [int(row[:6]) for row in rows] == list(range(0, 40, 3))

# ---- It learns what the paper says it learns -----------------------------------------------------
# 64 questions of one token; an answer is one of 16 tokens, then END. A table says what is right.
# The reference was taught right and random answers, half and half. What it answers is labelled,
# right = desirable, and the policy is told nothing else. Success is counted: the share of right
# answers among 1,024 that are sampled at temperature 1. The comments give it for seeds 0 to 5.

torch.set_num_threads(1)  # at this size a second thread only costs, ten times over if it must wait
SEED, END, QUESTIONS = 0, 16, range(17, 81)
RIGHT = dict(zip(QUESTIONS, random.Random(5).choices(range(16), k=64)))

def answers(model, per_question, length=2):
    torch.manual_seed(SEED)
    x = torch.tensor([[q] for q in QUESTIONS] * per_question, device=kto.DEVICE)
    texts = model.generate(x, attention_mask=torch.ones_like(x), do_sample=True, top_k=0,
                           max_new_tokens=length, pad_token_id=END)
    return [(q, y) for q, *y in texts.tolist()]

def success(model, length=2):
    found = answers(model, 16, length)
    return sum(y == [RIGHT[q], END][:length] for q, y in found) / len(found)

def labelled(model, phrase=()):
    """2,048 answers of the model, with `phrase` before END: (the right ones, the wrong ones)."""
    rows = [{"prompt": [q], "completion": [y, *phrase, END], "label": y == RIGHT[q],
             "cut": [False, False]} for q, [y] in answers(model, 32, length=1)]
    return [row for row in rows if row["label"]], [row for row in rows if not row["label"]]

def trained(reference, rows, epochs, **settings):
    """(the policy after `epochs` over `rows`, what each step returned)"""
    config = kto.Config(batch_size=32, micro_batch_size=32, dtype="float32", **settings)
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    order, log = random.Random(SEED), []
    for _ in range(epochs):
        rows = order.sample(rows, len(rows))
        for start in range(0, len(rows) - 1, 32):  # a last batch of one row is left out
            log.append(kto.kto_step(policy, reference, rows[start : start + 32], config))
            optimizer.step()
            optimizer.zero_grad()
    return policy, log

@pytest.fixture(scope="module")
def half_right():
    torch.manual_seed(SEED)
    dice = random.Random(SEED)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=81, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=None, eos_token_id=END)).to(kto.DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 100)
        x = dice.choices(QUESTIONS, k=64)
        y = [[RIGHT[q] if dice.random() < 0.5 else dice.randrange(16), END] for q in x]
        (-kto.completion_logps(model, [[q] for q in x], y).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)

def test_labels_alone_teach_what_is_right(half_right):
    good, bad = labelled(half_right)
    policy, _ = trained(half_right, good + bad, epochs=2, beta=1.0)
    assert 0.4 < success(half_right) < 0.6  # 0.48 0.52 0.46 0.48 0.50 0.46
    assert success(policy) >= 0.9  # 1.00 1.00 0.97 1.00 1.00 1.00

def test_a_fifth_of_the_labels_may_be_wrong(half_right):
    good, bad = labelled(half_right)
    dice = random.Random(SEED)
    rows = [row | {"label": row["label"] ^ (dice.random() < 0.2)} for row in good + bad]
    policy, _ = trained(half_right, rows, epochs=2, beta=1.0)
    assert success(policy) > 0.8  # 0.90 0.96 0.93 0.92 0.99 0.94

def test_one_desirable_row_for_nine_is_enough_with_the_weights_of_eq_9_and_only_so(half_right):
    good, bad = labelled(half_right)
    rows = good[: len(bad) // 9] + bad  # about 115 + 1,030: some questions have no desirable row
    weighted, _ = trained(half_right, rows, epochs=4, beta=0.5, lambda_d=9.0)  # 9 n_D = n_U
    plain, _ = trained(half_right, rows, epochs=4, beta=0.5)
    assert success(weighted) > 0.8  # 0.95 1.00 0.93 0.97 0.92 0.98
    assert success(plain) < 0.65  # 0.00 0.00 0.53 0.00 0.00 0.00

def test_z0_keeps_the_loss_from_saturating_where_all_completions_grow_likelier(
        half_right, monkeypatch):
    # Another hand added four tokens to every answer, which the reference never writes there, and
    # three rows of four are desirable: so the phrase is learned first, and all r grow, good or bad.
    # z0 grows with them, and what is left to gain is r - z0: that good rows get more than bad ones.
    # Held at 0, beta * r soon is 10: no good row can get better and no bad row is worth a try, both
    # are left without gradient (Eq. 10), and right and wrong answers stay as likely as they were.
    good, bad = labelled(half_right, phrase=[20, 30, 40, 50])
    rows = good + bad[: len(good) // 3]
    policy, log = trained(half_right, rows, epochs=3, beta=0.5)
    monkeypatch.setattr(kto, "reference_point", lambda policy_logps, _: torch.tensor(0.0))
    held, held_log = trained(half_right, rows, epochs=3, beta=0.5)
    margin, held_margin = (sum(step["margin"] for step in steps[-20:]) / 20
                           for steps in (log, held_log))
    assert max(step["z0"] for step in log) > 25  # 47 52 43 45 46 53 nats
    assert success(policy, length=1) > 0.75  # 0.94 0.87 0.96 0.97 0.99 0.97
    assert success(held, length=1) < 0.7  # 0.59 0.61 0.58 0.53 0.55 0.47
    assert margin > 4 and held_margin < 2  # margins 7.8 to 9.9 and 0.3 to 1.4 nats

# ---- The first command, a real model, and what the README says -----------------------------------

README = Path(kto.__file__).with_name("README.md").read_text()

def block(start):
    """The README's fenced Python block that starts with, or imports, this."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return next(text for text in blocks if start in text)

def test_the_first_command_learns(monkeypatch, tmp_path, capsys):
    shutil.copy(Path(kto.__file__).with_name("data_sample.jsonl"), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kto.signal, "signal", lambda *_: None)
    main(monkeypatch)  # python kto.py
    log = read_log("kto-tiny")
    before, *_, after = (line for line in log if "eval_loss" in line)
    assert (before["eval_loss"], before["eval_z0"], before["eval_margin"]) == (0.5, 0.0, 0.0)
    assert after["eval_accuracy"] >= 0.95 and after["eval_margin"] > 10
    printed = capsys.readouterr().out
    for fact in ("data ", "balance ", "steps ", "model ", "prompt ", "scored ", "cut "):
        assert re.search(f"^{fact}.*\n", README, flags=re.MULTILINE)[0] in printed
    figures = f"loss {round(after['eval_loss'], 4)}, accuracy {round(after['eval_accuracy'], 4)}"
    assert f"held out, after 48 steps: {figures}" in printed
    answers = re.findall(r"before (.*)\n  after  (.*)\n", printed)
    assert len(answers) == 3 and all(was != is_now for was, is_now in answers)
    words = set(re.findall(r"\w+", Path("data_sample.jsonl").read_text()))
    for spoken in (re.findall(r"\w+", was) for was, _ in answers):  # the toy was taught to speak
        assert sum(word in words for word in spoken) > 0.8 * len(spoken) > 0
    model = transformers.AutoModelForCausalLM.from_pretrained("kto-tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained("kto-tiny")
    assert model.config.eos_token_id == tokenizer.eos_token_id

def test_real_model_starts_at_its_reference_and_learns(monkeypatch, tmp_path):
    folder = os.environ.get("KTO_TEST_MODEL")
    if not folder:
        pytest.skip("needs: KTO_TEST_MODEL=FOLDER, a small chat model")
    monkeypatch.setattr(kto.signal, "signal", lambda *_: None)
    main(monkeypatch, "--model", folder, "--output", tmp_path, "--batch_size", 4, "--holdout", 0,
         "--max_steps", 4, "--lr", 2e-5)
    first, *_, last = read_log(tmp_path)
    assert (first["loss"], first["z0"], first["kl"]) == (0.5, 0.0, 0.0)
    assert last["loss"] < 0.5 and (last["margin"] is None or last["margin"] > 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    row = kto.encode(parsed("Hi", "Hello."), tokenizer, kto.Config())
    chat = tokenizer.apply_chat_template(
        parsed("Hi", "Hello.")["prompt"], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["prompt"]) == chat
    assert row["completion"][-1] == tokenizer.eos_token_id

def test_the_readmes_three_rows_are_right():
    z0 = kto.reference_point(torch.tensor([3.0, -1.0, 1.0]), torch.zeros(3))
    r, desirable = torch.tensor([4.0, -1.0, -6.0]), torch.tensor([True, False, True])
    losses = kto.kto_loss(r, torch.zeros(3), z0, desirable)
    table = re.findall(r"\| (?:un)?desirable \|.*\| ([\d.]+) \|\n", README)
    assert losses.tolist() == pytest.approx([float(loss) for loss in table], abs=5e-5)
    assert f"is their mean, {losses.mean():.4f}" in README

def test_the_readmes_training_step_is_the_step_of_this_file():
    step = {}
    exec(block("from kto import"), step)
    policy, reference = policy_and_reference(raw_kl=1)
    config = kto.dataclasses.replace(SETTINGS, beta=0.1, lambda_d=1.0, lambda_u=1.0)
    logged = kto.kto_step(policy, reference, encoded(), config, train=False)
    x, y, labels = ([row[key] for row in encoded()] for key in ("prompt", "completion", "label"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    steps = [step["kto_training_step"](policy, reference, optimizer, x, y, torch.tensor(labels))
             for _ in range(3)]
    assert steps[0] == pytest.approx(logged["loss"], rel=1e-5)
    assert steps[2] < steps[1] < steps[0]

def test_the_readmes_thumbs_and_pairs_become_rows():
    make = {}
    exec(block("def thumbs_to_rows"), make)
    rows = make["thumbs_to_rows"]([{"question": "a", "answer": "b", "thumb": "down"}])
    rows += make["pairs_to_rows"]([{"prompt": "a", "chosen": "c", "rejected": "d"}])
    rows = [kto.parse_row(json.dumps(row).encode()) for row in rows]
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == [
        ("b", False), ("c", True), ("d", False)]

def test_the_readmes_rows_are_rows_and_its_metrics_those_of_the_log(whole):
    for line in re.search(r"```json\n(.*?)```", README, flags=re.DOTALL)[1].splitlines():
        kto.parse_row(line.encode())
    explained = set(re.findall(r"`(\w+)`", README.split("## Read the log")[1].split("Healthy")[0]))
    assert explained >= set(read_log(whole)[1]) - {"step"}

def test_the_readmes_script_takes_the_same_rows_to_trl(small, tmp_path):
    pytest.importorskip("trl", reason="needs: pip install trl==1.16.0")
    script = tmp_path / "kto_with_trl.py"
    script.write_text(block("# kto_with_trl.py"))
    done = subprocess.run(
        [sys.executable, script, small / "model", small / "rows.jsonl", tmp_path / "output"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "'loss': '0.5'" in done.stdout and "'kl': '0'" in done.stdout  # the first step
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
                     for folder in (small / "model", tmp_path / "output"))
    assert not torch.equal(before, after)
