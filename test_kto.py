# SPDX-License-Identifier: MIT-0
"""Why kto.py is right: each test is a claim, in the order of the file.

`pytest` runs them all, offline, on a CPU, in about a minute. A few need TRL or peft,
and one needs KTO_TEST_MODEL=FOLDER, the folder of a small chat model.
"""

import contextlib
import copy
import gc
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
import tempfile
import textwrap
import tracemalloc
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

import kto

torch.set_num_threads(1)  # which is faster for models as small as these
datasets.disable_progress_bars()  # so that stderr has nothing but errors
transformers.utils.logging.disable_progress_bar()
gc.freeze()  # no search for garbage in what was imported: a tenth of the time

# ---- Set-up of many tests ---------------------------------------------------------


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
    """One token for a byte, five special ones, two others: decoded text shows all.

    `text` is what a text becomes: "<s> $A" has a BOS before it.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = dict(zip(alphabet, range(256)))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"])
    backend.add_tokens(["<think>", "</think>"])
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


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test begins in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def input_error(words):
    """The block ends with an InputError, and its message has these words."""
    return pytest.raises(kto.InputError, match=words)


def write_rows(path, rows):
    """Write rows of (prompt, completion, label) as JSONL."""
    keys = ("prompt", "completion", "label")
    lines = [json.dumps(dict(zip(keys, row))) + "\n" for row in rows]
    Path(path).write_text("".join(lines))


# ---- The loss and the reference point ---------------------------------------------


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
# a CPU. Three batches of log-probs and labels went in; z0, the losses and the
# gradient of the mean loss came out. D: 1 if desirable.
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
]


@pytest.mark.parametrize("their_z0, weights, table", HALOS, ids=range(3))
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


# ---- Scoring ----------------------------------------------------------------------

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


# ---- The step ---------------------------------------------------------------------

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
    return losses, r, z0, kl, desirable(letters)


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


def test_a_single_row_has_no_next_row_and_is_refused():
    alone = {"prompt": [[5]], "completion": [[6]], "label": [True]}
    with pytest.raises(ValueError, match="two rows"):
        kto.kto_step(random_model(), None, alone)


def test_metrics_are_means_over_the_rows_and_none_where_there_are_no_rows():
    # Of the r 3, -3, 1, 4 and 2, only 3 and 4 lie above z0 = 2. By the labels, the
    # first two should. So the first, third and fifth are on the right side.
    losses, r, kl = tensor(
        [[0.5, 1.5, 1.0, 1.0, 2.0], [3.0, -3.0, 1.0, 4.0, 2.0], [1.0, 1.0, 3.0, 5.0, -5.0]]
    )
    metrics = kto.metrics_of(losses, r, tensor(2.0), kl, desirable("DDUUU"))
    assert list(metrics.values()) == pytest.approx([1.2, 2, 1, 0.6, 0, 7 / 3])
    assert list(metrics)[2:] == ["kl", "accuracy", "reward_desirable", "reward_undesirable"]
    metrics = kto.metrics_of(losses, r, tensor(2.0), kl, desirable("DDDDD"))
    assert metrics["reward_undesirable"] is None


# ---- The training loop ------------------------------------------------------------


@pytest.mark.parametrize("lambda_d", [1e38, math.inf])  # the norm: inf, then nan
def test_a_gradient_that_is_not_finite_stops_training_before_it_does_harm(lambda_d):
    policy, reference = policy_and_reference()
    optimizer = torch.optim.AdamW(policy.parameters())
    entries = kto.train(policy, reference, [batch_of("DUUDU")], optimizer, lambda_d=lambda_d)
    with pytest.raises(FloatingPointError, match="step 0"):
        next(entries)
    assert optimizer.state == {}  # it has not moved the weights


def test_the_example_of_train_runs(capsys):
    random_model().save_pretrained("model")
    names = vars(kto) | {"NAME": "model", "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    exec(textwrap.dedent(inspect.getdoc(kto.train).split("\n\n")[1]), names)
    assert capsys.readouterr().out == "0.5\n"  # at step 0, each row's loss is lambda / 2
    assert not torch.equal(names["policy"].lm_head.weight, names["reference"].lm_head.weight)


# ---- TRL --------------------------------------------------------------------------


@pytest.mark.parametrize("raw_kl", [1, -1])
def test_trl_has_the_same_loss_z0_and_gradient_norm(raw_kl):
    trl = pytest.importorskip("trl", reason="needs: pip install trl==1.16.0")
    policy, reference = policy_and_reference(raw_kl)
    metrics = kto.metrics_of(*kto.kto_step(policy, reference, batch_of("DUUDU"), **SETTINGS))
    norm = torch.nn.utils.get_total_norm(gradient_of(policy)).item()
    policy.zero_grad()

    # TRL pairs x with the completion of the row *before*. In reverse order, that is
    # the row after.
    columns = {**TEXTS, "label": desirable("DUUDU").tolist()}
    rows = datasets.Dataset.from_dict(columns).select([4, 3, 2, 1, 0])
    settings = trl.KTOConfig(
        "trl",
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


# ---- The flags --------------------------------------------------------------------


def typed(flags):
    """As if `python kto.py` and these flags had been typed. Of two values of a flag,
    the second one counts."""
    return mock.patch("sys.argv", ["kto.py", *flags.split()])


def read_flags(flags=""):
    with typed(flags):
        return kto.read_flags()


def test_what_is_not_given_is_the_papers_or_follows_from_the_model():
    toy, named = read_flags(), read_flags("--model someone/chat-1B")
    assert (toy.batch_size, toy.beta, toy.lambda_d, toy.lambda_u) == (32, 0.1, 1, 1)
    assert (toy.epochs, toy.lr, toy.output) == (3, 5e-4, Path("kto-tiny"))
    assert (named.epochs, named.lr, named.output) == (1, 5e-6, Path("kto-chat-1B"))


def test_an_impossible_value_is_refused_with_its_flag():
    impossible = """--batch_size 1, --micro_batch_size 0, --epochs 0, --max_prompt_length 0,
        --max_completion_length 0, --holdout -0.1, --save_every 0, --seed -1, --beta 0,
        --lambda_d -0.1, --lambda_u nan, --lr 0, --lr inf"""
    for flag in impossible.split(","):
        with input_error(flag.strip()):
            read_flags(flag)
    read_flags("--holdout 0 --lambda_d 0 --lambda_u 0 --seed 0 --batch_size 2")  # are possible


@pytest.mark.parametrize("only_emulates, dtype", [(True, "float32"), (False, "bfloat16")])
def test_bfloat16_is_the_default_only_where_it_is_not_emulated(only_emulates, dtype):
    # T4, V100 and RTX 20xx say that they support it: they can emulate it.
    def is_bf16_supported(including_emulation=True):
        return including_emulation or not only_emulates

    with mock.patch("torch.cuda.is_bf16_supported", is_bf16_supported):
        assert runpy.run_path(kto.__file__)["Config"].dtype == dtype


@pytest.mark.parametrize(
    "files, is_free, can_resume",
    [
        ("train.log", True, True),  # the user's own
        ("metrics.jsonl", False, True),  # killed before the first checkpoint
        ("metrics.jsonl checkpoint.pt config.json", False, True),  # while the model was saved
        ("metrics.jsonl config.json", False, False),  # a finished run
        ("adapter_config.json", False, False),
    ],
)
def test_a_folder_is_in_use_if_it_holds_a_model_or_a_log(files, is_free, can_resume):
    Path("new").mkdir()
    for name in files.split():
        Path("new", name).touch()
    for flags, is_accepted in (("", is_free), ("--resume", can_resume)):
        with contextlib.nullcontext() if is_accepted else input_error("--output new holds"):
            read_flags(f"--output new {flags}")


def test_the_demo_may_be_run_again_but_no_other_model_goes_over_it():
    Path("kto-tiny").mkdir()
    for name in ("metrics.jsonl", "config.json"):
        Path("kto-tiny", name).touch()
    with input_error("--output kto-tiny holds"):
        read_flags("--output kto-tiny --model another")
    read_flags()
    assert not Path("kto-tiny/metrics.jsonl").exists()


# ---- The rows of a file -----------------------------------------------------------

GOOD = '{"prompt": "Hi", "completion": "Hello", "label": true}'

# Kinds of bad rows: a name, the line in the file, and words of what is said of it.
# ANSWER is a message of the assistant.
BAD_ROWS = r"""
an array of rows
    [{"prompt": "a", "completion": "b", "label": true}]
    found [{'prompt': 'a'
a line that was cut
    {"prompt": "a", "compl
    not a line of JSON in UTF-8
another encoding
    {"prompt": "é", "completion": "b", "label": true}
    can't decode byte 0xe9
the keys of ShareGPT
    {"conversations": [{"from": "human", "value": "a"}], "kto_tag": true}
    found the keys ['conversations', 'kto_tag']
one key more, which could change what is trained
    {"prompt": "a", "completion": "b", "label": true, "system": "Be kind."}
    found the keys ['prompt', 'completion', 'label', 'system']
a label that is a text, which Python would take for true
    {"prompt": "a", "completion": "b", "label": "false"}
    found the label 'false'
a completion that is a message and no list
    {"prompt": "a", "completion": ANSWER, "label": true}
    'completion': {'role'
a content in parts
    {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "completion": "b", "label": true}
    found the message {'role': 'user', 'content': [{'type'
a message that calls a tool
    {"prompt": [{"role": "user", "content": "a", "tool_calls": []}], "completion": "b", "label": 1}
    found the message {'role': 'user'
an unknown role
    {"prompt": [{"role": "human", "content": "a"}], "completion": "b", "label": true}
    found the message {'role': 'human'
a blank text
    {"prompt": "a", "completion": " \n", "label": true}
    found the message {'role': 'assistant', 'content': ' \n'}
a prompt that ends with an answer
    {"prompt": [ANSWER], "completion": "b", "label": true}
    must be the one answer
a completion of two messages
    {"prompt": "a", "completion": [ANSWER, ANSWER], "label": true}
    must be the one answer
a completion by the user
    {"prompt": "a", "completion": [{"role": "user", "content": "b"}], "label": true}
    must be the one answer
a token that ends a turn in this tokenizer's chat template
    {"prompt": "a<|im_end|>", "completion": "b", "label": true}
    a text has '<|im_end|>'
the token of EOS
    {"prompt": "a", "completion": [{"role": "assistant", "content": "b</s>"}], "label": true}
    a text has '</s>'
half of a letter
    {"prompt": "\ud83d", "completion": "b", "label": true}
    cannot take the row"""

CASES = [case.split("\n    ") for case in re.split(r"\n(?! )", BAD_ROWS.strip())]


@pytest.mark.parametrize("name, line, words", CASES, ids=next(zip(*CASES)))
def test_a_bad_row_is_refused_with_its_line_what_was_found_and_what_a_row_is(name, line, words):
    line = line.replace("ANSWER", json.dumps(ANSWER))
    Path("rows.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", "latin-1")
    # What is said is one short line.
    with input_error("^rows.jsonl:3: .{5,300} A row is one line .{200,300}$") as error:
        loaded(byte_tokenizer(CHATML))
    assert words in str(error.value)


def loaded(tokenizer=byte_tokenizer(), **settings):
    """The rows of rows.jsonl as a run has them, in a folder of their own."""
    config = kto.Config(data="rows.jsonl", **settings)
    return kto.load_rows(config, tokenizer, tempfile.mkdtemp(dir="."))


def decoded(row, tokenizer=byte_tokenizer()):
    """The prompt and the completion of a row as text, with all special tokens."""
    return f"{tokenizer.decode(row['prompt'])} -> {tokenizer.decode(row['completion'])}"


def test_odd_but_usable_lines_are_read():
    lines = (
        "\ufeff" + GOOD + "\r\n"  # a byte order mark, and the end of a line on Windows
        " \t\r\n"
        '{"label": 0, "prompt": "2024-01-01", "completion": "12.50"}\n'
        '{"prompt": "a\u2028b\x85c", "completion": " d ", "label": 1.0}\n'  # no ends of lines
        '{"prompt": [{"role": "user", "content": "a"}], "completion": "b", "label": false}'
    )
    Path("rows.jsonl").write_bytes(lines.encode())
    assert [f"{decoded(row)} {row['label']}" for row in loaded()] == [
        "Hi -> Hello</s> True",
        "2024-01-01 -> 12.50</s> False",
        "a\u2028b\x85c ->  d </s> True",
        "a -> b</s> False",
    ]


def test_a_file_without_rows_is_refused():
    Path("rows.jsonl").write_text("\n \n")
    with input_error("rows.jsonl has no rows. A row is"):
        loaded()


def test_a_file_is_streamed_into_a_dataset_on_disk():
    # Of these 20 MB, one line at a time is in memory.
    Path("rows.jsonl").write_text((GOOD + " " * 100_000 + "\n") * 200)
    tracemalloc.start()
    rows = loaded()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 200 and peak < 5_000_000
    assert Path(rows.cache_files[0]["filename"]).exists()


# ---- A row as the model sees it ---------------------------------------------------

LLAMA = (  # writes BOS itself, closes an answer with EOS, knows no tool
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools, please') }}"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (  # no end token at all, and a line of its own before a chat
    "Chat:\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PHI = (  # EOS follows each chat that does not ask for an answer
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% else %}{{ eos_token }}{% endif %}"
)
MOVES_SYSTEM = (  # puts a system text into the next turn, as Llama 2 does
    "{% for m in messages %}{% if m.role == 'user' %}[{{ messages[0].content }}; {{ m.content }}]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINK_DROPPED = (  # a thought is opened when asked, of which an answered chat has nothing
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
THINK_CLOSED = THINK_DROPPED.replace(  # which an answered chat closes at once
    "|>{{", "|>{% if m.role == 'assistant' %}<think></think>{% endif %}{{"
)
RESPACED = THINK_DROPPED.replace("{{ m.content }}", "{{ m.content.split() | join(' ') }}")
THOUGHT_LOST = THINK_DROPPED.replace("m.content", "m.content.split('</think>')[-1]")
TOOL_LOST = CHATML.replace(" %}<|im_start|>", " if m.role != 'tool' %}<|im_start|>", 1)
TEXT_CHANGED = CHATML.replace("m.content", "m.content | title")
ALWAYS_ASKS = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
TOOL = {"role": "tool", "content": "1 C"}
THOUGHT = "<think>\nHm.\n</think>Hello"


def encoded(tokenizer, prompt="Hi", completion="Hello", **lengths):
    """A row as a run has it."""
    write_rows("rows.jsonl", [(prompt, completion, True)])
    return loaded(tokenizer, **lengths)[0]


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

    # A token across the border belongs to the completion, such as a space at the end
    # of the prompt, which many tokenizers join to the next word.
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["iH", " H"])
    assert texts(tokenizer) == "H -> iHello</s>"
    assert texts(tokenizer, "Hi ") == "Hi ->  Hello</s>"
    with input_error("rows.jsonl:1: .* has no token of its own"):
        texts(tokenizer, "i")


@pytest.mark.parametrize(
    "template, prompt, completion, expected",
    [
        (
            CHATML,
            [SYSTEM, USER | {"role": "developer"}, USER, ANSWER, TOOL],
            [ANSWER],
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>developer\nHi<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>tool\n1 C<|im_end|>\n<|im_start|>assistant\n -> Hello<|im_end|>",
        ),
        (LLAMA, "Hi", "Hello", "<s>[INST]Hi[/INST] ->  Hello</s>"),
        (LLAMA, [USER, ANSWER, USER], "a", "<s>[INST]Hi[/INST] Hello</s>[INST]Hi[/INST] ->  a</s>"),
        (BARE, "Hi", "Hello", "Chat:\nuser: Hi\nassistant:  -> Hello</s>"),
        (PHI, "Hi", "Hello", "u:Hi<|im_end|>a: -> Hello<|im_end|></s>"),
        (MOVES_SYSTEM, [SYSTEM, USER], "Hello", "[Be kind.; Hi] -> Hello</s>"),
        # x has the tag that inference would write only if the row has it too.
        (THINK_DROPPED, "Hi", "Hello", "<|user|>Hi<|assistant|> -> Hello</s>"),
        (
            THINK_DROPPED,
            "Hi",
            THOUGHT,
            "<|user|>Hi<|assistant|><think>\n -> Hm.\n</think>Hello</s>",
        ),
        (THINK_CLOSED, "Hi", "Hello", "<|user|>Hi<|assistant|><think> -> </think>Hello</s>"),
        (THINK_CLOSED, "Hi", THOUGHT, f"<|user|>Hi<|assistant|><think> -> </think>{THOUGHT}</s>"),
        # A template may change white space, as GLM 4.5 does in a thought.
        (RESPACED, "Hi\n", THOUGHT, "<|user|>Hi<|assistant|><think> ->  Hm. </think>Hello</s>"),
    ],
)
def test_a_chat_is_what_its_template_writes_and_ends_once(template, prompt, completion, expected):
    # That the tokenizer would add BOS to a text makes no difference here.
    tokenizer = byte_tokenizer(template, text="<s> $A")
    assert texts(tokenizer, prompt, completion) == expected


@pytest.mark.parametrize(
    "template, prompt, completion, found",
    [
        (None, [SYSTEM, USER], "Hello", "cannot take the row: .*chat_template"),
        (LLAMA, [USER, ANSWER, TOOL], "Hello", "cannot take the row: no tools, please"),
        (THOUGHT_LOST, "Hi", THOUGHT, "loses or changes '<think>Hm.</think>Hello'"),
        (THOUGHT_LOST, [USER, ANSWER | {"content": THOUGHT}, USER], "Bye", "loses .*Hm"),
        # The question has the text of the tool too, but the messages hold it twice.
        (TOOL_LOST, [USER | {"content": "Is it above 1 C?"}, ANSWER, TOOL], "No.", "loses .*'1C'"),
        (TEXT_CHANGED, "Hi there", "Hello", "loses or changes 'Hithere'"),
        (ALWAYS_ASKS, "Hi", "Hello", "goes on after the answer: .*im_start.*assistant"),
        (CHATML + "Over.", "Hi", "Hello", "goes on after the answer: .*Over"),
    ],
)
def test_a_template_that_loses_or_changes_a_text_or_goes_on_after_the_answer_is_refused(
    template, prompt, completion, found
):
    with input_error(f"rows.jsonl:1: the .*{found}"):
        texts(byte_tokenizer(template), prompt, completion)


@pytest.mark.parametrize(
    "text",
    [
        '[{"from": "Oslo", "to": "Bergen"}]',
        "git add <filename>, and then git commit.",
        "With [INST] and [/INST], and <<SYS>> for the system text.",
        "It used <|user|>, and <s> before the text.",
        "It is <|Mz|>, the mean magnetisation.",
    ],
)
def test_what_begins_or_ends_no_turn_in_this_tokenizers_template_is_plain_words(text):
    expected = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n -> {text}<|im_end|>"
    assert texts(byte_tokenizer(CHATML), text, text) == expected


@pytest.mark.parametrize(
    "prompt, x_tokens, y_tokens, expected",
    [
        ("Tell me", 7, 8, "Tell me -> Tell me</s>"),
        ("Tell me", 8, 7, "<s>Tell me -> Tell me"),  # it did not end there: no EOS
        ("Tell <think>", 1, 1, "<think> -> T"),
    ],
)
def test_of_a_prompt_the_end_is_kept_and_of_a_completion_the_start(
    prompt, x_tokens, y_tokens, expected
):
    lengths = {"max_prompt_length": x_tokens, "max_completion_length": y_tokens}
    tokenizer = byte_tokenizer(text="<s> $A")
    row = encoded(tokenizer, prompt, "Tell me", **lengths)
    assert decoded(row, tokenizer) == expected

    # The facts on a row are those before it is cut.
    assert row["completion_tokens"] == 8 and row["end_token"] == 257
    assert row["prompt_tokens"] == len(tokenizer.encode(prompt))
    assert row["highest_id"] == max(tokenizer.encode(prompt) + [257])


# ---- Batches, and what is shown of the rows ---------------------------------------


def letters_of_batches(seed):
    """The letters of each batch of 4 in two epochs of 13 rows."""
    rows = datasets.Dataset.from_dict({"letter": list("abcdefghijklm")})
    batches = kto.training_batches(rows, kto.Config(batch_size=4, epochs=2, seed=seed))
    return ["".join(batch["letter"]) for batch in batches]


def test_an_epoch_has_each_row_once_in_an_order_of_its_own_but_those_that_fill_no_batch():
    # 13 = 3 * 4 + 1: the last row would be its own partner.
    batches = letters_of_batches(seed=0)
    first, second = "".join(batches[:3]), "".join(batches[3:])
    assert len(set(first)) == len(set(second)) == 12
    assert first != second and "abcdefghijkl" not in (first, second)
    assert letters_of_batches(seed=1) != batches


def test_a_file_sorted_by_label_is_mixed_like_any_other():
    # More rows than a shuffle with a buffer of a thousand would mix.
    rows = datasets.Dataset.from_dict({"label": [True] * 3000 + [False] * 3000})
    for batch in kto.training_batches(rows, kto.Config(epochs=1)):
        assert 0 < sum(batch["label"]) < 32


def lettered(letters):
    """A row for each letter, its prompt and its completion; capitals are good."""
    return [(letter, letter, letter.isupper()) for letter in letters]


@pytest.fixture
def shown(capsys):
    """shown(rows, flags) is what a run prints before it loads a model, the rows that
    it trains on, and those that it holds out."""

    def run(rows, flags="", template=None):
        write_rows("rows.jsonl", rows)
        byte_tokenizer(template).save_pretrained("model")
        stop, split = mock.Mock(side_effect=InterruptedError), mock.Mock(wraps=kto.describe)
        with typed(f"--model model --data rows.jsonl --holdout 0 --batch_size 2 {flags}"):
            with mock.patch("kto.describe", split), pytest.raises(InterruptedError):
                kto.main(stop)
        training, held_out = split.call_args.args[1:3]
        return capsys.readouterr().out, training, held_out

    return run


def test_each_row_is_trained_on_or_held_out_as_the_seed_decides_and_counted(shown):
    # Of 13 rows a quarter, rounded up, is held out.
    letters, flags = "ABCDEFGHtuxyz", "--holdout 0.25 --batch_size 4"
    printed, training, held_out = shown(lettered(letters), flags)
    assert sorted(map(decoded, [*training, *held_out])) == [f"{x} -> {x}</s>" for x in letters]
    good = sum(training["label"])
    assert f"n_D = {good} desirable and n_U = {9 - good} undesirable" in printed
    assert f"4 rows held out, {8 - good} of them desirable" in printed

    assert shown(lettered(letters), flags)[2][:] == held_out[:]
    assert shown(lettered(letters), flags + " --seed 1")[2][:] != held_out[:]


def test_a_file_whose_rows_fill_no_batch_is_refused(shown):
    with input_error("8 rows"):
        shown(lettered("abcdefgh"), "--batch_size 8 --holdout 0.1")
    shown(lettered("abcdefghi"), "--batch_size 8 --holdout 0.1")


def test_what_is_cut_is_counted_such_as_the_system_prompt_of_a_long_row(shown):
    # The limits are the tokens of "Hi" in its turn, and of "Hello" with its end.
    flags = "--max_prompt_length 21 --max_completion_length 6"
    rows = [([SYSTEM, USER], "Hello", 1), ("Hi", "Hello!", 0), ("Hi", "Hello you", 0)]
    printed = shown(rows, flags, CHATML)[0]
    assert "1 prompts lose their beginning (see --max_prompt_length)" in printed
    assert "2 completions lose their end (see --max_completion_length)" in printed


def test_a_row_is_shown_as_the_model_sees_it_with_its_border(shown):
    printed = shown([("Hi", "Hello", True)] * 2, template=CHATML)[0]
    assert r"'<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'" in printed
    assert "-> 'Hello<|im_end|>'\n" in printed


@pytest.mark.parametrize(
    "letters, flags, shown_weights, advice",
    [
        ("Abcdefghijk", "", "lambda_D n_D = 1, lambda_U n_U = 10", "10 to 15"),  # as in §4.2
        # Here n_D = 4 and n_U = 5. The weight is 0.5 * 5 / 4 = 0.625, or half more.
        ("ABCDefghi", "--lambda_d 2 --lambda_u 0.5", "= 8, lambda_U n_U = 2.5", "0.625 to 0.9375"),
    ],
)
def test_unequal_classes_get_the_weight_of_eq_9(shown, letters, flags, shown_weights, advice):
    printed = shown(lettered(letters), flags)[0]
    assert shown_weights in printed and f"--lambda_d {advice}\n" in printed


# ---- The models -------------------------------------------------------------------


def load_model(highest_id=0):
    """The model in the folder `model`, for rows of which one has this id."""
    config = kto.Config(model="model", device="cpu")
    return kto.load_model(config, None, {"highest_id": [7, highest_id, 7]}, None)


def test_a_model_is_loaded_in_float32_without_dropout_beside_its_frozen_copy():
    # In bfloat16, of 8 bits, the updates of a small learning rate are rounded away.
    random_model().bfloat16().save_pretrained("model")
    config = kto.Config(model="model", device="cpu")
    policy, reference = kto.load_models(config, None, {"highest_id": [7]}, None)
    assert policy.dtype == reference.dtype == torch.float32
    assert not policy.training and not reference.training
    assert all(weight.requires_grad for weight in policy.parameters())
    assert not any(weight.requires_grad for weight in reference.parameters())
    policy.lm_head.weight.data.zero_()
    assert reference.lm_head.weight.any()


def test_weights_that_are_lacking_are_refused():
    model = random_model()
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]  # would be random
    model.save_pretrained("model", state_dict=weights)
    with input_error("--model model .*lacks the weights .'model.layers.1.mlp.up_proj.weight'"):
        load_model()


def test_a_generation_config_that_could_not_be_saved_in_the_end_is_refused():
    random_model().save_pretrained("model")
    set_generation_config(Path("model"), num_return_sequences=2)  # of a greedy answer
    with input_error("--model model .*num_return_sequences"):
        load_model()


def test_every_id_of_every_row_needs_an_embedding():
    random_model().save_pretrained("model")
    load_model(highest_id=299)
    with input_error("no embedding"):
        load_model(highest_id=300)


def test_a_tokenizer_that_cannot_be_found_or_lacks_eos_or_offsets_is_refused():
    config = kto.Config(model="model")
    Path("model").mkdir()
    with input_error("--model model .*give a folder"):
        kto.load_tokenizer(config)
    for tokenizer in (byte_tokenizer(eos=None), transformers.ByT5Tokenizer()):
        shutil.rmtree("model")
        tokenizer.save_pretrained("model")
        with input_error("lacks EOS or offsets"):
            kto.load_tokenizer(config)


def test_the_toy_is_taught_the_undesirable_rows_and_every_fifth_row():
    # Of these the undesirable b is taught, and each fifth row, which is A and H.
    write_rows("rows.jsonl", lettered("AbDEGHJK"))
    taught = []

    def record(model, prompts, completions):
        taught.extend(prompts)
        if len(taught) == 8 * 20:  # 20 of the 500 batches will do
            raise InterruptedError
        return model.lm_head.weight.sum(dim=1)  # to be quick, no log-probs

    with mock.patch("kto.completion_logps", record), pytest.raises(InterruptedError):
        kto.tiny_model(kto.Config(), byte_tokenizer(), loaded())
    assert set(byte_tokenizer().batch_decode(taught)) == set("bAH")


# ---- The rehearsal ----------------------------------------------------------------


def rehearse(model, x=64, y=60, **settings):
    """The micro_batch_size that is found, if x and y have at most so many tokens."""
    settings = {"device": "cpu", "batch_size": 16} | settings
    rows = {"prompt": [[5], [5] * x, [5]], "completion": [[6], [6], [6] * y]}
    return kto.rehearse(model, copy.deepcopy(model), rows, kto.Config(**settings))


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
    assert rehearse(model) == 8
    assert rehearse(model, device="cuda:0") == 16
    assert rehearse(model, batch_size=3, micro_batch_size=64) == 3
    with memory_for(rows=2):
        assert rehearse(model, device="cuda") == 2  # of 16, 8, 4 and 2
        assert rehearse(model, micro_batch_size=6) == 1  # of 6, 3 and 1
    with memory_for(rows=0), input_error("out of memory with 124 tokens in a row: lower"):
        rehearse(model)


def test_a_model_with_too_few_positions_is_refused_with_a_flag_to_lower():
    model = random_model("gpt2")  # for 128 tokens
    rehearse(model, x=64, y=64)
    with input_error("128 tokens, not 129: lower --max_prompt_length"):
        rehearse(model, x=65, y=64)
    model = random_model("bloom")
    model.config.max_position_embeddings = None  # it names no length, and takes any
    rehearse(model, x=200)


def test_the_rehearsal_is_a_step_of_two_micro_batches_beside_the_memory_of_adamw():
    model, scored = random_model(), []
    model.model.embed_tokens.requires_grad_(False)  # AdamW needs no memory for these

    # The reference, a copy of the model, has this hook too.
    model.lm_head.register_forward_hook(lambda *call: scored.append(len(call[2])))
    with memory_for(rows=2), mock.patch("torch.empty", wraps=torch.empty) as empty:
        assert rehearse(model) == 2
    empty.assert_any_call(2, model.num_parameters() - 300 * 32, device=model.device)

    # Four sets of log-probs of two micro-batches, each with two rows of 60 tokens.
    # (The larger micro-batches, which were tried before, did not come so far.)
    assert scored == [2 * 60] * 4 * 2
    assert set(gradient_of(model)) == {None}  # nothing is left


# ---- A small run ------------------------------------------------------------------

# Of 24 rows a quarter, 6, is held out. The 18 others make 4 batches of 4 rows an
# epoch, and 2 are left over. The run has 20 steps. It writes a checkpoint after each
# third step and after each epoch.
ROWS = [(f"Say {number}→", "no" * (number % 4 + 1), number % 2 == 0) for number in range(24)]
FLAGS = """--epochs 5 --batch_size 4 --micro_batch_size 2 --holdout 0.25 --lr 0.01 --beta 0.3
    --lambda_d 30 --lambda_u 0.7 --device cpu --dtype bfloat16 --save_every 3"""


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with rows and a model for runs of a second. The model has dropout;
    in its generation config is a fault: a temperature needs sampling."""
    folder = tmp_path_factory.mktemp("small")
    model = random_model("gpt2", std=0.3, num_hidden_layers=1, resid_pdrop=0.1)
    model.save_pretrained(folder / "model")
    set_generation_config(folder / "model", eos_token_id=0, temperature=0.5)
    byte_tokenizer(CHATML).save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def set_generation_config(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))


def flags_of(small, output, more=""):
    """The flags of a run; `more` may change any of them."""
    return f"--model {small}/model --data {small}/rows.jsonl --output {output} {FLAGS} {more}"


def start(small, output, more="", load_models=kto.load_models):
    """python kto.py in this process."""
    with typed(flags_of(small, output, more)):
        kto.main(load_models)


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The output of a run that nothing interrupts; above it is what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    with (
        open(folder / "printed.txt", "w", encoding="utf-8") as printed,
        contextlib.redirect_stdout(printed),
    ):
        start(small, folder / "new" / "output")
    return folder / "new" / "output"


@pytest.fixture(scope="session")
def stopped(small, tmp_path_factory):
    """The same run, ended by Ctrl-C when it should draw step 6. Its console has no
    letter for the arrow of the rows."""
    folder = tmp_path_factory.mktemp("stopped")
    draw = mock.patch("kto.chart", side_effect=["step 0", "step 2", "step 4", KeyboardInterrupt])
    console = open(folder / "printed.txt", "w", encoding="cp1252")
    with console, contextlib.redirect_stdout(console), draw:
        with typed(flags_of(small, folder / "output")), pytest.raises(SystemExit, match="130"):
            kto.command()
    return folder / "output"


def read_log(output):
    """The lines of the log, without the seconds, which are never the same."""
    log = []
    for line in Path(output, "metrics.jsonl").read_text().splitlines():
        log.append(json.loads(line))
        assert log[-1].pop("seconds", 1) > 0
    return log


def contents(folder):
    """The files of a folder as bytes; of the log, what `read_log` returns."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return files | {"metrics.jsonl": read_log(folder)}


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_run_is_a_plain_loop_of_step_clip_and_adamw(small, whole):
    # bfloat16 is for the forward passes of both models; the weights stay float32.
    policy, reference = load(small / "model"), load(small / "model")
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    settings = {"beta": 0.3, "lambda_d": 30.0, "lambda_u": 0.7, "micro_batch_size": 2}
    shutil.copy(small / "rows.jsonl", "rows.jsonl")
    rows = loaded(byte_tokenizer(CHATML)).shuffle(seed=0)
    training, held_out = rows.skip(6), rows.take(6)
    batches = kto.training_batches(training, kto.Config(epochs=5, batch_size=4))
    log = read_log(whole)
    assert max(entry.get("grad_norm", 0) for entry in log) > 10  # so some steps are clipped
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for step, batch in enumerate(batches):
            metrics = kto.metrics_of(*kto.kto_step(policy, reference, batch, **settings))
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0).item()
            lr = log[0]["lr"]  # see the next test
            assert log.pop(0) == {"step": step, **metrics, "grad_norm": norm, "lr": lr}
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            # After each epoch, the held-out rows are evaluated as one batch.
            if step % 4 == 3:
                with torch.no_grad():
                    evaluated = kto.kto_step(policy, reference, held_out[:], **settings)
                metrics = kto.metrics_of(*evaluated)
                assert log.pop(0) == {"step": step + 1, "held_out": metrics}
    assert step == 19 and log == []
    assert_close(load(whole).state_dict(), policy.state_dict(), rtol=0, atol=0)


def test_the_learning_rate_warms_up_not_from_0_and_falls_to_a_tenth_along_a_cosine(whole):
    # Of 20 steps a tenth, 2, is warm-up: 1/2, 2/2. The other 18 go from 1 to 0.1.
    # After 6 of these, the cosine of 60 degrees is 0.5, and the rate is
    # 0.1 + 0.9 * (1 + 0.5) / 2 = 0.775.
    lr = [entry["lr"] / 0.01 for entry in read_log(whole) if "lr" in entry]
    assert [lr[0], lr[1], lr[7], lr[19]] == pytest.approx([0.5, 1.0, 0.775, 0.1])


def test_a_run_shows_chart_metrics_and_three_answers_before_and_after(whole):
    log, printed = read_log(whole), (whole / "../../printed.txt").read_text("utf-8")
    last = log[-1]["held_out"]
    assert f"held out: loss {last['loss']:.3f}, accuracy {last['accuracy']:.2f}\n" in printed
    assert "2 of the longest rows fit, in bfloat16" in printed

    # 20 steps in at most 16 lines: every second one.
    steps = [entry for entry in log if "lr" in entry]
    lines = [kto.chart(entry, beta=0.3) for entry in steps[::2]]
    assert re.findall(r" +\d+ [.zUD]{71}", printed) == lines

    # Three held-out prompts are answered.
    answers = re.findall(r"\nSay .*\nassistant\n\n  before (.*)\n  after  (.*)\n", printed + "\n")
    assert len(answers) == 3 and all(before != after for before, after in answers)


def test_the_saved_model_ends_its_answers_as_the_rows_do(whole):
    # The model's own generation config, which has only token 0, is replaced. The
    # rows end with token 259, <|im_end|>. EOS, token 257, always ends an answer.
    assert transformers.GenerationConfig.from_pretrained(whole).eos_token_id == [257, 259]


def test_a_generation_config_that_has_the_end_tokens_is_kept_with_whatever_is_in_it(small):
    # Given to `generate`, some of these would end the finished run with an error.
    odd = {"eos_token_id": [257, 259, 0], "do_sample": True, "stop_strings": ["o"]}
    odd["num_return_sequences"] = 2
    shutil.copytree(small / "model", "model")
    set_generation_config(Path("model"), **odd)

    # A single held-out row has no next row, and is not evaluated. There is memory
    # for one row only.
    with memory_for(rows=1):
        start(small, "output", "--model model --epochs 1 --holdout 0.01")
    assert odd.items() <= json.loads(Path("output/generation_config.json").read_text()).items()
    assert [entry["step"] for entry in read_log("output")] == [0, 1, 2, 3, 4]


# ---- Checkpoints ------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bits(small, whole, stopped):
    # The log has the steps 0 to 6 and an evaluation, but step 6 is in no checkpoint.
    shutil.copytree(stopped, "output")
    log_size = torch.load("output/checkpoint.pt")["log_size"]
    before = Path("output/metrics.jsonl").read_text()
    assert len(before.splitlines()) == 7 + 1 and before[:log_size].count("\n") == 6 + 1

    # Going on, the run is killed while it writes a checkpoint after 10 steps, and
    # then when half of the result is saved.
    def save_half(state, path):
        save(state, path)
        if state["step"] == 10:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt

    save, save_tokenizer = torch.save, "transformers.PreTrainedTokenizerBase.save_pretrained"
    shutil.copy(small / "rows.jsonl", "moved.jsonl")  # the rows count, and not their place
    flags = "--resume --data moved.jsonl --save_every 5"
    with mock.patch("torch.save", save_half), pytest.raises(KeyboardInterrupt):
        start(small, "output", flags)
    assert torch.load("output/checkpoint.pt")["step"] == 8
    with mock.patch(save_tokenizer, side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            start(small, "output", flags)
    start(small, "output", flags)
    assert contents(Path("output")) == contents(whole)

    # The steps of the first checkpoint were not done again: the log has their seconds.
    assert Path("output/metrics.jsonl").read_text().startswith(before[:log_size])


def test_what_decides_the_result_may_not_differ_when_a_run_goes_on(small, stopped):
    with input_error("--resume: lr, seed must be as before"):
        start(small, stopped, "--resume --lr 1 --seed 3")
    write_rows("rows.jsonl", ROWS[:23] + [("Say 23→", "no", False)])
    with input_error("--resume: sha256 must be as before"):
        start(small, stopped, "--resume --data rows.jsonl")

    fixed = torch.load(stopped / "checkpoint.pt")["fixed"]
    may_differ = {"data", "output", "device", "micro_batch_size", "save_every", "resume"}
    assert fixed.keys() == vars(kto.Config()).keys() - may_differ | {"sha256"}


def test_where_weights_are_frozen_only_the_trained_ones_are_in_the_checkpoint(small):
    def freeze_most(*args):
        policy, reference = kto.load_models(*args)
        policy.requires_grad_(False).transformer.ln_f.requires_grad_(True)
        return policy, reference

    with mock.patch("torch.save", wraps=torch.save) as save:
        start(small, "output", "--epochs 1", freeze_most)
    state = save.call_args.args[0]
    assert [weight.shape for weight in state["weights"].values()] == [(32,), (32,)]
    assert len(state["optimizer"]["state"]) == 2


def test_resume_without_a_checkpoint_begins(small):
    Path("output").mkdir()
    Path("output/metrics.jsonl").write_text("of a run that was killed before its first checkpoint")
    start(small, "output", "--epochs 1 --resume")
    assert [entry["step"] for entry in read_log("output")] == [0, 1, 2, 3, 4]


def test_two_runs_do_not_share_a_folder(small):
    # Both found the folder free; the other one was a little faster.
    def other_begins(*args):
        Path("output").mkdir()
        Path("output/metrics.jsonl").write_text("of the other run")
        return kto.load_models(*args)

    with pytest.raises(FileExistsError):
        start(small, "output", load_models=other_begins)
    assert Path("output/metrics.jsonl").read_text() == "of the other run"


# ---- The chart --------------------------------------------------------------------


def chart(z0, undesirable, desirable):
    """The line of step 7. Of its 71 columns 35 is 0, and a column is 0.2 nats."""
    entry = {"step": 7, "z0": z0, "reward_undesirable": undesirable, "reward_desirable": desirable}
    return kto.chart(entry, beta=0.5)


def test_the_chart_puts_each_mark_in_its_place_or_at_the_edge_but_none_that_is_absent():
    # U is at 35 - 2.0 / 0.2 = 25, z at 35, and D at 35 + 3.12 / 0.2 = 50.6, so 51.
    line = chart(z0=0.0, undesirable=-2.0, desirable=3.12)
    assert line == f"     7 {'.' * 25}U{'.' * 9}z{'.' * 15}D{'.' * 19}"
    assert chart(z0=7.2, undesirable=-7.2, desirable=None) == f"     7 U{'.' * 69}z"
    assert chart(z0=0.1, undesirable=0.1, desirable=0.1).count("D") == 1  # which covers U and z


# ---- The command ------------------------------------------------------------------


@pytest.fixture
def refused(small, capfd):
    """refused(flags) is the one line on stderr when kto.py ends with status 2."""

    def run(more=""):
        with typed(flags_of(small, "output", more)), pytest.raises(SystemExit, match="2"):
            runpy.run_path(kto.__file__, run_name="__main__")
        [line] = capfd.readouterr().err.splitlines()
        return line

    return run


def test_what_the_user_can_mend_is_one_line_and_status_2(refused, monkeypatch):
    Path("rows.jsonl").write_bytes(b"\xe9")
    assert refused("--model tiny --data rows.jsonl").startswith("rows.jsonl:1: ")
    assert re.search("^--data .*to_json.*'none'", refused("--data none"))
    assert "--device nowhere" in refused("--device nowhere")
    assert "Not a directory" in refused("--output rows.jsonl/output")
    assert not Path("output").exists()
    full = torch.OutOfMemoryError("out of memory")
    with mock.patch("torch.nn.utils.clip_grad_norm_", side_effect=full):
        assert refused("--output full") == "out of memory"
    with mock.patch("torch.save", side_effect=OSError("No space left")):
        assert re.search("cannot be written.* full.*No space left", refused("--output disk"))
    assert "norm is nan; lower the lr" in refused("--output nan --lr 1e30")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # cannot be reconfigured, as in a notebook
    assert refused() == "for several GPUs see the README"


def test_ctrl_c_is_one_line_that_says_how_to_go_on_and_status_130(stopped):
    printed = (stopped / "../printed.txt").read_text()
    line = "Stopped. The same command with --resume goes on from the last checkpoint."
    assert printed.splitlines()[-1] == line
    assert re.search(r"Say \d+\?", printed)  # a letter that a console lacks is a "?"


def test_a_bug_keeps_its_traceback(small):
    with typed(flags_of(small, "output")), mock.patch("kto.chart", side_effect=KeyError("z9")):
        with pytest.raises(KeyError, match="z9"):
            kto.command()


# ---- The demo and a real model ----------------------------------------------------


def first_sentence(text):
    """The text up to its first full stop, question mark or colon."""
    return re.split("(?<=[.?:])", text)[0]


def test_the_demo_learns_to_be_polite_and_its_reference_point_lives(monkeypatch, capsys):
    # Two of its three epochs will do. Instead of three prompts, 20 are answered.
    sample = [json.loads(line) for line in Path(kto.Config.data).read_text("utf-8").splitlines()]
    show = kto.show_answers

    def show_more(policy, reference, tokenizer, prompts, ends):
        prompts = [tokenizer.encode(row["prompt"]) for row in sample[:20]]
        show(policy, reference, tokenizer, prompts, ends)
        assert policy.generation_config.eos_token_id == ends  # where an answer stops

    monkeypatch.setattr(kto, "show_answers", show_more)
    with typed("--epochs 2"):
        kto.main()
    log = read_log("kto-tiny")
    z0 = [entry["z0"] for entry in log if "z0" in entry]
    assert sum(value > 0 for value in z0) > len(z0) / 2
    assert log[-1]["held_out"]["accuracy"] > 0.75

    # The answers of the sample begin with a polite or a rude sentence. Before, the
    # toy is rude; after, it is polite.
    is_polite = {first_sentence(row["completion"]): row["label"] for row in sample}
    printed = capsys.readouterr().out
    for moment, expected in (("before", False), ("after ", True)):
        answers = re.findall(f"\n  {moment} (.*)", printed)
        tones = [is_polite.get(first_sentence(answer)) for answer in answers]
        assert len(tones) == 20 and tones.count(expected) >= 14


@pytest.mark.skipif("KTO_TEST_MODEL" not in os.environ, reason="needs KTO_TEST_MODEL=FOLDER")
def test_a_real_model_starts_at_its_reference_and_learns(small):
    flags = f"--model {os.environ['KTO_TEST_MODEL']} --dtype float32 --lambda_d 1 --lambda_u 1"
    flags += " --epochs 2 --batch_size 24 --micro_batch_size 8 --holdout 0 --lr 2e-5"
    start(small, "output", flags)
    first, last = read_log("output")  # of two steps, each with all rows
    assert first["reward_desirable"] == first["reward_undesirable"] == 0
    assert first["kl"] == first["z0"] == 0 and first["loss"] == 0.5
    assert last["loss"] < first["loss"]


# ---- What the README says ---------------------------------------------------------

README = Path(kto.__file__).with_name("README.md").read_text("utf-8")


def readme_block(start):
    """The README's block of code that starts so."""
    return re.search(rf"```\w+\n({re.escape(start)}.*?)```", README, flags=re.DOTALL)[1]


def defined_by(start):
    """What the block that starts so defines."""
    names = {"__name__": "readme"}
    exec(readme_block(start), names)
    return names


def test_the_readmes_three_rows_are_right():
    z0 = kto.reference_point(tensor([3.0, -1.0, 1.0]), 0)
    losses = kto.kto_loss(tensor([4.0, -1.0, -6.0]), 0, z0, desirable("DUD"))
    for words in [f"| {loss:.4f} |\n" for loss in losses] + [f"{losses.mean():.3f}"]:
        assert words in README


def test_the_readmes_rows_are_rows():
    Path("rows.jsonl").write_text(readme_block('{"prompt"'))
    assert len(loaded(byte_tokenizer(CHATML))) == 2


def test_the_readmes_converters_make_rows():
    make = defined_by("LABELS = ")
    thumbs = ("down", None, "up")  # nobody rated the second one
    events = [{"question": "a", "answer": "b", "thumb": thumb} for thumb in thumbs]
    rows = make["thumbs_to_rows"](events)
    rows += make["pair_to_rows"]({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert [row["label"] for row in rows] == [False, True, True, False]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [decoded(row)[5:6] for row in loaded()] == list("bbbc")


def test_the_readmes_lines_drop_columns(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache"))
    row = json.loads(GOOD)
    Path("log.jsonl").write_text(json.dumps({"id": 7, **row, "score": 0.5}) + "\n")
    defined_by("import datasets\n\nrows")
    assert json.loads(Path("feedback.jsonl").read_text()) == row


def test_the_readmes_lines_evaluate_on_a_later_file(capsys):
    random_model().save_pretrained("before")
    add_noise(random_model(), std=0.1, seed=4).save_pretrained("aligned")
    byte_tokenizer(CHATML).save_pretrained("aligned")
    write_rows("later.jsonl", ROWS)
    defined_by("import tempfile\n")
    assert re.match(r"{'loss': 0\.\d", capsys.readouterr().out)


def test_the_readmes_script_trains_an_adapter_beside_the_base_model_as_reference(small):
    peft = pytest.importorskip("peft", reason="needs: pip install peft==0.21.2")
    random_model(std=0.3).save_pretrained("model")
    byte_tokenizer(CHATML).save_pretrained("model")
    script, seen = defined_by("# kto_with_lora.py"), []

    def load_models(*args):
        seen.extend(script["load_models"](*args))
        seen.append(kto.load_model(*args, torch.bfloat16))
        return seen[:2]

    start(small, "adapter", "--model model --lambda_d 1 --lambda_u 1", load_models)

    # A new adapter changes nothing: r = z0 = 0 in the first step.
    log = read_log("adapter")
    assert log[0]["loss"] == 0.5 != log[1]["loss"] and log[0]["z0"] == log[0]["kl"] == 0

    # With the trained adapter switched off, the policy is the base model.
    for model, is_base in zip(seen[:2], (False, True)):
        logps = kto.score(model, PROMPTS, COMPLETIONS, micro_batch_size=8)
        base = kto.score(seen[2], PROMPTS, COMPLETIONS, micro_batch_size=8)
        assert torch.equal(logps, base) == is_base

    # The saved adapter is the trained one.
    saved = peft.AutoPeftModelForCausalLM.from_pretrained("adapter", dtype=torch.bfloat16).eval()
    assert_close(*[kto.score(model, PROMPTS, COMPLETIONS, 8) for model in (saved, seen[0])])
