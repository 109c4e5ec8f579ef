# SPDX-License-Identifier: MIT-0
"""Why kto.py is right: each test is a claim, in the order of the file. Offline, on a CPU.

pytest                  the claims; a few need TRL, or a chat model's folder in KTO_TEST_MODEL
python test_kto.py      the paper in miniature: KTO beside DPO and SFT, four minutes
"""

import collections
import contextlib
import copy
import functools
import gc
import inspect
import io
import itertools
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
import tempfile
import textwrap
import weakref
from pathlib import Path
from unittest import mock

import datasets
import numpy
import pandas
import pytest
import tokenizers
import torch
import transformers
from torch import tensor
from torch.testing import assert_close
from tqdm import tqdm

import kto

torch.set_num_threads(1)  # which is faster for models as small as these
datasets.disable_progress_bars()  # so that stderr has nothing but errors
transformers.utils.logging.disable_progress_bar()
gc.freeze()  # no search for garbage in what was imported: a tenth of the time

# ---- Set-up of many tests ------------------------------------------------------------------------


def random_model(architecture="llama", std=0.5, **settings):
    """Two layers, 300 tokens, EOS = pad = 0; weights are large, so mistakes show."""
    small = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(architecture, **small | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data.zero_()
    return add_noise(model, std, seed=0)


def add_noise(model, std, seed):
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data += std * torch.randn(weight.shape)
    return model


def byte_tokenizer(template=None, text="$A", eos="</s>"):
    """One token for a byte, and five special ones: decoded text shows every token.

    `text` is what a text becomes: "<s> $A" has a BOS before it.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = dict(zip(alphabet, range(256)))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=text, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        chat_template=template,
    )


CHATML = (  # the end token is not EOS, and a newline follows it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def input_error(words):
    """The block ends with an InputError, and its message has these words."""
    return pytest.raises(kto.InputError, match=words)


def write_rows(path, rows):
    """Write rows of (prompt, completion, label) as JSONL; returns the path as text.

    A row may also have a score, or a score and an id.
    """
    keys = ("prompt", "completion", "label", "score", "id")
    path.write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    return str(path)


# ---- The loss and the reference point ------------------------------------------------------------


def desirable(letters):
    """ "DUU" is one desirable row, then two undesirable ones: a bool tensor."""
    return tensor([letter == "D" for letter in letters])


def test_three_rows_worked_by_hand():
    # The mismatched pairs differ by 4, -1 and 0 nats: z0 = 3 / 3 = 1. (Clamped one
    # by one: 4 / 3.)
    z0 = kto.reference_point(tensor([-6.0, -9.0, -7.0]), tensor([-10.0, -8.0, -7.0]))
    assert z0 == 1

    # With beta = 1/2, beta (r - z0) is ln 3, ln 3 and 0. The sigmoid of ln 3 is 3/4,
    # that of -ln 3 is 1/4 and that of 0 is 1/2. With lambda_d = 2 and lambda_u = 4:
    #   D    v = 2 * 3/4    loss = 2 - 3/2 = 1/2
    #   U    v = 4 * 1/4    loss = 4 - 1   = 3
    #   D    v = 2 * 1/2    loss = 2 - 1   = 1
    high = 1 + 2 * math.log(3)
    losses = kto.kto_loss(tensor([high, high, 1.0]), 0, z0, desirable("DUD"), 0.5, 2.0, 4.0)
    assert_close(losses, tensor([0.5, 3.0, 1.0]))


# The code of the paper's authors: ContextualAI/HALOs, commit 4831988,
# KTOTrainer.loss in train/trainers.py, run unchanged in float32 with torch 2.13.0 on
# a CPU. Four batches of log-probs and labels went in; z0, losses and the gradient of
# the mean loss came out. D: 1 if desirable.
HALOS = [
    # z0, (beta, lambda_d, lambda_u)
    (
        0.969537,
        (0.1, 1.0, 1.7),
        """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
         -36.1593   -34.8083  -245.7608  -247.9992   1  0.557755 -0.00493329
        -102.7383  -102.3106  -260.3434  -261.0626   0  0.790714  0.00845865
        -205.8741  -202.1323  -252.5092  -249.5890   1  0.615652 -0.00473249
         -35.9153   -38.6803  -279.9997  -281.2710   0  0.926103  0.00843186
        -122.1140  -121.7887  -233.3775  -236.9165   0  0.795046  0.00846447""",
    ),
    # The raw KL is -4.2.
    (
        0.0,
        (0.1, 1.4, 1.0),
        """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
        -186.3869  -180.5016   -92.3519   -87.9203   0  0.356972  0.00459086
         -42.3944   -37.5244  -202.7547  -195.5823   1  0.867159 -0.00660083
         -64.1773   -53.7609   -85.3548   -75.5255   1  1.034833 -0.00539839
         -73.0085   -72.6348  -165.0435  -167.6018   0  0.490659  0.00499826
        -188.7975  -181.9478  -237.4356  -235.1268   1  0.930786 -0.00623911""",
    ),
    (
        21.644724,
        (0.05, 13.33, 1.0),
        """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
        -110.0761  -112.9572  -286.2141  -303.8955   0  0.281268  0.00336927
         -90.6101   -92.9806   -81.7758   -98.0912   0  0.276136  0.00333141
         -42.1689   -48.4457  -285.5660  -316.5034   1  9.106708 -0.04808739""",
    ),
    (
        2.862381,
        (0.25, 1.0, 1.0),
        """
        #  policy  reference policy, y'   ref., y'   D      loss    gradient
         -45.5757   -36.4654  -303.5955  -305.5703   0  0.047735  0.00284105
         -82.2280   -73.4197  -230.3614  -237.5157   0  0.051287  0.00304104
        -123.6518  -124.4447  -162.7621  -161.0788   0  0.373467  0.01462434
        -120.4360  -128.5651  -160.9534  -164.9571   0  0.788629  0.01041834""",
    ),
]


@pytest.mark.parametrize("their_z0, weights, table", HALOS, ids=range(4))
def test_value_and_gradient_are_those_of_the_papers_authors(their_z0, weights, table):
    columns = tensor(numpy.loadtxt(table.splitlines())).T
    policy, reference, policy_next, reference_next, labels, their_losses, gradient = columns
    policy.requires_grad_()
    policy_next.requires_grad_()
    z0 = kto.reference_point(policy_next, reference_next)
    losses = kto.kto_loss(policy, reference, z0, labels == 1, *weights)
    losses.mean().backward()
    assert policy_next.grad is None  # z0 is a constant

    # As near as their float32, here rounded, allows.
    assert z0.item() == pytest.approx(their_z0, abs=1e-5)
    assert_close(losses, their_losses, rtol=2e-6, atol=1e-6)
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

# Five rows, a token for each letter. "!" is token 0: EOS and padding to the models.
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
    """log pi(y|x) of each row alone: without padding, one token after the other."""
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


def test_no_position_reaches_the_head_but_those_that_are_scored():
    model, shapes = random_model(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: shapes.append(logits.shape))
    kto.completion_logps(model, PROMPTS, COMPLETIONS)
    assert shapes == [(4 + 9 + 2 + 5 + 6, 300)]  # the tokens of the completions, EOS too


def test_log_probs_are_summed_in_float32_when_the_model_computes_in_bfloat16():
    # The sum is near -800, where bfloat16 knows only multiples of 4.
    model, y = random_model().bfloat16(), list(range(1, 121))
    logps = kto.completion_logps(model, [[5]], [y])
    assert_close(logps, plain_logps(model, [[5]], [y]), rtol=1e-6, atol=0)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        kto.completion_logps(None, [[5], []], COMPLETIONS[:2])
    with pytest.raises(ValueError, match="shorter"):
        kto.completion_logps(None, PROMPTS, COMPLETIONS[:4])


def test_rows_of_similar_length_share_a_micro_batch_and_the_longest_come_first():
    # 1 + 5, 4 + 1, 1 + 8, 1 + 3 and 6 + 1 letters, which is 6, 5, 9, 4 and 7.
    prompts = "a aaaa a a aaaaaa".split()
    completions = "bbbbb b bbbbbbbb bbb b".split()
    parts = kto.micro_batches(prompts, completions, size=2)
    assert [index.tolist() for index, x, y in parts] == [[2, 4], [0, 1], [3]]


# ---- The step ------------------------------------------------------------------------------------

SETTINGS = {"beta": 0.3, "lambda_d": 1.4, "lambda_u": 0.7}


def batch_of(letters):
    labels = desirable(letters).int().tolist()  # 1 and 0, which to Python are True and False
    return {"prompt": PROMPTS, "completion": COMPLETIONS, "label": labels}


def policy_and_reference(raw_kl=1):
    """Two models that differ by noise. To exchange them turns the raw KL's sign."""
    policy, reference = random_model(std=0.3), random_model(std=0.3)
    add_noise(reference, std=0.1, seed=4)
    return (policy, reference) if raw_kl > 0 else (reference, policy)


def gradient_of(model):
    return [weight.grad for weight in model.parameters()]


def plain_step(policy, reference, letters):
    """What kto_step returns, row after row. It adds the same gradient."""
    x, y, y_next = PROMPTS, COMPLETIONS, COMPLETIONS[1:] + COMPLETIONS[:1]
    r = plain_logps(policy, x, y) - plain_logps(reference, x, y)
    kl = plain_logps(policy, x, y_next) - plain_logps(reference, x, y_next)
    z0 = kto.reference_point(kl, 0)
    losses = kto.kto_loss(r, 0, z0, desirable(letters), **SETTINGS)
    losses.mean().backward()
    return losses, r, z0.expand(5), kl, desirable(letters)


@pytest.mark.parametrize(
    "micro_batch_size, raw_kl, letters",
    [(1, 1, "DUUDU"), (3, 1, "DUUDU"), (8, -1, "DUUDU"), (3, 1, "DDDDD"), (8, 1, "UUUUU")],
)
def test_a_step_equals_the_plain_computation_whatever_the_micro_batch(
    micro_batch_size, raw_kl, letters
):
    policy, reference = policy_and_reference(raw_kl)
    step = kto.kto_step(policy, reference, batch_of(letters), micro_batch_size, **SETTINGS)
    assert not any(part.requires_grad for part in step)
    assert set(gradient_of(reference)) == {None}
    gradient = gradient_of(policy)
    policy.zero_grad()

    plain = plain_step(policy, reference, letters)
    assert plain[3].mean() * raw_kl > 0
    assert_close(step, plain, rtol=1e-5, atol=1e-5)
    assert_close(gradient, gradient_of(policy), rtol=1e-4, atol=1e-6)


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

    # Only the policy's own pairs are scored with a gradient. Without one, the
    # reference scores these too, and both models score the next row's.
    assert sorted(learned) == "aA bB cC dD eE".split()
    assert sorted(scored) == "aA aB aB bB bC bC cC cD cD dD dE dE eA eA eE".split()


def test_a_single_row_has_no_next_row_and_is_refused():
    alone = {"prompt": [[5]], "completion": [[6]], "label": [True]}
    with pytest.raises(ValueError, match="two rows"):
        kto.kto_step(random_model(), None, alone)


def test_metrics_of_several_steps_are_means_over_all_their_rows():
    # A step of two desirable rows with z0 = 2, and one of three undesirable rows
    # with z0 = 1. Of the r 3 and -3, the first is above its z0. Of 1, 4 and -2, all
    # but 4 are not: 3 of 5 are right.
    parts = tensor([[0.5, 1.5, 1, 1, 2], [3, -3, 1, 4, -2], [2, 2, 1, 1, 1], [1, 1, -3, 5, -8]])
    assert kto.metrics_of(*parts, desirable("DDUUU")) == pytest.approx(
        {
            "loss": 1.2,
            "z0": 1.4,
            "kl": -0.8,
            "accuracy": 0.6,
            "reward_desirable": 0,
            "reward_undesirable": 1,
            "margin": -1,
        }
    )

    # Of a class without rows there is no mean.
    first = kto.metrics_of(*parts[:, :2], desirable("DD"))
    second = kto.metrics_of(*parts[:, 2:], desirable("UUU"))
    assert first["reward_undesirable"] is second["reward_desirable"] is None
    assert first["margin"] is second["margin"] is None


# ---- The training loop ---------------------------------------------------------------------------


@pytest.mark.parametrize("lambda_d", [1e38, math.inf])  # the norm: inf, then nan
def test_a_gradient_that_is_not_finite_stops_training_before_it_does_harm(lambda_d):
    policy, reference = policy_and_reference()
    optimizer = torch.optim.AdamW(policy.parameters())
    entries = kto.train(policy, reference, [batch_of("DUUDU")], optimizer, lambda_d=lambda_d)
    with pytest.raises(FloatingPointError, match="step 0"):
        next(entries)
    assert optimizer.state == {}  # it has not moved the weights


def test_the_example_of_train_runs(tmp_path, capsys):
    random_model().save_pretrained(tmp_path)
    names = vars(kto) | {
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "NAME": tmp_path,
        "batches": [batch_of("DUUDU")],
    }
    example = inspect.getdoc(kto.train).split("\n\n")[1]
    exec(textwrap.dedent(example), names)
    assert capsys.readouterr().out.endswith("0.5\n")  # at step 0, each row's loss is lambda / 2
    assert not torch.equal(names["policy"].lm_head.weight, names["reference"].lm_head.weight)


# ---- TRL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw_kl", [1, -1])
def test_trl_has_the_same_loss_z0_and_gradient_norm(raw_kl, tmp_path):
    trl = pytest.importorskip("trl", reason="needs: pip install trl==1.16.0")
    policy, reference = policy_and_reference(raw_kl)
    parts = kto.kto_step(policy, reference, batch_of("DUUDU"), **SETTINGS)
    metrics = kto.metrics_of(*parts)
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
    trainer = trl.KTOTrainer(
        policy, reference, settings, train_dataset=rows, processing_class=byte_tokenizer()
    )
    trainer.train()
    log = trainer.state.log_history[0]
    theirs = [log["loss"], log["kl"], log["grad_norm"]]  # what TRL calls kl is our z0
    assert theirs == pytest.approx([metrics["loss"], metrics["z0"], norm], rel=1e-5)


# ---- The flags -----------------------------------------------------------------------------------


def typed(flags):
    """As if `python kto.py` and these flags had been typed."""
    return mock.patch("sys.argv", ["kto.py", *flags.split()])


def read_flags(flags=""):
    with typed(flags):
        return kto.read_flags()


def test_what_is_not_given_is_the_papers_or_follows_from_the_model():
    toy, named = read_flags(), read_flags("--model someone/chat-1B")
    assert (toy.beta, toy.lambda_d, toy.lambda_u, toy.batch_size) == (0.1, 1, 1, 32)
    assert (toy.holdout, toy.micro_batch_size) == (0.1, None)
    assert (toy.output, named.output) == (Path("kto-tiny"), Path("kto-chat-1B"))
    assert (toy.lr, named.lr, read_flags("--lr 0.5").lr) == (5e-4, 5e-6, 0.5)


def test_an_impossible_value_is_refused_with_its_flag():
    impossible = """--batch_size 1, --micro_batch_size 0, --epochs 0, --max_prompt_length 0,
        --max_completion_length 0, --holdout -0.1, --save_every -1, --seed -1, --beta -1,
        --lambda_d -0.1, --lambda_u -1, --beta 0, --lr 0, --lr nan, --lr inf"""
    for flag in impossible.split(","):
        with input_error(flag.strip()):
            read_flags(flag)
    with pytest.raises(SystemExit, match="2"):
        read_flags("--dtype float16")


@pytest.mark.parametrize(
    "card, flags, expected",
    [
        ("none", "", "cpu float32"),
        ("computes in it", "", "cuda bfloat16"),
        ("computes in it", "--device cuda:1", "cuda:1 bfloat16"),
        ("computes in it", "--device cpu", "cpu float32"),
        ("emulates it", "", "cuda float32"),  # T4, V100, RTX 20xx: they say that they can
    ],
)
def test_auto_is_bfloat16_only_on_a_card_that_computes_in_it(monkeypatch, card, flags, expected):
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
    # Always one line, which says where, and what a row is.
    with input_error(f"^{file}:3: .{{5,300}}A row is one whole line, .*$") as error:
        list(kto.read_rows(file, byte_tokenizer(CHATML)))
    return str(error.value)


# In the tables, pieces of what is said of the row stand behind the arrow, with ...
# between. The third row is the first line of an object that is spread over several
# lines.

BAD_ROWS = """\
[{"prompt": "a"}, {"prompt": "b"}]  ->  not a JSON object: [{'prompt': 'a'}
[  ->  not one row of JSON: Expecting value
{  ->  not one row of JSON ... column 2
"text"  ->  not a JSON object: 'text'
prompt,completion,label  ->  not one row of JSON
{"prompt": "a", "compl  ->  not one row of JSON
{'prompt': 'a', 'completion': 'b', 'label': True}  ->  double quotes
{"prompt": "a", "completion": "b", "label": 1} {}  ->  Extra data: column 48
{"prompt": "é", "completion": "b", "label": true}  ->  can't decode byte 0xe9
\x1f\x8b\x08  ->  not UTF-8 text ... unpack
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
{"prompt": "a", "completion": "b", "label": 1, "system": "Be kind"}  ->  system is not used
{"prompt": "a", "completion": "b", "label": 1, "tools": [{}]}  ->  tools is not used
{"prompt": "a", "completion": "b", "label": 1, "Images": ["a.png"]}  ->  Images is not used
{"prompt": "a", "completion": "b", "label": 1, "system-Prompt": "c"}  ->  system-Prompt is not used
{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}], \
"completion": "b", "label": 1}  ->  prompt ends with a message of the assistant
{"prompt": "a", "completion": [{"role": "user", "content": "b"}], "label": 1}  ->  the assistant
{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}, \
{"role": "assistant", "content": "c"}], "label": 1}  ->  one message of the assistant"""


@pytest.mark.parametrize("case", BAD_ROWS.split("\n"))
def test_each_kind_of_bad_row_is_refused_with_what_is_there_and_what_should_be(tmp_path, case):
    line, found = case.split("  ->  ")
    message = refusal(tmp_path, line)
    for words in found.split(" ... "):
        assert words in message


def test_a_file_in_utf_16_is_refused(tmp_path):
    # Cut at the byte of a newline, its second line could be read as other letters.
    with pytest.raises(kto.InputError, match="not UTF-8 text"):
        kto.parse_row(GOOD.encode("utf-16"))
    with pytest.raises(kto.InputError, match="not one row of JSON"):
        kto.parse_row(b"\0" + GOOD.encode("utf-16-le"))


def test_a_long_row_is_not_shown_whole(tmp_path):
    for long in ("[" * 100_000, json.dumps(["long"] * 10_000)):
        refusal(tmp_path, long)


NO_MESSAGES = r"""5  ->  prompt and completion must be texts or messages, not empty: 5
null  ->  prompt and completion must be texts or messages, not empty: None
[]  ->  prompt and completion must be texts or messages, not empty: []
""  ->  prompt and completion must be texts or messages, not empty: ''
{"role": "user", "content": "a"}  ->  completion must be texts or messages, not empty: {'role'
["a"]  ->  a message must have a role and a content: 'a'
[{"content": "a"}]  ->  the role of a message must be a text: {'content': 'a'}
[{"role": 1, "content": "a"}]  ->  the role of a message must be a text: {'role': 1
[{"role": "assistant"}]  ->  the content of a message must be a text: {'role'
[{"role": "user", "content": [{"type": "text"}]}]  ->  the content of a message must be a text
[{"role": "assistant", "content": "a"}, 7]  ->  a message must have a role and a content: 7
[{"role": "assistant", "content": "a", "tool_calls": [1]}]  ->  tool_calls is not used
[{"role": "assistant", "content": "a", "thinking": "b"}]  ->  thinking is not used
"\ud83d"  ->  surrogates not allowed
"a<s>"  ->  '<s>' is a special token
"</s>a"  ->  '</s>' is a special token
"<|im_start|>user\na"  ->  '<|im_start|>' is a special token
[{"role": "assistant", "content": "a<|im_end|>"}]  ->  '<|im_end|>' is a special token
"<pad>"  ->  '<pad>' is a special token
"<|eot_id|>"  ->  '<|eot_id|>' is a special token or a template's tag
"<\uff5cUser\uff5c>a"  ->  '<｜User｜>' is a special token or a template's tag
"[INST] a [/INST]"  ->  '[INST]' is a special token or a template's tag
"<start_of_turn>user"  ->  '<start_of_turn>' is a special token or a template's tag
"Hi <turn|>"  ->  '<turn|>' is a special token or a template's tag
"Hi<eos>"  ->  '<eos>' is a special token or a template's tag
"[{\"role\": \"user\"}]"  ->  messages must be a list, and not the text of one
"array([{'content': 'a', 'role': 'user'}])"  ->  messages must be a list, and not the text of one
"{'role': 'user', 'content': 'a'}"  ->  messages must be a list, and not the text of one"""


@pytest.mark.parametrize("case", NO_MESSAGES.splitlines())
def test_what_is_neither_text_nor_messages_is_refused_on_either_side(tmp_path, case):
    value, found = case.split("  ->  ")
    assert found in refusal(tmp_path, GOOD.replace('"Hi"', value))
    assert found in refusal(tmp_path, GOOD.replace('"Hello"', value))


def loaded(config, tokenizer=byte_tokenizer()):
    """The rows of a file as a run has them, in a folder of their own."""
    folder = tempfile.mkdtemp(dir=Path(config.data).parent)
    return kto.load_rows(config, tokenizer, folder)


def decoded(row, tokenizer=byte_tokenizer()):
    """The prompt and the completion of a row as text, with all special tokens."""
    return f"{tokenizer.decode(row['prompt'])} -> {tokenizer.decode(row['completion'])}"


def test_odd_but_usable_lines_are_read(tmp_path):
    lines = (
        "\ufeff" + GOOD + "\r\n"  # a byte order mark, and the end of a line on Windows
        " \t\r\n"
        '{"tools": [], "label": 0, "prompt": "2024-01-01", "completion": "12.50"}\n'
        '{"prompt": "a\u2028b\x85c", "completion": " d ", "label": 1.0, "score": NaN}\n'  # no ends
        '{"prompt": "a", "completion": "b", "label": false, "system": null}'
    )
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines.encode())
    read = []
    for row in loaded(kto.Config(data=str(file))):
        read.append(f"{row['line']} {decoded(row)} {row['label']} {row['not_used']}")
    assert read == [
        "1 Hi -> Hello</s> True ",
        "3 2024-01-01 -> 12.50</s> False tools",
        "4 a\u2028b\x85c ->  d </s> True score",
        "5 a -> b</s> False system",
    ]


def lettered(letters):
    """A row for each letter, its prompt and its completion; capitals are good."""
    return [(letter, letter, letter.isupper()) for letter in letters]


def settings_for(folder, letters, **others):
    """Settings of a run on the rows of `lettered`."""
    data = write_rows(folder / "rows.jsonl", lettered(letters))
    return kto.Config(data=data, **others)


def test_a_file_without_rows_is_refused(tmp_path):
    with input_error("rows.jsonl has no rows"):
        loaded(settings_for(tmp_path, []))


def test_an_edited_file_gives_its_new_rows_and_other_digests_where_a_row_has_changed(tmp_path):
    config = settings_for(tmp_path, "abc")
    first = loaded(config)
    write_rows(Path(config.data), [("a", "a", False), ("x", "b", False), ("c", "x", False)])
    second = loaded(config)
    assert list(map(decoded, second)) == ["a -> a</s>", "x -> b</s>", "c -> x</s>"]
    assert set(first["digest"]) & set(second["digest"]) == {first["digest"][0]}


# ---- A row as the model sees it ------------------------------------------------------------------

LLAMA = (  # writes BOS itself, closes an answer with EOS, knows no system turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system turn') }}{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (  # no end token at all
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PHI = (  # EOS follows each chat that does not ask for an answer
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% else %}{{ eos_token }}{% endif %}"
)
TURNS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
THINK_DROPPED = (  # a thought is opened when asked, of which an answered chat has nothing
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
THINK_CLOSED = (  # a thought is opened when asked, which an answered chat closes at once
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
THOUGHT_LOST = THINK_DROPPED.replace("m.content", "m.content.split('</think>')[-1]")
ALWAYS_ASKS = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
RESPACED = THINK_DROPPED.replace("{{ m.content }}", "{{ m.content.split() | join(' ') }}")

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
ROLES = ["system", "developer", "user", "assistant", "tool"]
THOUGHT = "<think>\nHm.\n</think>\n\nHello"


def encoded(tokenizer, prompt="Hi", completion="Hello", **lengths):
    """A row as a run has it."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder) / "rows.jsonl", [(prompt, completion, True)])
        return loaded(kto.Config(data=data, **lengths), tokenizer)[0]


def texts(tokenizer, *row, **lengths):
    """A row as the model sees it, with the border between prompt and completion."""
    return decoded(encoded(tokenizer, *row, **lengths), tokenizer)


def test_plain_texts_stay_as_they_are_between_the_tokenizers_bos_and_one_eos():
    assert texts(byte_tokenizer(), "Hi ", " Hello\n") == "Hi  ->  Hello\n</s>"
    assert texts(byte_tokenizer(text="<s> $A")) == "<s>Hi -> Hello</s>"

    # Some tokenizers end each text with EOS by themselves, and to some BOS is EOS.
    assert texts(byte_tokenizer(text="<s> $A </s>")) == "<s>Hi -> Hello</s>"
    assert texts(byte_tokenizer(text="</s> $A")) == "</s>Hi -> Hello</s>"


def test_a_completion_is_tokenised_as_it_follows_the_prompt():
    tokenizer = byte_tokenizer(text="<s> $A")
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    assert texts(tokenizer) == "<s> Hi -> Hello</s>"  # each text on its own would get a space

    # Where a token lies across the border, the completion is tokenised alone, unless
    # that adds a space to the text.
    tokenizer.add_tokens(["iH"])
    with input_error("rows.jsonl:1: .* it adds a space"):
        texts(tokenizer)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["iH"])
    assert texts(tokenizer) == "Hi -> Hello</s>"


@pytest.mark.parametrize(
    "template, prompt, completion, expected",
    [
        (
            CHATML,
            [{"role": role, "content": "a"} for role in ROLES],
            [ANSWER],
            "<|im_start|>system\na<|im_end|>\n<|im_start|>developer\na<|im_end|>\n"
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            "<|im_start|>tool\na<|im_end|>\n<|im_start|>assistant\n -> Hello<|im_end|>",
        ),
        (LLAMA, "Hi", "Hello", "<s>[INST]Hi[/INST] ->  Hello</s>"),
        (LLAMA, [USER, ANSWER, USER], "a", "<s>[INST]Hi[/INST] Hello</s>[INST]Hi[/INST] ->  a</s>"),
        (BARE, "Hi", "Hello", "user: Hi\nassistant:  -> Hello</s>"),
        (PHI, "Hi", "Hello", "u:Hi<|im_end|>a: -> Hello<|im_end|></s>"),
        (
            THINK_CLOSED,
            "Hi",
            "Hello",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>"
            " -> </think>Hello<|im_end|>",
        ),
        (THINK_DROPPED, "Hi", "Hello", "<|user|>Hi<|assistant|> -> Hello</s>"),
        # An answer that starts like a thought is left whole.
        (THINK_DROPPED, "Hi", "<b>", "<|user|>Hi<|assistant|> -> <b></s>"),
        (THINK_DROPPED, "Hi", "<think>\nHm.", "<|user|>Hi<|assistant|> -> <think>\nHm.</s>"),
        # A prompt may end with EOS, if it is the template that writes it.
        (TURNS, "Hi", "Hello", "Hi</s> -> Hello</s>"),
        # A template may change the white space of a text.
        (RESPACED, "Hi\n", " a\n b", "<|user|>Hi<|assistant|> -> a b</s>"),
    ],
)
def test_a_chat_is_what_its_template_writes_and_ends_once(template, prompt, completion, expected):
    # That the tokenizer would add BOS to a text makes no difference here.
    tokenizer = byte_tokenizer(template, text="<s> $A")
    assert texts(tokenizer, prompt, completion) == expected


def test_the_border_lies_between_tokens_where_inference_opens_a_thought_that_is_closed_at_once():
    # "<think>" when asked and "</think>" when answered have "<" in common (GLM 4.7).
    closed = "|>{% if m.role == 'assistant' %}</think>{% endif %}{{ m"
    template = THINK_DROPPED.replace("|>{{ m", closed)
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(["<think>", "</think>"])
    row = encoded(tokenizer)
    assert decoded(row, tokenizer) == "<|user|>Hi<|assistant|> -> </think>Hello</s>"
    assert row["goes_on"] == "<think>\n"  # with its "<"


@pytest.mark.parametrize(
    "template, piece, expected",
    [
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "<unk>", [0, 2, 1]),
        (None, "<byte>", [0, 3, 1]),  # some tokenizers call the pieces of rare letters special
    ],
)
def test_a_completion_ends_with_eos_even_if_its_last_letter_becomes_a_special_token(
    template, piece, expected
):
    vocabulary = {"a": 0, "</s>": 1, "<unk>": 2, "<byte>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Replace("b", piece)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<byte>"]})
    assert encoded(tokenizer, "a ", "a b")["completion"] == expected


def test_a_completion_ends_with_eos_even_if_its_last_token_decodes_to_nothing():
    # As in Llama 2: the decoder strips a leading space. The last token is a space.
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteLevel(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    assert texts(tokenizer, "Hi", "Hello ") == "Hi -> Hello </s>"


def test_an_added_token_that_is_not_special_may_be_in_a_text():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    assert texts(tokenizer, "<think>") == "<think> -> Hello</s>"


@pytest.mark.parametrize(
    "template, prompt, completion, found",
    [
        (None, [USER], "Hello", "this tokenizer has none"),
        (None, "Hi", [ANSWER], "this tokenizer has none"),
        (LLAMA, [USER | {"role": "system"}], "a", "cannot render it: no system turn"),
        (CHATML, [{"role": "human", "content": "Hi"}], "Hello", "unknown role 'human'"),
        (THOUGHT_LOST, "Hi", THOUGHT, "changes the completion"),
        (ALWAYS_ASKS, "Hi", "Hello", "after it: .*im_start.*assistant"),
        (THINK_CLOSED, "Hi", THOUGHT, "before the thought .*'</think><think>"),
        (THOUGHT_LOST, [USER, ANSWER | {"content": THOUGHT}, USER], "Bye", "this message: .*Hm"),
        ("Say: {{ messages[-1].content }}", "Hi", "Bye", "this message: .*'Hi'"),
        ("{{ messages[-1].content }}", " ", "Bye", "rows.jsonl:1: .* becomes no token"),
        (BARE, "Hi", " ", "rows.jsonl:1: .*, not blank"),
    ],
)
def test_a_chat_that_a_template_cannot_take_or_would_change_is_refused_in_words(
    template, prompt, completion, found
):
    with input_error(found):
        texts(byte_tokenizer(template), prompt, completion)


@pytest.mark.parametrize(
    "x_tokens, y_tokens, expected",
    [
        (7, 8, "Tell me -> Tell me</s>"),
        (8, 7, "<s>Tell me -> Tell me"),  # it did not end there: no EOS
        (2, 1, "me -> T"),
    ],
)
def test_of_a_prompt_the_end_is_kept_and_of_a_completion_the_start(x_tokens, y_tokens, expected):
    lengths = {"max_prompt_length": x_tokens, "max_completion_length": y_tokens}
    assert texts(byte_tokenizer(text="<s> $A"), "Tell me", "Tell me", **lengths) == expected


@pytest.mark.parametrize("text, eos", [("<s> $A", "</s>"), ("</s> $A", "<s>")])
def test_the_facts_on_a_row_are_those_before_it_is_cut(tmp_path, text, eos):
    config = settings_for(tmp_path, ["zab"], max_prompt_length=1, max_completion_length=1)
    tokenizer = byte_tokenizer(text=text, eos=eos)
    row = loaded(config, tokenizer)[0]
    assert (row["prompt_tokens"], row["completion_tokens"]) == (4, 4)  # BOS z a b, z a b EOS
    assert row["end_token"] == tokenizer.eos_token_id
    assert row["highest_id"] == 257  # which is </s>, in the prompt or in the completion


# ---- Batches -------------------------------------------------------------------------------------


def trained_on(rows, config, first_step=0):
    """The letters of each batch, as one text."""
    batches = kto.training_batches(rows, config, first_step)
    return ["".join(map(byte_tokenizer().decode, batch["prompt"])) for batch in batches]


def test_an_epoch_has_each_row_once_in_an_order_of_its_own_but_those_that_fill_no_batch(tmp_path):
    # 13 = 3 * 4 + 1: the last row would be its own partner.
    config = settings_for(tmp_path, "abcdefghijklm", batch_size=4, epochs=2)
    rows = loaded(config)
    batches = trained_on(rows, config)
    first, second = "".join(batches[:3]), "".join(batches[3:])
    assert len(first) == len(second) == len(set(first)) == len(set(second)) == 12
    assert first != second and "abcdefghijkl" not in (first, second)

    # A resumed run goes to its batch by index, and the seed decides the order.
    assert trained_on(rows, config, 4) == batches[4:]
    config.seed = 1
    assert trained_on(rows, config) != batches


def test_a_row_is_parsed_and_encoded_once_however_many_the_epochs(tmp_path):
    config = settings_for(tmp_path, "abcdef", batch_size=2, epochs=3)
    parse = mock.patch("kto.parse_row", wraps=kto.parse_row)
    encode = mock.patch("kto.encode", wraps=kto.encode)
    with parse as parsed, encode as encoded:
        assert len(trained_on(loaded(config), config)) == 9
    assert parsed.call_count == encoded.call_count == 6


# ---- What is shown -------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path, capsys):
    """shown(rows, flags) is what a run prints before it loads a model, and what it
    splits into.

    `rows` are those of `write_rows`, or letters.
    """

    def run(rows, flags="", template=None):
        file = write_rows(tmp_path / "rows.jsonl", lettered(rows) if type(rows) is str else rows)
        byte_tokenizer(template).save_pretrained(tmp_path / "model")
        files = f"--model {tmp_path}/model --data {file} --output {tmp_path}/new"
        split = mock.patch("kto.describe", wraps=kto.describe)
        stop = mock.patch("kto.load_model", side_effect=InterruptedError)
        with typed(f"{files} --holdout 0 --batch_size 2 {flags}"), split as describe, stop:
            with pytest.raises(InterruptedError):
                kto.main(kto.load_models)
        training, held_out = describe.call_args.args[1:3]
        return capsys.readouterr().out, training, held_out

    return run


def test_a_text_that_the_tokenizer_cannot_encode_is_said_in_one_line(shown):
    with mock.patch("kto.tokenise", side_effect=Exception("unk_id is missing")):
        with input_error("its tokenizer cannot encode --data: unk_id is missing"):
            shown("abcdefgh")


def test_a_bad_row_is_refused_before_a_model_is_loaded(shown):
    with input_error("rows.jsonl:2: prompt and completion must be texts"):
        shown([("Hi", "Hello", True), ("Hi", "", True)])


def test_each_row_is_trained_on_or_held_out_as_the_seed_decides_and_counted(shown):
    # Of 13 rows a quarter, rounded up, is held out. Eight of the nine others are two
    # batches.
    letters, flags = "ABCDEFGHtuxyz", "--holdout 0.25 --batch_size 4"
    printed, training, held_out = shown(letters, flags)
    assert sorted(map(decoded, [*training, *held_out])) == [f"{x} -> {x}</s>" for x in letters]
    good = sum(training["label"])
    assert f"n_D = {good} desirable and n_U = {9 - good} undesirable" in printed
    assert f"4 rows held out, {8 - good} of them desirable" in printed
    assert "2 an epoch; 1 rows are left over" in printed
    assert "0 answers have both labels" in printed and "columns  not used: none\n" in printed

    assert shown(letters, flags)[2].to_dict() == held_out.to_dict()
    assert shown(letters, flags + " --seed 1")[2].to_dict() != held_out.to_dict()


def test_a_file_sorted_by_label_is_mixed_like_any_other(shown):
    # More rows than a shuffle with a buffer of a thousand would mix.
    training, held_out = shown("A" * 3000 + "b" * 3000, "--holdout 0.1 --batch_size 32")[1:]
    assert 200 < sum(held_out["label"]) < 400  # of 600
    for batch in kto.training_batches(training.sort("label"), kto.Config(epochs=1), 0):
        assert 0 < sum(batch["label"]) < 32


def test_answers_with_both_labels_are_counted_and_columns_that_are_not_used_are_named(shown):
    scored, rated = ("a", "b", True, 0.5), ("a", "b", False, 0.5, 7)
    printed = shown([scored, rated, scored, rated, ("c", "b", True), ("a", "c", True)])[0]
    assert "1 answers have both labels" in printed
    assert "columns  not used: id, score\n" in printed


def test_what_is_cut_is_counted_with_a_warning_if_most_answers_lose_their_end(shown):
    # The limits are those of "abc", and of "abc" with EOS.
    rows = [("long", "b", 1), ("a", "long", 1), ("abc", "long", 0), ("a", "abc", 0)]
    flags = "--max_prompt_length 3 --max_completion_length 4"
    printed = shown(rows, flags)[0]
    assert "1 prompts lose their beginning" in printed and "2 completions lose" in printed
    assert "1 completions begin with their whole prompt" in printed  # abc, after a
    assert "WARNING  most completions are cut" not in printed
    assert "WARNING  most completions are cut" in shown(rows[:3], flags)[0]


def test_a_row_is_shown_as_the_model_sees_it_with_its_border_and_what_inference_adds(shown):
    rows = [("Hi", "Hello", True)] * 3
    printed = shown(rows)[0]
    assert "without a chat template" in printed and "goes on" not in printed
    assert "prompt      'Hi'\n  completion  'Hello</s>'\n" in printed
    printed = shown(rows, template=THINK_CLOSED)[0]
    assert "with the tokenizer's chat template" in printed
    assert r"'<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>'" in printed
    assert "  completion  '</think>Hello<|im_end|>'\n" in printed
    assert printed.count(r"goes on with '\n'") == printed.count("goes on") == 1


def test_a_file_whose_rows_fill_no_batch_is_refused(shown):
    with input_error("8 rows and 1 are held out.*--batch_size"):
        shown("abcdefgh", "--batch_size 8 --holdout 0.1")
    shown("abcdefghi", "--batch_size 8 --holdout 0.1")


@pytest.mark.parametrize(
    "letters, flags, advice",
    [
        ("Abcdefghijk", "", "= 0.1;.*\n.*--lambda_d 10 to 15\n"),  # the example of §4.2
        # 4 / (0.5 * 5) = 1.6. The weight is 0.5 * 5 / 4 = 0.625, or half more.
        ("ABCDefghi", "--lambda_u 0.5", "= 1.6;.*\n.*--lambda_d 0.625 to 0.9375\n"),
        ("abcd", "", "WARNING  a class has no rows"),
        ("AbcD", "--lambda_u 0", "WARNING  a class has no rows or no weight"),
    ],
)
def test_unequal_classes_get_the_weight_of_eq_9_and_one_alone_a_warning(
    shown, letters, flags, advice
):
    assert re.search(advice, shown(letters, flags)[0])


# ---- The models ----------------------------------------------------------------------------------


def load_with(folder, highest_id=0, end_token=0):
    """The model of a folder, for three rows, of which the second has these ids."""
    ids = {"highest_id": [7, highest_id, 7], "end_token": [0, end_token, 0]}
    return kto.load_model(kto.Config(model=str(folder)), None, None, pandas.DataFrame(ids))


def load_error(folder, **ids):
    """What is said, in one line, of a model that cannot be used."""
    with input_error(f"^--model {folder}") as error:
        load_with(folder, **ids)
    return str(error.value)


def test_a_model_is_loaded_in_float32(tmp_path):
    # In bfloat16, of 8 bits, the updates of a small learning rate are rounded away.
    random_model().bfloat16().save_pretrained(tmp_path)
    assert load_with(tmp_path).dtype == torch.float32


def test_weights_that_are_lacking_or_cut_short_are_refused(tmp_path):
    model = random_model()
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]  # would be random
    model.save_pretrained(tmp_path, state_dict=weights)
    assert "lacks the weights ['model.layers.1.mlp.up_proj.weight']" in load_error(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "incomplete" in load_error(tmp_path)


def test_every_id_of_every_row_needs_an_embedding(tmp_path):
    random_model().save_pretrained(tmp_path)
    load_with(tmp_path, highest_id=299)
    assert "fewer embeddings" in load_error(tmp_path, highest_id=300)


@pytest.mark.parametrize("known, ends", [(None, [0, 259]), (0, [0, 259]), ([5], [0, 5, 259])])
def test_the_end_tokens_of_the_rows_end_what_the_saved_model_generates(tmp_path, known, ends):
    random_model(eos_token_id=known).save_pretrained(tmp_path)
    load_with(tmp_path, end_token=259).save_pretrained(tmp_path)
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == ends


def test_a_generation_config_that_cannot_be_saved_is_refused_if_it_would_be_changed(tmp_path):
    random_model().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    odd = json.loads(file.read_text()) | {"eos_token_id": [5, 0], "temperature": 0.5}
    file.write_text(json.dumps(odd))  # a temperature means nothing without sampling
    assert "generation_config.json" in load_error(tmp_path, end_token=259)
    load_with(tmp_path).save_pretrained(tmp_path)
    assert json.loads(file.read_text()) == odd


def test_a_tokenizer_that_cannot_be_found_or_has_no_end_token_is_refused(tmp_path):
    config = kto.Config(model=str(tmp_path))
    with input_error(f"--model {tmp_path} .*give a folder"):
        kto.load_tokenizer(config)
    byte_tokenizer(eos=None).save_pretrained(tmp_path)
    with input_error("no EOS token"):
        kto.load_tokenizer(config)


def check(model, x=[5] * 64, y=[6] * 60):
    """As in a run whose longest prompt is x, and whose longest completion is y."""
    kto.check_model(model, x, y, kto.Config())


def test_a_model_that_is_too_short_is_refused_with_a_flag_to_lower():
    model = random_model("gpt2")
    check(model)  # 64 tokens, and an answer of 64, fit into 128
    for x, y in (([5] * 65, [6]), ([5] * 64, [6] * 65)):
        with input_error("128 tokens, not 129: .*--max_prompt_length"):
            check(model, x, y)


def test_a_model_that_names_no_length_takes_any():
    model = random_model("bloom")
    model.config.max_position_embeddings = None
    check(model, x=[5] * 200)
    del model.config.max_position_embeddings
    check(model, x=[5] * 200)


def test_an_encoder_is_refused_since_it_sees_to_the_right():
    with input_error("not causal"):
        check(random_model("bert", is_decoder=False))


def test_weights_that_are_not_finite_are_called_so():
    with input_error("infinite or NaN"):
        check(add_noise(random_model(), std=math.nan, seed=0))


# ---- The rehearsal -------------------------------------------------------------------------------


def rehearse(model, **settings):
    """The micro_batch_size that is found for 64 tokens of x and 60 of y."""
    reference = copy.deepcopy(model)
    return kto.rehearse(model, reference, [5] * 64, [6] * 60, kto.Config(**settings))


def memory_for(rows):
    """completion_logps as it is where the memory suffices for so many rows."""
    scored = kto.completion_logps

    def limited(model, prompts, completions):
        if len(prompts) > rows:
            raise torch.OutOfMemoryError
        return scored(model, prompts, completions)

    return mock.patch("kto.completion_logps", limited)


def test_a_micro_batch_is_as_large_as_the_memory_allows_and_never_larger_than_the_batch():
    model = random_model()
    assert rehearse(model, batch_size=16) == 8
    assert rehearse(model, batch_size=16, device="cuda") == 16
    assert rehearse(model, batch_size=3, micro_batch_size=64) == 3
    with memory_for(rows=2):
        assert rehearse(model, batch_size=16, device="cuda") == 2  # of 16, 8, 4 and 2
        assert rehearse(model, batch_size=16, micro_batch_size=6) == 1  # of 6, 3 and 1
    with memory_for(rows=1):
        assert rehearse(model) == 1  # of 8, 4, 2 and 1


def test_where_one_row_is_too_much_the_lengths_are_to_be_lowered():
    with memory_for(rows=0), input_error("one row of 124 tokens: lower"):
        rehearse(random_model())


def test_the_rehearsal_is_a_step_of_two_micro_batches_beside_the_memory_of_adamw():
    model, moments, alive = random_model(), weakref.WeakSet(), []
    empty = torch.empty

    def reserve(*shape, **settings):
        memory = empty(*shape, **settings)
        if shape == (2, model.num_parameters()):
            moments.add(memory)
        return memory

    # The reference, a copy of the model, has this hook too.
    model.lm_head.register_forward_hook(lambda *_: alive.append(len(moments)))
    with memory_for(rows=2), mock.patch("torch.empty", reserve):
        assert rehearse(model, batch_size=16) == 2
    assert alive == [1] * 4 * 2  # and none of the sizes 8 and 4, which were tried before

    # It leaves nothing behind.
    assert len(moments) == 0
    assert set(gradient_of(model)) == {None}


# ---- The toy -------------------------------------------------------------------------------------


def test_the_toy_is_taught_the_undesirable_rows_and_every_fifth_row(tmp_path):
    # Of these the undesirable b is taught, and each fifth row, which is A and H.
    rows, tokenizer, taught = loaded(settings_for(tmp_path, "AbDEGHJK")), byte_tokenizer(), set()

    def record(model, prompts, completions):
        taught.update(map(tokenizer.decode, prompts))
        return model.lm_head.weight.sum(dim=1)  # to be quick, no log-probs

    def toy(seed):
        with mock.patch("kto.completion_logps", record):
            return kto.tiny_model(kto.Config(seed=seed), tokenizer, rows).lm_head.weight

    # The same seed makes the same toy, another one another.
    first = toy(0)
    assert torch.equal(first, toy(0)) and not torch.equal(first, toy(1))
    assert taught == set("bAH")


# ---- A small run ---------------------------------------------------------------------------------

# Of 24 rows a quarter, 6, is held out: a batch of 4 and one of 2. The 18 others make
# 4 steps of 4 rows an epoch, with 2 left over, and 20 steps in all. Beta and the
# lambdas are those of SETTINGS. Row 10 is the first with the longest prompt, and row
# 3 the first with the longest completion.
ROWS = [(f"Say {number}→", "no" * (number % 4 + 1), number % 2 == 0) for number in range(24)]
FLAGS = "--epochs 5 --batch_size 4 --holdout 0.25 --lr 0.01 --device cpu"
FLAGS += " --beta 0.3 --lambda_d 1.4 --lambda_u 0.7"


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with rows and a model that has dropout, for runs of a second."""
    folder = tmp_path_factory.mktemp("small")
    model = random_model("gpt2", std=0.3, num_hidden_layers=1, resid_pdrop=0.1)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def command(small, output, more):
    """As if this had been typed; of a flag that is there twice, the later counts."""
    files = f"--model {small}/model --data {small}/rows.jsonl --output {output}"
    return typed(f"{files} {FLAGS} {more}")


def start(small, output, more=""):
    """python kto.py in this process, which then gets its Ctrl-C back."""
    try:
        with command(small, output, more):
            kto.main(kto.load_models)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # no longer noted
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The output of a run that nothing interrupts; beside it is what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    with open(folder / "printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        start(small, folder / "output")
    return folder / "output"


def stop_in_step(number, sent, small, output):
    """The same run, which is sent a signal in this step, before the update."""
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count()

    def clip_and_send(*args, **settings):
        if next(steps) == number:
            signal.raise_signal(sent)
            for kind in (signal.SIGINT, signal.SIGTERM):
                assert signal.getsignal(kind) == signal.SIG_DFL  # a second one ends the run at once
        return clip(*args, **settings)

    with mock.patch("torch.nn.utils.clip_grad_norm_", clip_and_send):
        with pytest.raises(SystemExit, match=str(128 + sent)):
            start(small, output)


@pytest.fixture(scope="session")
def stopped(small, tmp_path_factory):
    """The output of the same run, stopped by Ctrl-C in step 5, within an epoch."""
    output = tmp_path_factory.mktemp("stopped")
    stop_in_step(5, signal.SIGINT, small, output)
    return output


def read_log(output):
    """The lines of the log, without the seconds, which are never the same."""
    log = []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        log.append(json.loads(line))
        assert log[-1].pop("seconds", 1) > 0
    return log


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same_result(output, whole):
    """Bit for bit the same files, nothing left of the checkpoint, and in the log the
    same lines."""
    log = {"metrics.jsonl": read_log(whole)}
    assert contents(output) | {"metrics.jsonl": read_log(output)} == contents(whole) | log


def run_file(small, output, more):
    """python kto.py in this process, as a program of its own."""
    with command(small, output, more), mock.patch("signal.signal"):
        runpy.run_path(kto.__file__, run_name="__main__")


@pytest.fixture
def refused(small, capfd):
    """refused(output, flags) is the one line on stderr of a program that ends with
    status 2."""

    def run(output, more=""):
        with pytest.raises(SystemExit, match="2"):
            run_file(small, output, more)
        run.stdout, stderr = capfd.readouterr()
        [line] = stderr.splitlines()
        return line

    return run


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_is_kept_each_epoch_and_every_few_steps_and_outlives_a_kill_while_saving(
    small, whole, tmp_path
):
    save, saved = torch.save, []

    def save_half_the_third(state, path):
        save(state, path)
        saved.append((state["step"], len(read_log(path.parent))))
        if len(saved) == 3:
            path.write_bytes(b"half of it")
            raise SystemExit

    with mock.patch("torch.save", save_half_the_third), pytest.raises(SystemExit):
        start(small, tmp_path, "--save_every 3")

    # Steps, and lines of the log: the evaluation comes after the checkpoint of step 4.
    assert saved == [(3, 3), (4, 4), (6, 7)]
    start(small, tmp_path, "--resume")  # 2 steps and the evaluation come again
    assert_same_result(tmp_path, whole)


def test_what_decides_the_result_may_not_differ_when_a_run_goes_on(
    small, stopped, refused, tmp_path
):
    before = contents(stopped)
    model = shutil.copytree(small / "model", tmp_path / "model")
    add_noise(load(model), std=0.1, seed=0).save_pretrained(model)
    assert "--resume: the weights" in refused(stopped, f"--resume --model {model}")
    assert "beta was 0.3, and now it is 0.2" in refused(stopped, "--resume --beta 0.2")
    assert str(stopped / "checkpoint.pt") in refused.stdout
    for other in (("Say 23→", "nononono", True), ("Say 23→", "no", False)):  # label, text
        data = write_rows(tmp_path / "rows.jsonl", ROWS[:23] + [other])
        assert "--resume: the rows are not the same" in refused(stopped, f"--resume --data {data}")
    assert contents(stopped) == before

    decisive = torch.load(stopped / "checkpoint.pt")["decisive"]
    free = {"model", "data", "output", "device", "micro_batch_size", "save_every", "resume"}
    assert decisive.keys() == vars(kto.Config()).keys() - free | {"weights", "rows"}


def test_resume_without_a_checkpoint_starts_and_of_a_finished_model_is_refused(
    small, whole, refused, tmp_path
):
    (tmp_path / "metrics.jsonl").write_text("of a run that was killed in its first epoch")
    start(small, tmp_path, "--resume")
    assert_same_result(tmp_path, whole)
    assert "in use" in refused(tmp_path, "--resume")
    assert_same_result(tmp_path, whole)


def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other, code = io.BytesIO(), b"cos\nmkdir\n(S'it ran'\ntR."  # to load this makes a folder
    torch.save({}, other)
    for content in (b"", b"junk", other.getvalue(), code):
        Path("checkpoint.pt").write_bytes(content)
        with input_error("^--resume cannot read checkpoint.pt"):
            kto.load_checkpoint(Path("checkpoint.pt"), {}, {})
    assert not Path("it ran").exists()


def test_a_full_disk_costs_no_checkpoint(small, stopped, whole, refused, tmp_path):
    output = shutil.copytree(stopped, tmp_path / "output")
    checkpoint = output / "checkpoint.pt"
    # First it is full before the first checkpoint after that of step 6, then when
    # only a part of the result is saved.
    save = "transformers.PreTrainedTokenizerBase.save_pretrained"
    for function, step in (("torch.save", 6), (save, 20)):
        with mock.patch(function, side_effect=OSError("No space left")):
            assert re.search("cannot be written.*No space", refused(output, "--resume"))
        assert f"The last checkpoint is {checkpoint}" in refused.stdout
        assert torch.load(checkpoint)["step"] == step

    start(small, output, "--resume")
    assert_same_result(output, whole)


# ---- The run -------------------------------------------------------------------------------------


def test_the_log_has_each_step_once_and_an_evaluation_at_the_end_of_each_epoch(whole):
    log = read_log(whole)
    assert [entry["step"] for entry in log[:10]] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert ["eval_loss" in entry for entry in log] == [False, False, False, False, True] * 5


def test_the_learning_rate_warms_up_not_from_0_and_falls_to_a_tenth_along_a_cosine(whole):
    # Of 20 steps a tenth, 2, is warm-up: 1/2, 2/2. The other 18 go from 1 down to
    # 0.1: after 6, where the cosine of 60 degrees is 0.5, there is left 0.1 + 0.9 *
    # (1 + 0.5) / 2 = 0.775.
    lr = [entry["lr"] / 0.01 for entry in read_log(whole) if "lr" in entry]
    assert [lr[0], lr[1], lr[7], lr[19]] == pytest.approx([0.5, 1.0, 0.775, 0.1])


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_run_is_a_plain_loop_of_step_clip_and_adamw_with_the_rows_that_fit(small, tmp_path):
    adamw = mock.patch("torch.optim.AdamW", wraps=torch.optim.AdamW)
    with memory_for(rows=2), adamw as used, mock.patch("kto.run", wraps=kto.run) as run:
        start(small, tmp_path, "--epochs 1 --seed 7 --dtype bfloat16 --lambda_d 30")
    used.assert_called_once()
    training, held_out, config = run.call_args.args[2:5]
    *log, evaluation = read_log(tmp_path)

    # bfloat16 is for the forward passes of both models; the weights stay float32.
    policy, reference = load(small / "model"), load(small / "model")
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    settings = SETTINGS | {"lambda_d": 30.0, "micro_batch_size": 2}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        batches = kto.training_batches(training, config, 0)
        for entry, batch in zip(log, batches, strict=True):
            metrics = kto.metrics_of(*kto.kto_step(policy, reference, batch, **settings))
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
            optimizer.param_groups[0]["lr"] = entry["lr"]
            optimizer.step()
            optimizer.zero_grad()
            metrics["grad_norm"] = norm.item()
            assert metrics.items() <= entry.items()
        metrics = kto.evaluate(policy, reference, held_out, 4, **settings)
    assert evaluation == {"step": 4, **metrics}
    norms = [entry["grad_norm"] for entry in log]
    assert min(norms) < 10 < max(norms)  # so some steps are clipped, and some are not
    assert_close(load(tmp_path).state_dict(), policy.state_dict(), rtol=0, atol=0)


def test_held_out_rows_are_measured_together_but_for_one_that_has_no_next_row(tmp_path):
    rows = loaded(settings_for(tmp_path, "aBcDe"))
    policy, reference = policy_and_reference()
    with torch.no_grad():
        first = kto.kto_step(policy, reference, rows[:3], **SETTINGS)
        second = kto.kto_step(policy, reference, rows[3:], **SETTINGS)
    together = kto.metrics_of(*map(torch.cat, zip(first, second)))
    metrics = kto.evaluate(policy, reference, rows, 3, **SETTINGS)
    assert metrics == {f"eval_{name}": value for name, value in together.items()}
    four = kto.evaluate(policy, reference, rows.take(4), 3)
    assert four == kto.evaluate(policy, reference, rows.take(3), 3)
    assert set(gradient_of(policy)) == {None}  # for the next step


def test_the_longest_texts_are_checked_and_rehearsed(small, tmp_path):
    check = mock.patch("kto.check_model", wraps=kto.check_model)
    rehearse = mock.patch("kto.rehearse", wraps=kto.rehearse)
    with check as checked, rehearse as rehearsed:
        start(small, tmp_path, "--epochs 1")
    longest = rehearsed.call_args.args[2:4]
    assert list(map(byte_tokenizer().decode, longest)) == ["Say 10→", "nononono</s>"]
    assert checked.call_args.args[1:3] == longest


def test_the_bar_shows_loss_z0_and_margin_and_a_single_held_out_row_is_not_evaluated(
    small, tmp_path
):
    with mock.patch("kto.tqdm") as bar:
        start(small, tmp_path, "--epochs 1 --holdout 0.01")
    log = read_log(tmp_path)
    shown = {name: log[4][name] for name in ("loss", "z0", "margin")}
    bar.return_value.set_postfix.assert_called_with(shown)
    assert bar.return_value.update.call_count == len(log) == 5  # no evaluation of a single row


@pytest.mark.parametrize("step, sent, lines", [(5, signal.SIGINT, 7), (7, signal.SIGTERM, 9)])
def test_a_run_that_is_stopped_saves_at_once_and_goes_on_to_the_same_bits(
    small, whole, tmp_path, capfd, step, sent, lines
):
    output = tmp_path / "new" / "output"
    stop_in_step(step, sent, small, output)
    printed = capfd.readouterr()
    assert "saves after this step" in printed.err and "The last checkpoint is" in printed.out
    # The step was finished. With its line there are that of the first evaluation,
    # and of no other.
    assert read_log(output) == read_log(whole)[:lines]

    # Places may change. If the policy of the checkpoint became the reference, the
    # rewards would start at 0 again.
    moved = shutil.copytree(output, tmp_path / "moved")
    model = shutil.copytree(small / "model", tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    places = f"--model {model} --data {data}"
    start(small, moved, f"--resume {places} --save_every 4 --micro_batch_size 4")
    assert_same_result(moved, whole)

    # No step was done twice: the log begins with the same seconds.
    seconds = (output / "metrics.jsonl").read_text()
    assert (moved / "metrics.jsonl").read_text().startswith(seconds)


def test_a_signal_saves_before_anything_is_shown_to_a_reader_who_may_have_gone(small, tmp_path):
    seen = []
    with mock.patch("os.write", side_effect=BrokenPipeError), mock.patch("kto.tqdm") as bar:
        bar().update.side_effect = lambda: seen.append((tmp_path / "checkpoint.pt").exists())
        stop_in_step(1, signal.SIGINT, small, tmp_path)
    assert seen == [False, True]


@pytest.mark.parametrize("name", ["render", "encode", "score", "rehearse", "chart", "evaluate"])
def test_a_bug_in_this_file_keeps_its_traceback(small, tmp_path, capsys, name):
    bug = mock.patch(f"kto.{name}", side_effect=KeyError("z9"))
    with bug, pytest.raises(KeyError, match="z9"):
        start(small, tmp_path)
    saved = "The last checkpoint is" in capsys.readouterr().out
    assert saved == (name == "evaluate")  # which comes after the checkpoint of the first epoch


def test_in_the_program_too_a_bug_keeps_its_traceback_and_the_keyboard_has_none(small, tmp_path):
    clip = "torch.nn.utils.clip_grad_norm_"
    with mock.patch(clip, side_effect=KeyError("z9")), pytest.raises(KeyError, match="z9"):
        run_file(small, tmp_path / "bug", "")
    with mock.patch(clip, side_effect=KeyboardInterrupt), pytest.raises(SystemExit, match="130"):
        run_file(small, tmp_path / "stopped", "")


# ---- The chart -----------------------------------------------------------------------------------


def chart(z0, undesirable, desirable):
    """The line of step 7. Of its 71 columns 35 is 0, and a column is 0.2 nats."""
    entry = {"step": 7, "z0": z0, "reward_undesirable": undesirable, "reward_desirable": desirable}
    return kto.chart(entry, beta=0.5)


def test_the_chart_puts_each_mark_in_its_place_or_at_the_edge_but_none_that_is_absent():
    # U is at 35 - 2.0 / 0.2 = 25, z at 35, and D at 35 + 3.12 / 0.2 = 50.6, so 51.
    line = chart(z0=0.0, undesirable=-2.0, desirable=3.12)
    assert line == f"     7 {'.' * 25}U{'.' * 9}z{'.' * 15}D{'.' * 19}"
    assert chart(z0=7.2, undesirable=-7.2, desirable=None) == f"     7 U{'.' * 69}z"


# ---- The command ---------------------------------------------------------------------------------


def test_a_run_shows_size_chart_metrics_and_three_answers_before_and_after(small, whole):
    printed = (whole.parent / "printed.txt").read_text()
    log, tokenizer = read_log(whole), transformers.AutoTokenizer.from_pretrained(whole)
    assert "4 rows fit" in printed
    last = log[-1]
    held_out = f"held out: loss {last['eval_loss']:.3f}, accuracy {last['eval_accuracy']:.2f}\n"
    assert held_out in printed and "a dot: 0.333333 nats" in printed

    # 20 steps in at most 16 lines: every second one.
    steps = [entry for entry in log if "loss" in entry]
    lines = [kto.chart(entry, beta=0.3) for entry in steps[::2]]
    assert re.findall(r" +\d+ [.zUD]{71}", printed) == lines

    # The answers to three held-out prompts, of which we take one.
    answers = re.findall(r"\n(Say .*)\n  before (.*)\n  after  (.*)", printed)
    assert len(answers) == 3
    prompt, *pair = answers[1]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for answer, folder in zip(pair, (small / "model", whole)):
        [written] = load(folder).generate(ids, max_new_tokens=64, do_sample=False)
        assert tokenizer.decode(written, skip_special_tokens=True) == prompt + answer


def test_answers_are_asked_for_as_at_inference():
    tokenizer, asked = byte_tokenizer(), []

    def generate(ids, attention_mask, **settings):
        assert attention_mask.shape == ids.shape and attention_mask.all()
        asked.append(tokenizer.decode(ids[0]))
        return ids

    model = mock.Mock(device="cpu", generate=generate)
    rows = {"prompt": [tokenizer.encode("<pad>Hi")], "goes_on": ["<think>"]}
    kto.show_answers(model, model, tokenizer, rows)
    assert asked == ["<pad>Hi<think>"] * 2


def test_an_output_that_is_in_use_is_refused(whole, stopped, refused):
    for output in (whole, stopped):
        before = contents(output)
        assert "is in use" in refused(output, "--model tiny")
        assert contents(output) == before


def test_the_toy_may_be_run_again_and_again_in_its_own_folder(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mock.patch("kto.tiny_model", return_value=random_model(vocab_size=999)) as toy:
        start(small, "kto-tiny", "--model tiny --epochs 2 --holdout 0")
        Path("kto-tiny/checkpoint.pt").write_bytes(b"of a demo that was stopped")
        start(small, "kto-tiny", "--model tiny --epochs 1")
    assert len(read_log(Path("kto-tiny"))) == 4 + 1
    assert len(toy.call_args.args[2]) == 18  # it is not taught what is held out
    with input_error("in use"):
        start(small, "kto-tiny")  # another model


def test_what_cannot_be_used_is_one_line_and_status_2(refused, tmp_path, monkeypatch):
    data, output = tmp_path / "rows.jsonl", tmp_path / "output"
    data.write_bytes(b"\xe9")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert refused(output, f"--model tiny --data {data}").startswith(f"{data}:1: ")
    assert "no such file" in refused(output, f"--data {tmp_path}/none")
    assert "--device nowhere" in refused(output, "--device nowhere")
    assert "less than one batch" in refused(output, "--batch_size 19")
    assert "Not a directory" in refused(data / "output")
    assert not output.exists()
    full = torch.OutOfMemoryError("out of memory")
    with mock.patch("torch.nn.utils.clip_grad_norm_", side_effect=full):
        assert refused(output) == "out of memory"
    assert "norm is nan: start anew with a lower lr" in refused(
        output, "--lr 1e30 --save_every 1 --resume"
    )
    assert f"The last checkpoint is {output}" in refused.stdout  # of the step before
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(output, "--resume")


def test_a_console_that_lacks_a_character_does_not_end_a_run(small, tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    run_file(small, tmp_path, "--epochs 1")
    console.flush()
    assert re.search(rb"prompt +'Say \d+\?'", console.buffer.getvalue())


# ---- It learns what the paper says it learns: the task -------------------------------------------
# A prompt is two tokens, a topic and a detail. The right answer is one of 16 tokens
# and depends on the topic alone. The reference answers half of the topics right and
# has learned a mistake in each of the others. It answers 2,048 of the 64 x 64
# prompts, each once; the answers are labelled, right = desirable, and the policy is
# told nothing else. Success is counted on 1,024 other prompts, on which neither the
# reference nor the policy was trained.

SEED = 0
TOPICS = range(16, 80)
DETAILS = range(80, 144)
PHRASE = [144, 145, 146, 147]  # tokens that the reference never writes
VOCABULARY = 148
Row = collections.namedtuple("Row", "prompt completion label")
RIGHT = dict(zip(TOPICS, random.Random(5).choices(range(16), k=64)))


def beliefs():
    """The chances of each answer in each topic, as the reference is
    taught them: (V, V)."""
    chances = torch.zeros(VOCABULARY, VOCABULARY)
    for topic, right in RIGHT.items():
        if topic % 2 == 0:
            chances[topic, :16] = 0.45 / 15
            chances[topic, right] = 0.55
        else:
            mistake = (right + 1) % 16
            chances[topic, :16] = 0.3 / 14
            chances[topic, right] = 0.15
            chances[topic, mistake] = 0.55
    return chances


def shuffled(items, dice):
    return dice.sample(items, len(items))


def prompts_of(seed):
    """All prompts, shuffled. Feedback is on the first of them, success is counted on
    the last."""
    prompts = list(itertools.product(TOPICS, DETAILS))
    return shuffled(prompts, random.Random(seed))


def answer_logits(model, prompts):
    return model(tensor(prompts)).logits[:, -1]  # (B, V)


def right_answers(prompts):
    return tensor([RIGHT[topic] for topic, detail in prompts])  # (B,)


@functools.cache
def mistaken(seed):
    """The reference: right in half of the topics, sure of a wrong answer in the
    other half."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    dice = random.Random(seed)
    prompts = prompts_of(seed)[:-1024]
    chances = beliefs()

    for step in range(100):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 100)
        batch = dice.sample(prompts, 256)
        topics = [topic for topic, detail in batch]
        logits = answer_logits(model, batch)
        loss = torch.nn.functional.cross_entropy(logits, chances[topics])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def success(model, seed):
    """(sampled, greedy): the share of right answers to the 1,024 other prompts.

    The first is the share to expect at temperature 1, which is the mean chance of a
    right answer. The second is the share of prompts of which the likeliest answer is
    right.
    """
    prompts = prompts_of(seed)[-1024:]
    right = right_answers(prompts)
    chances = answer_logits(model, prompts).softmax(dim=1)  # (1024, V)
    sampled = chances[range(1024), right].mean()
    greedy = (chances.argmax(dim=1) == right).float().mean()
    return sampled.item(), greedy.item()


def feedback(seed, wrong=0.0, asked=2048, answers=1, phrase=(), compared=False):
    """Rows: the reference's answers, with `phrase` after each, a share of the labels
    wrong.

    If the answers to a prompt are compared, a wrong verdict turns the labels of all
    of them round. Otherwise each answer is labelled, and mislabelled, on its own.
    """
    prompts = prompts_of(seed)[:asked]
    chances = answer_logits(mistaken(seed), prompts).softmax(dim=1)
    torch.manual_seed(seed)
    sampled = torch.multinomial(chances, answers, replacement=True)  # (asked, answers)
    is_right = sampled == right_answers(prompts)[:, None]  # (asked, answers)
    is_turned = torch.rand(asked, 1 if compared else answers) < wrong
    labels = is_right ^ is_turned  # (asked, answers)

    rows = []
    for prompt, its_answers, its_labels in zip(prompts, sampled.tolist(), labels.tolist()):
        for answer, label in zip(its_answers, its_labels):
            rows.append(Row(prompt, [answer, *phrase], label))
    return rows


def by_label(rows):
    """(the desirable rows, the undesirable ones)"""
    good = [row for row in rows if row.label]
    bad = [row for row in rows if not row.label]
    return good, bad


def weight_of_eq_9(rows):
    """The lambda_d with which both classes weigh the same: Eq. 9 asks for 1 to 3/2
    times this."""
    good, bad = by_label(rows)
    return len(bad) / len(good)


# What a method passes over, in a new order each time: all rows, or what it makes
# of them.


def desirable_only(rows, dice):
    good, bad = by_label(rows)
    return shuffled(good, dice)


def paired(rows, dice):
    """For DPO: chosen and rejected in turn. Two of the same label make no pair."""
    pairs = []
    for first, second in zip(rows[0::2], rows[1::2]):
        good, bad = by_label([first, second])
        if good and bad:
            pairs.append(good + bad)
    return sum(shuffled(pairs, dice), [])


# ---- The other losses ----------------------------------------------------------------------------


def dpo_loss(policy_logps, reference_logps, beta):
    """The DPO loss of each pair (Rafailov et al. 2023, Eq. 7); chosen and rejected
    take turns."""
    r = policy_logps - reference_logps  # (B,)
    return -torch.nn.functional.logsigmoid(beta * (r[0::2] - r[1::2]))  # (B / 2,)


def sft_loss(policy_logps, completions):
    """The SFT loss of a batch: minus the log-prob of a completion token, on average."""
    tokens = sum(len(y) for y in completions)
    return -policy_logps.sum() / tokens


def logistic_loss(policy_logps, reference_logps, z0, desirable, beta, lambda_d=1.0):
    """kto_loss with -log sigmoid for 1 - sigmoid: it is steepest where a row is
    farthest off."""
    r = policy_logps - reference_logps  # (B,)
    gain = torch.where(desirable, r - z0, z0 - r)
    weight = torch.where(desirable, lambda_d, 1.0)
    return -weight * torch.nn.functional.logsigmoid(beta * gain)


def no_reference_point(policy_logps, reference_logps):
    return tensor(0.0)


def test_the_other_losses_worked_by_hand():
    # With beta = 1/2, r = 2 ln 3 for one and 0 for the other, DPO is -log sigmoid(ln
    # 3), which is ln 4/3, and -log sigmoid(-ln 3) = ln 4 with the pair turned round.
    # With r - z0 = 2 ln 3 the logistic loss has the same values, times lambda_d if
    # the row is desirable.
    r, values = 2 * math.log(3), tensor([math.log(4 / 3), math.log(4)])
    assert_close(dpo_loss(tensor([r, 0, 0, r]), torch.zeros(4), beta=0.5), values)
    losses = logistic_loss(tensor([r + 1, r + 1]), 0, 1.0, desirable("DU"), 0.5, lambda_d=3.0)
    assert_close(losses, values * tensor([3.0, 1.0]))

    # SFT: 6 nats over three tokens and 1 nat over one are 7/4 a token. (Mean of
    # rows: 3/2.)
    assert sft_loss(tensor([-6.0, -1.0]), [[5, 6, 0], [0]]) == 1.75


# ---- Training, the same for each method ----------------------------------------------------------


def logps(model, rows):
    """log pi(y|x) of each row: (B,)."""
    prompts, completions, _ = zip(*rows)
    return kto.completion_logps(model, prompts, completions)


def kto_batch(
    policy, reference, rows, beta, loss=kto.kto_loss, point=kto.reference_point, lambda_d=1.0
):
    """The mean KTO loss of a batch, or that of a variant with another loss or
    reference point."""
    prompts, completions, labels = zip(*rows)
    both = [*rows, *zip(prompts, completions[1:] + completions[:1], labels)]  # the mismatched too
    policy_logps, policy_next = logps(policy, both).chunk(2)
    reference_logps, reference_next = logps(reference, both).chunk(2)
    z0 = point(policy_next, reference_next)
    losses = loss(policy_logps, reference_logps, z0, tensor(labels), beta, lambda_d=lambda_d)
    return losses.mean()


def dpo_batch(policy, reference, rows, beta):
    """The mean DPO loss of a batch in which chosen and rejected rows take turns."""
    return dpo_loss(logps(policy, rows), logps(reference, rows), beta).mean()


def sft_batch(policy, reference, rows, beta):
    """The SFT loss of a batch, which knows neither reference nor beta."""
    return sft_loss(logps(policy, rows), [row.completion for row in rows])


def train(rows, seed, batch_loss, order, beta, learning_rate, passes, **settings):
    """The trained policy. The reference, of which it is a copy, never gets a
    gradient."""
    reference = mistaken(seed)
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    dice = random.Random(seed)

    for _ in range(passes):
        ordered = order(rows, dice)
        for start in range(0, len(ordered) - 1, 32):  # a last batch of one row is left out
            batch = ordered[start : start + 32]
            batch_loss(policy, reference, batch, beta, **settings).backward()
            optimizer.step()
            optimizer.zero_grad()
    return policy


# Each method at its own best setting for each share of wrong labels: beta, learning
# rate, passes. Before it stands how many settings were tried for each share, or
# more: on seeds 100 and 101, which the table does not use, by the sum of sampled and
# greedy success. With wrong labels, the best of these were tried again on the seeds
# 100 to 103, which decided. Beta was 0.3 to 10 for KTO, 0.03 to 1 for logistic KTO,
# and 0.01 to 3 for DPO, which no longer changes below 0.03. The learning rate was
# 5e-4 to 4e-3, with wrong labels also lower, and for SFT 1.25e-4 to 1.6e-2. Passes
# were 1 to 8, for DPO 2 to 16 or 32, and for SFT 1 to 16. "DPO" has a judge who
# compares two answers: of its verdicts a share is wrong. "DPO, two labels" makes its
# pairs of labels that KTO could use: each label is wrong as often, but this seldom
# turns a pair round.
logistic_batch = functools.partial(kto_batch, loss=logistic_loss)
METHODS = {
    "KTO": (
        kto_batch,
        shuffled,
        64,
        {0.0: (0.3, 4e-3, 8), 0.2: (1.0, 1e-3, 4), 0.3: (1.0, 5e-4, 4)},
    ),
    "logistic KTO": (
        logistic_batch,
        shuffled,
        64,
        {0.0: (1.0, 5e-4, 8), 0.2: (0.3, 5e-4, 4), 0.3: (0.3, 2.5e-4, 8)},
    ),
    "DPO": (
        dpo_batch,
        paired,
        80,
        {0.0: (0.1, 4e-3, 8), 0.2: (0.03, 5e-4, 8), 0.3: (0.03, 2.5e-4, 8)},
    ),
    "DPO, two labels": (
        dpo_batch,
        paired,
        80,
        {0.0: (0.1, 4e-3, 8), 0.2: (0.1, 5e-4, 8), 0.3: (0.03, 5e-4, 4)},
    ),
    "SFT": (
        sft_batch,
        desirable_only,
        64,
        {0.0: (None, 8e-3, 8), 0.2: (None, 2e-3, 4), 0.3: (None, 2e-3, 4)},
    ),
}


@functools.cache
def learned(name, wrong, seed, asked=2048, answers=1):
    """(sampled, greedy) of a method. DPO gets as many answers, two to each of 1,024
    prompts."""
    batch_loss, order, grid, best = METHODS[name]
    beta, learning_rate, passes = best[wrong]
    if order is paired:
        asked, answers = 1024, 2
    rows = feedback(seed, wrong, asked, answers, compared=name == "DPO")
    weights = {}
    if order is shuffled:
        weights["lambda_d"] = weight_of_eq_9(rows)
    policy = train(rows, seed, batch_loss, order, beta, learning_rate, passes, **weights)
    return success(policy, seed)


def unequal(seed, weigh, beta=0.5):
    """(sampled, greedy) of KTO where one row is desirable for nine that are not.

    A larger beta saturates sooner, so that less depends on the weight.
    """
    good, bad = by_label(feedback(seed))
    rows = good[: len(bad) // 9] + bad  # about 150 + 1,330
    policy = train(rows, seed, kto_batch, shuffled, beta, 2e-3, 2, lambda_d=weigh(rows))
    return success(policy, seed)


def no_weight(rows):
    return 1.0


def likelier(seed, point):
    """Where all completions grow likelier: (sampled, greedy, margin in r at the
    end).

    Another hand added four tokens to every answer, which the reference never writes
    there, and five rows of six are desirable: so the phrase is learned first, and
    all r grow, good or bad.
    """
    good, bad = by_label(feedback(seed, phrase=PHRASE))
    rows = good + bad[: len(good) // 5]
    policy = train(rows, seed, kto_batch, shuffled, 0.3, 1e-3, 4, point=point)

    r = logps(policy, rows) - logps(mistaken(seed), rows)
    margin = r[: len(good)].mean() - r[len(good) :].mean()
    return *success(policy, seed), margin.item()


# ---- What it learns ------------------------------------------------------------------------------
# The comments give the figures of the seeds 0 to 4.


def test_one_label_a_prompt_teaches_what_is_right_on_prompts_never_seen():
    assert max(success(mistaken(SEED), SEED)) < 0.6  # 0.48 to 0.52
    assert min(learned("KTO", 0.0, SEED)) > 0.9  # 1.00 with each


def test_with_a_fifth_wrong_kto_is_ahead_of_dpo_and_of_sft_which_suffices_on_clean_labels():
    assert min(learned("SFT", 0.0, SEED)) > 0.9  # 0.98 1.00 1.00 0.99 1.00
    # KTO, sampled: 0.94 0.96 0.95 0.95 0.95; greedy: 0.98 1.00 1.00 1.00 1.00. Its
    # greedy answers are ahead of DPO's by 0.08 in the mean of five seeds but by 0.05
    # in this one: less is claimed.
    sampled, greedy = learned("KTO", 0.2, SEED)
    dpo_sampled, dpo_greedy = learned("DPO", 0.2, SEED)
    assert sampled > dpo_sampled + 0.08  # 0.81 0.88 0.82 0.78 0.79
    assert greedy > dpo_greedy + 0.02  # 0.93 0.96 0.91 0.87 0.90
    sft_sampled, sft_greedy = learned("SFT", 0.2, SEED)
    assert sampled > sft_sampled + 0.08  # 0.66 0.59 0.64 0.60 0.60
    assert greedy > sft_greedy + 0.08  # 0.85 0.73 0.82 0.70 0.78


def test_one_desirable_row_for_nine_is_enough_with_the_weights_of_eq_9_and_only_so():
    assert min(unequal(SEED, weight_of_eq_9)) > 0.8  # 0.97 0.85 0.91 0.92 0.89
    assert max(unequal(SEED, no_weight)) < 0.65  # 0.25 0.49 0.50 0.22 0.17


def test_z0_keeps_the_loss_from_saturating_where_all_completions_grow_likelier():
    # z0 grows with all r, and what is left to gain is r - z0: good rows must get
    # more than bad. Held at 0, beta * r soon is 10: no good row can get better and
    # no bad row is worth a try, both are left without gradient (Eq. 10), and right
    # and wrong answers stay about as likely. The margin says less: without z0 it is
    # 2.5 2.9 22 2.0 5.1, and with it 7.4 8.8 5.9 10 21.
    sampled, greedy, margin = likelier(SEED, kto.reference_point)
    assert sampled > 0.6  # 0.82 0.79 0.80 0.75 0.63
    assert greedy > 0.8  # 0.99 0.97 0.92 1.00 0.91
    sampled, greedy, margin = likelier(SEED, no_reference_point)
    assert sampled < 0.55  # 0.46 0.43 0.47 0.49 0.47
    assert greedy < 0.75  # 0.57 0.49 0.62 0.60 0.55


# ---- The first command, a real model, and what the README says -----------------------------------

README = Path(kto.__file__).with_name("README.md").read_text("utf-8")


def readme_block(start):
    """The README's block of code that starts so."""
    return re.search(rf"```\w+\n({start}.*?)```", README, flags=re.DOTALL)[1]


def defined_by(start):
    names = {}
    exec(readme_block(start), names)
    return names


def first_sentence(text):
    """The text up to its first full stop, question mark or colon; all of it if it has none."""
    return re.split("(?<=[.?:])", text)[0]


def sample_rows():
    return [json.loads(line) for line in Path(kto.Config.data).read_text("utf-8").splitlines()]


def openings():
    """{the first sentence of each completion of the sample: True if polite, False if rude}"""
    return {first_sentence(row["completion"]): row["label"] for row in sample_rows()}


def test_the_first_command_learns_and_its_reference_point_lives(tmp_path, monkeypatch, capsys):
    # The sample is found from any folder. Instead of three prompts, all held-out ones are answered.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kto.py"])
    rows, take = [], datasets.Dataset.take

    def keep(dataset, count):
        rows.append(take(dataset, count))
        return rows[-1]

    def show_all(policy, reference, tokenizer, three_rows):
        show(policy, reference, tokenizer, rows[-1][:])

    show = kto.show_answers
    monkeypatch.setattr(datasets.Dataset, "take", keep)
    monkeypatch.setattr(kto, "show_answers", show_all)
    kto.main(kto.load_models)

    log = read_log(Path("kto-tiny"))
    steps = [line for line in log if "loss" in line]
    assert sum(line["z0"] > 0 for line in steps) > len(steps) / 2
    assert log[-1]["eval_accuracy"] > 0.8

    # Before, it is rude; after, it is polite.
    printed, tones = capsys.readouterr().out, openings()
    for moment, is_polite in (("before", False), ("after ", True)):
        answers = re.findall(f"\n  {moment} (.*)", printed)
        shares = [tones.get(first_sentence(answer)) for answer in answers]
        print(f"{moment} {shares.count(True)} polite, {shares.count(False)} rude of {len(shares)}")
        assert len(answers) == len(rows[-1]) and shares.count(is_polite) > 0.8 * len(answers)


@pytest.mark.skipif("KTO_TEST_MODEL" not in os.environ, reason="needs KTO_TEST_MODEL=FOLDER")
def test_a_real_model_starts_at_its_reference_and_learns(small, tmp_path):
    folder = os.environ["KTO_TEST_MODEL"]
    start(small, tmp_path, f"--model {folder} --epochs 2 --batch_size 24 --holdout 0 --lr 2e-5")
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
        losses = kto.kto_step(policy, reference, batch_of("DUUDU"))[0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    batch = (PROMPTS, COMPLETIONS, desirable("DUUDU"))
    assert step(policy, reference, optimizer, *batch) == pytest.approx(losses.mean().item())


def test_the_readmes_reference_without_adapter_is_the_base_model():
    pytest.importorskip("peft", reason="needs: pip install peft==0.21.2")
    base, batch = random_model(std=0.3), batch_of("DUUDU")
    policy, reference = defined_by("# kto_with_lora.py")["add_lora"](copy.deepcopy(base))
    adapter = [weight for weight in policy.parameters() if weight.requires_grad]

    # A new adapter changes nothing: r = z0 = 0 in the first step. Then the loss falls.
    optimizer = torch.optim.AdamW(adapter, lr=0.01, weight_decay=0.0)
    log = list(kto.train(policy, reference, [batch] * 3, optimizer, micro_batch_size=2))
    assert log[0]["loss"] == 0.5 > log[1]["loss"] > log[2]["loss"]

    # With any adapter, a step is that with the base model as the reference, which is tried
    # without computing the layers again in the backward pass.
    add_noise(torch.nn.ParameterList(adapter), std=0.1, seed=4)
    steps, gradients, answers = [], [], []
    for model in (reference, base):
        steps.append(kto.kto_step(policy, model, batch, micro_batch_size=2))
        gradients.append(gradient_of(policy))
        policy.zero_grad()
        for answering in (policy, model):
            answers.append(answering.generate(tensor([PROMPTS[0]]), max_new_tokens=9, min_length=9))
        policy.activation_checkpointing_disable()
        policy.generation_config.use_cache = True
    assert_close(*steps)
    assert_close(*gradients)
    assert_close(answers[:2], answers[2:])
    assert sum(gradient is not None for gradient in gradients[0]) == len(adapter)


def test_the_readmes_converters_make_rows():
    make = defined_by("LABELS = ")
    events = [{"question": "a", "answer": "b", "thumb": thumb} for thumb in ("down", None, "up")]
    rows = make["thumbs_to_rows"](events)
    rows += make["pair_to_rows"]({"prompt": "a", "chosen": "b", "rejected": "c"})
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows += make["sharegpt_to_rows"](turns, [None, "up"])
    assert [row["label"] for row in rows] == [False, True, True, False, True]
    for row, answer in zip(rows, "bbbcb"):
        assert texts(byte_tokenizer(BARE), row["prompt"], row["completion"]) == (
            f"user: a\nassistant:  -> {answer}</s>"
        )

    # Of a chat with two rated answers, the later prompt has the earlier answer.
    chat = [{"role": "system", "content": "Be kind"}, USER, ANSWER, USER, ANSWER]
    greeting = [USER | {"role": "system"}, ANSWER]
    assert make["chat_to_rows"](greeting, [None, "up"]) == []
    rows = make["chat_to_rows"](chat, [None, None, "down", None, "up"])
    assert [row["label"] for row in rows] == [False, True]
    assert [row["prompt"] for row in rows] == [chat[:2], chat[:4]]
    assert [row["completion"] for row in rows] == [[ANSWER], [ANSWER]]


def test_the_readmes_lines_keep_the_good_rows_and_print_what_is_wrong(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer(CHATML).save_pretrained("before")
    random_model().config.save_pretrained("before")
    rows = [("a", "b", True), ("<|im_start|>", "c", False), ("d", "e", False)]
    write_rows(tmp_path / "feedback.jsonl", rows)
    exec(readme_block("import kto\n\ntokenizer"), {})
    good = Path("good.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in good] == ["b", "e"]
    assert capsys.readouterr().out.startswith("2 '<|im_start|>' is a special token")


def test_the_readmes_rows_are_rows_and_its_metrics_those_of_the_log(whole):
    for line in readme_block('{"prompt"').splitlines():
        row = kto.parse_row(line.encode())
        texts(byte_tokenizer(CHATML), row["prompt"], row["completion"])
    explained = set(re.findall(r"`(\w+)`", README.split("## The log")[1]))
    assert explained >= read_log(whole)[0].keys()


def run_of_the_readmes_script(name, folder, flags):
    """Runs the script on a model and 40 rows of which 10 are desirable. Returns what it prints."""
    random_model(std=0.3).save_pretrained(folder / "model")
    byte_tokenizer(CHATML).save_pretrained(folder / "model")
    rows = [(f"Say {i}", "no" * (i % 4 + 1), i % 4 == 0) for i in range(40)]
    write_rows(folder / "rows.jsonl", rows)
    (folder / name).write_text(readme_block(f"# {name}"))
    command = [sys.executable, name, *flags.split()]
    environment = os.environ | {"PYTHONPATH": str(Path(kto.__file__).parent)}
    return subprocess.check_output(command, cwd=folder, env=environment, text=True)


def test_the_readmes_script_trains_an_adapter_with_trl_evaluates_and_saves(tmp_path):
    pytest.importorskip("trl", reason="needs: pip install trl==1.16.0 peft==0.21.2")
    printed = run_of_the_readmes_script("kto_with_trl.py", tmp_path, "model rows.jsonl output")
    assert "40 of 40 rows are short enough, 10 of 10 desirable ones" in printed

    # At first r = z0 = 0, so that the loss is half the mean weight. About 9 of 36 rows are
    # desirable and weigh 3, so the mean weight is about 1.5.
    output = tmp_path / "output"
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    log = json.loads(state.read_text())["log_history"]
    assert log[0]["kl"] == 0 and 0.65 < log[0]["loss"] < 0.85
    assert log[-1]["epoch"] == 1 and "eval_loss" in log[-1]
    assert (output / "adapter_model.safetensors").exists()


def test_the_readmes_script_trains_an_adapter_that_can_be_merged(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="needs: pip install peft==0.21.2")
    flags = "--model model --data rows.jsonl --output adapter --batch_size 16 --lr 1e-3"
    printed = run_of_the_readmes_script("kto_with_lora.py", tmp_path, flags)
    assert printed.count("\n  before ") == printed.count("\n  after ") == 3
    log = read_log(tmp_path / "adapter")
    assert log[0]["loss"] == 0.5 and log[0]["z0"] == 0 and log[1]["margin"] != 0
    assert log[-1]["step"] == 6 and math.isfinite(log[-1]["eval_loss"])

    # On the rows of the run it is evaluated again.
    (tmp_path / "rows.jsonl").rename(tmp_path / "later.jsonl")
    code = readme_block("import tempfile\n\nimport torch\nfrom peft")
    environment = os.environ | {"PYTHONPATH": str(Path(kto.__file__).parent)}
    command = [sys.executable, "-c", code]
    printed = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert printed.startswith("{'eval_loss': ")

    # The merged model has the weights of the model, and the adapter has changed them.
    code = readme_block("import torch\nfrom peft import Auto")
    subprocess.check_call([sys.executable, "-c", code], cwd=tmp_path)
    before, after = load(tmp_path / "model"), load(tmp_path / "merged")
    assert before.state_dict().keys() == after.state_dict().keys()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])

    # The adapter itself is no --model: a run would train another one beside it.
    monkeypatch.chdir(tmp_path)
    with input_error("--model adapter is an adapter"):
        kto.load_model(kto.Config(model="adapter"), None, None, None)


def test_the_readmes_lines_for_a_finished_model_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("aligned", "before")):
        add_noise(random_model(), std=0.1, seed=seed).save_pretrained(name)
        byte_tokenizer(CHATML).save_pretrained(name)
    write_rows(tmp_path / "later.jsonl", [("Hi", "no" * i, i < 3) for i in range(1, 6)])
    exec(readme_block("import tempfile\n\nimport torch\nfrom transformers"), {})
    assert capsys.readouterr().out.startswith("{'eval_loss': ")

    # In bfloat16 a folder has half the size. The model can be talked to.
    exec(
        readme_block("import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"),
        {},
    )
    sizes = [Path(name, "model.safetensors").stat().st_size for name in ("aligned", "aligned-bf16")]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1)
    exec(readme_block("from transformers import pipeline"), {})


# ---- The paper in miniature: python test_kto.py --------------------------------------------------


def report(name, run, **settings):
    """Prints what run(seed) returns: the mean of five seeds, the smallest and the largest."""
    results = tensor([run(seed=seed, **settings) for seed in tqdm(range(5), name, leave=False)])
    lines = {
        name: results.mean(dim=0),
        "    smallest": results.amin(dim=0),
        "    largest": results.amax(dim=0),
    }
    for title, figures in lines.items():
        print(f"{title:32}", *[f"{figure:8.2f}" for figure in figures])


def each_share(name, seed):
    """The success with clean labels, with a fifth and with 30% of them wrong, in one list."""
    return [*learned(name, 0.0, seed), *learned(name, 0.2, seed), *learned(name, 0.3, seed)]


def miniature():
    print("right answers to prompts never seen, mean of the seeds 0 to 4; s: sampled, g: greedy")
    print(f"{'':32}  clean s  clean g  fifth s  fifth g    30% s    30% g")
    report("reference", lambda seed: success(mistaken(seed), seed) * 3)
    for name, method in METHODS.items():
        report(name, functools.partial(each_share, name))
        print(f"    best of {method[2]} settings (beta, learning rate, passes): {method[3]}")

    print("\none desirable row for nine       sampled   greedy")
    for beta in (0.5, 1.0):
        report(f"beta {beta}, lambda_d of Eq. 9", unequal, weigh=weight_of_eq_9, beta=beta)
        report(f"beta {beta}, lambda_d = 1", unequal, weigh=no_weight, beta=beta)

    print("\nall completions grow likelier    sampled   greedy   margin in nats")
    report("KTO", likelier, point=kto.reference_point)
    report("KTO, z0 = 0", likelier, point=no_reference_point)

    print("\nanswers, a fifth wrong           sampled   greedy")
    kto_on = functools.partial(learned, "KTO", 0.2)
    report("KTO, one to each of 2,048", kto_on)
    report("KTO, two to each of 1,024", kto_on, asked=1024, answers=2)
    report("KTO, one to each of 1,024", kto_on, asked=1024)
    report("DPO, two to each of 1,024", functools.partial(learned, "DPO", 0.2))

    print("\npairs of 1,024 prompts, seed 0      clean    fifth      30%")
    for name in ("DPO", "DPO, two labels"):
        line = f"{name:32}"
        for wrong in (0.0, 0.2, 0.3):
            rows = feedback(0, wrong, asked=1024, answers=2, compared=name == "DPO")
            line += f"{len(paired(rows, random.Random(0))) // 2:9}"
        print(line)


# ---- A real model: python test_kto.py MODEL_FOLDER -----------------------------------------------
# The paper's own way: first SFT, then KTO. A chat model is taught both tones of the sample, so that
# it answers politely or rudely. Then a fifth of the labels is turned round, and KTO and SFT learn
# from the labels which tone is wanted.


def unseen_and_trained(rows):
    """(100 prompts; the rows of the other prompts, a fifth of them with a wrong label)."""
    dice = random.Random(0)
    prompts = dict.fromkeys(tuple(row["prompt"]) for row in rows)  # some are in several rows
    unseen = dice.sample(list(prompts), 100)
    rows = [row for row in rows if tuple(row["prompt"]) not in unseen]
    for row in dice.sample(rows, len(rows) // 5):
        row["label"] = not row["label"]
        row["is_mistake"] = True
    return list(map(list, unseen)), rows


def sft_step(policy, reference, batch, micro_batch_size):
    """Adds the gradient of the SFT loss: minus the log-prob of a completion token, the mean."""
    tokens = sum(len(y) for y in batch["completion"])
    for _, x, y in kto.micro_batches(batch["prompt"], batch["completion"], micro_batch_size):
        loss = -kto.completion_logps(policy, x, y).sum() / tokens
        loss.backward()


def tuned(reference, rows, add_gradient, lr, epochs):
    """A trained copy of the reference. The learning rate falls to zero in a straight line."""
    policy = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    batches = []
    for epoch in range(epochs):
        shuffled_rows = datasets.Dataset.from_list(rows).shuffle(seed=epoch)
        batches += shuffled_rows.iter(batch_size=32, drop_last_batch=True)

    for step, batch in enumerate(tqdm(batches, leave=False)):
        add_gradient(policy, reference, batch, micro_batch_size=16)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.step()
        optimizer.zero_grad()
    return policy.requires_grad_(False)


def count_tones(name, model, tokenizer, prompts):
    """Prints the shares of polite and of rude answers, sampled and greedy."""
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampled, greedy = {"do_sample": True, "top_k": 0}, {"do_sample": False}  # 0: of all tokens
    line = f"{name:40}"
    for decoding, seeds in ((sampled, 3), (greedy, 1)):
        tones = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            ids = model.generate(**inputs, max_new_tokens=10, **decoding)
            answers = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :])
            tones += [openings().get(first_sentence(answer)) for answer in answers]
        polite, rude = tones.count(True) / len(tones), tones.count(False) / len(tones)
        line += f"   {polite:.2f} / {rude:.2f}"
    print(line)


def two_tones(folder, dtype="float32"):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )  # eager attention is the fastest for rows as short as these
    with tempfile.TemporaryDirectory() as cache:
        rows = kto.load_rows(kto.Config(), tokenizer, cache).to_list()
    unseen, rows = unseen_and_trained(rows)
    good = [row for row in rows if row["label"]]
    mistakes = sum("is_mistake" in row for row in good)
    print(f"{len(rows)} rows, a fifth of the labels wrong; {len(good)} are marked desirable,")
    print(f"{mistakes} of them by mistake.")
    print("Counted are answers to 100 other prompts whose first sentence, up to a full stop,")
    print("question mark or colon, is that of a polite or of a rude completion of the sample.\n")
    print("polite / rude                              sampled       greedy")

    # With its cache, autocast would go on with weights that a step has changed.
    with torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16", cache_enabled=False):
        count_tones("the model as it comes", model, tokenizer, unseen)
        reference = tuned(model, rows, sft_step, 1e-4, 5)
        count_tones("SFT on all rows: the reference", reference, tokenizer, unseen)
        runs = [
            ("KTO, one epoch", reference, rows, kto.kto_step, 2e-5, 1),
            ("KTO, two epochs", reference, rows, kto.kto_step, 2e-5, 2),
            ("SFT on desirable rows, one epoch", reference, good, sft_step, 2e-5, 1),
            ("SFT on desirable rows, two epochs", reference, good, sft_step, 2e-5, 2),
            ("SFT on desirable rows, three epochs", reference, good, sft_step, 2e-5, 3),
            ("without the first stage: KTO", model, rows, kto.kto_step, 5e-5, 3),
            ("without the first stage: SFT", model, good, sft_step, 5e-5, 3),
        ]
        for name, *settings in runs:
            count_tones(name, tuned(*settings), tokenizer, unseen)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        two_tones(*sys.argv[1:])
    else:
        miniature()
