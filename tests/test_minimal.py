"""minimal.py judges train.py: from the same files both make the same steps, whatever the loss."""

import copy
import functools
import inspect
import json
import random
import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import lines_of, make_sae, predicting
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import losses
import minimal
import settings
import toy
import train
from data import load_pairs, load_tokenizer
from sae import SiteHook, load_sae

LAYER, BATCH, STEPS, PAIRS = 1, 4, 8, 15  # two epochs, each with steps of 4, 4, 4 and 3 pairs
LOOP = {"batch_size": BATCH, "lr": 2e-4, "beta2": 0.9, "warmup": 5, "seed": 3}
# Log-probabilities of 100 nats are rounded at 1e-5: a small β keeps this out of losses that take sums.
SUM, MEAN = {"beta": 0.02}, {"beta": 0.7}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of random weights, its tokenizer, an SAE, and pairs in the toy's language."""
    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    pairs = [toy.make_pair(rng, rng.choice(toy.PROMPTS)) for _ in range(PAIRS + 3)]
    for name, part in (("train", pairs[:PAIRS]), ("test", pairs[PAIRS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    texts = [pair[side] for pair in pairs for side in ("prompt", "chosen", "rejected")]
    tokenizer = toy.make_tokenizer(texts)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
        sliding_window=16, initializer_range=0.1,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    # 24 features are active at every state, 24 at none: rounding can't turn one on or off.
    sae = make_sae(m=48)
    sae.b_enc.copy_(torch.tensor([12.0, -12.0]).repeat_interleave(24))
    np.savez(folder / "sae.npz", **{name: buffer.numpy() for name, buffer in sae.named_buffers()})
    return folder


@torch.no_grad()
def mean_square(lm, pairs):
    """Mean of ‖h‖² over the states that predict the responses' tokens, one response at a time."""
    states = [predicting(lm, x, y, [LAYER])[1][0] for x, *responses in pairs for y in responses]
    return torch.cat(states).double().square().sum(-1).mean().item()


def plain_loss(method, options, reference):
    """A loss to hand to the page's loop, as one who changes the page would write it."""

    def loss(policy, ref_logps, ref_features):
        logps, ref, n = policy.logps.chunk(2), ref_logps.chunk(2), policy.lengths.chunk(2)
        if method == "sft":
            return losses.sft_loss(logps[0], n[0])
        if method == "dpo":
            return losses.dpo_loss(*logps, *ref, **options)
        if method == "simpo":
            return losses.simpo_loss(*logps, *n, **options)
        with torch.no_grad():  # TDPO: the reference stays, and gives whole distributions at every step
            logits = reference(policy.ids).logits
        kl = losses.sequential_kl(policy.logits, logits, policy.labels)
        return losses.tdpo2_loss(*logps, *ref, *kl.chunk(2), **options)

    return functools.partial(minimal.fpo, **options) if method == "fpo" else loss


def config_of(tiny, out, method, clip, options):
    """The settings with which train.py is to make the page's steps; without sg it has --feature_scale rms."""
    flags = {name: value for name, value in options.items() if name != "stop_gradient"}
    flags |= {"model": tiny / "model", "dataset": tiny / "train.jsonl", "eval_dataset": tiny / "test.jsonl"}
    flags |= {"sae": tiny / "sae.npz", "sae_layer": LAYER, "out": out, "cache_dir": out / "cache"}
    flags |= {"batch_size": BATCH, "epochs": 2, "seed": LOOP["seed"], "lr": LOOP["lr"], "max_grad_norm": clip}
    flags |= {"adam_beta2": LOOP["beta2"], "warmup_steps": LOOP["warmup"], "warmup_ratio": 0}
    flags |= {"micro_batch_tokens": 120, "eval_every": 0, "method": method}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    rms = ["--feature_scale", "rms", "--no_stop_gradient"]
    alike = ["--feature_scale", "none"] if options.get("stop_gradient", True) else rms
    return settings.parse_args([*words, *alike, "--no_eval_kl"])


@pytest.mark.parametrize(
    ("method", "clip", "options"),
    [
        ("fpo", 1.2, {**MEAN, "alpha": 0.3, "k": 5}),
        ("fpo", 1.2, {**MEAN, "alpha": 30, "k": 5, "stop_gradient": False}),
        ("sft", 2.6, {}),
        ("dpo", 0.7, SUM),
        ("simpo", 1.5, {**MEAN, "gamma": 0.4}),
        ("tdpo2", 0.7, {**SUM, "alpha": 3}),
    ],
    ids=["fpo", "fpo-rms-without-sg", "sft", "dpo", "simpo", "tdpo2"],
)
def test_train_makes_the_steps_of_the_page(tiny, tmp_path, monkeypatch, method, clip, options):
    """Gradient norms, learning rates, losses and weights, over several micro-batches a step.

    What Adam divides by is near 0 for a few weights at first, so that rounding moves them as far as the
    gradient does: hence 1e-3 of the update. Seen: mostly 5e-6, at most 1.3e-4; of gradient norms 2e-6.
    """
    config = config_of(tiny, tmp_path, method, clip, options)
    step_sums = Mock(side_effect=train.step_sums)  # called for each micro-batch
    monkeypatch.setattr(train, "step_sums", step_sums)
    train.main(config)
    assert step_sums.call_count >= 1.5 * STEPS, "several micro-batches a step"
    lines, weights = lines_of(tmp_path), load_file(tmp_path / "model/model.safetensors")

    lm = AutoModelForCausalLM.from_pretrained(tiny / "model", attn_implementation="eager")
    reference, sae = copy.deepcopy(lm), load_sae(tiny / "sae.npz", layer=LAYER)
    tokenizer = load_tokenizer(str(tiny / "model"))
    pairs = list(load_pairs(str(tiny / "train.jsonl"), tokenizer, sft=method == "sft"))
    with SiteHook(lm, LAYER) as hook:
        unit = {"unit": mean_square(lm, pairs)} if config.feature_scale == "rms" else {}
        stored = minimal.phase_1(lm, hook, sae, pairs)
        loss = plain_loss(method, options | unit, reference)
        history = minimal.train(lm, hook, sae, pairs, stored, loss=loss, clip=clip, steps=STEPS, **LOOP)

    norms = [norm for _, norm, _ in history]
    assert min(norms) < 0.95 * clip and max(norms) > 1.05 * clip, "it clips some steps alone"
    assert len(lines) == len(history) == STEPS
    for line, (mean, norm, lr) in zip(lines, history, strict=True):
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert line["lr"] == pytest.approx(lr, rel=1e-12)
        assert line["loss"] == pytest.approx(mean, rel=1e-5)
    page, start = lm.state_dict(), reference.state_dict()
    moved, apart = (
        sum((a[name].double() - page[name].double()).square().sum() for name in weights) ** 0.5
        for a in (start, weights)
    )
    assert apart < 1e-3 * moved


def test_the_page_is_the_toy_preset():
    """What minimal.main leaves to its defaults is what `train.py --method fpo --preset toy` sets."""
    config = settings.parse_args(["--method", "fpo", "--preset", "toy"])
    for function, given in ((minimal.train, {"loss"}), (minimal.fpo, {"unit"})):
        renamed = {"beta2": "adam_beta2", "clip": "max_grad_norm", "warmup": "warmup_steps"}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not parameter.empty and name not in given:
                assert parameter.default == getattr(config, renamed.get(name, name)), name
    assert (config.schedule, config.optimizer, config.feature_scale) == ("constant", "adam", "none")


def test_python_minimal_prints_what_train_ends_with(folder, monkeypatch, capsys):
    """Accuracy and D_FPO of the toy's held-out pairs, before and after two steps, to four digits."""
    monkeypatch.setattr(minimal, "train", functools.partial(minimal.train, steps=2, lr=3e-3))
    minimal.main()
    printed = capsys.readouterr().out.splitlines()[-3:]
    flags = "--method fpo --preset toy --steps 2 --lr 3e-3 --eval_every 0 --no_eval_kl"
    train.main(settings.parse_args(flags.split()))
    scores = json.loads((folder / "runs/toy/fpo/scores.json").read_text())
    names = {"accuracy": "accuracy", "D(y_w)": "mse_chosen", "D(y_l)": "mse_rejected"}
    for line, (ours, theirs) in zip(printed, names.items(), strict=True):
        before, after = re.fullmatch(rf"held-out {re.escape(ours)}: (\S+) before, (\S+) after", line).groups()
        assert float(before) == pytest.approx(scores["before"][theirs], abs=1e-6)
        assert float(after) == pytest.approx(scores["after"][theirs], rel=1e-3)
        assert float(after) > 1e-4, "the model has moved"
