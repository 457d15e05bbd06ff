"""The real scripts on the toy world: two processes against one, every method, errors before any compute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fpo
import presets
import train

ROOT = Path(__file__).parent.parent
SHORT = ["--preset", "toy", "--steps", "3", "--warmup_steps", "2", "--eval_every", "2", "--eval_samples", "0"]


def script(folder, *flags, ranks=1, name="train.py", status=0):
    """Run a script as a user would; its output."""
    start = (
        [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    )
    start += [] if ranks == 1 else ["--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*start, ROOT / name, *flags], cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder, run):
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_do_what_one_does(folder):
    """torchrun with two processes and small micro-batches: the same losses and weights as one process."""
    out = script(folder, "--method", "fpo", *SHORT, "--out", "two", "--micro_batch_pairs", "5", ranks=2)
    script(folder, "--method", "fpo", *SHORT, "--out", "one")
    two, one = metrics(folder, "two"), metrics(folder, "one")
    assert [line["step"] for line in two] == [1, 2, 3] and "eval_accuracy" in two[1]
    for a, b in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "reward_margin", "mse_rejected", "accuracy", "lr"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    a, b = (load_file(folder / run / "model/model.safetensors") for run in ("two", "one"))
    lr = two[-1]["lr"]
    assert max((a[name] - b[name]).abs().max() for name in a) < lr, "3 steps move a weight by up to 3 lr"
    # What a user is left with: a table, a Hugging Face directory that stops at the turn's end, a card.
    assert "kl_rejected" in out and "two/model" in out
    lm, tokenizer = (
        kind.from_pretrained(folder / "two/model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in lm.generation_config.eos_token_id
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert lm.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]
    card = (folder / "two/model/README.md").read_text()
    assert "fpo" in card and "- beta: 0.1" in card and "| accuracy |" in card
    assert json.loads((folder / "two/config.json").read_text())["alpha"] == 0.5


def test_every_method_starts_where_it_should_and_learns(folder, capsys):
    """Loss ln 2 at step 0 but for SFT and SimPO; the loss of the same pairs falls."""
    for method in fpo.METHODS:
        lr = "1e-3" if method == "sft" else "3e-3"
        # The same 32 pairs again and again.
        flags = [
            "--method",
            method,
            *SHORT,
            "--eval_every",
            "0",
            "--lr",
            lr,
            "--dataset",
            "small.jsonl",
            "--no-eval_kl",
        ]
        lines = (folder / "runs/toy/train.jsonl").read_text().splitlines()[:32]
        (folder / "small.jsonl").write_text("\n".join(lines))
        train.main([*flags, "--no-eval_kl", "--steps", "6"])
        losses = [line["loss"] for line in metrics(folder, f"runs/toy/{method}")]
        assert losses[-1] < losses[0] - 0.005, (method, losses)
        if method in ("dpo", "tdpo1", "tdpo2", "fpo"):
            assert losses[0] == pytest.approx(0.6931472, abs=1e-5)
    # FPO before DPO: DPO reads the cache that has the features too.
    folders = {path.parent for path in (folder / "runs/toy/reference").glob("*/manifest.json")}
    assert len(folders) == 4, "train and held-out pairs, once without features (DPO came first) and once with"


def test_cache_is_kept_when_only_the_training_changes(folder):
    """Another lr, α, method and --out: the shards are read, not written again."""
    train.main(["--method", "fpo", *SHORT, "--steps", "1"])
    shards = sorted((folder / "runs/toy/reference").rglob("shard_*"))
    times = [path.stat().st_mtime_ns for path in shards]
    train.main(
        ["--method", "fpo", *SHORT, "--steps", "1", "--lr", "1e-3", "--alpha", "2", "--k", "20", "--out", "b"]
    )
    train.main(["--method", "dpo", *SHORT, "--steps", "1", "--out", "c"])
    assert sorted((folder / "runs/toy/reference").rglob("shard_*")) == shards
    assert [path.stat().st_mtime_ns for path in shards] == times


def test_not_finite_stops_and_names_the_pairs(folder, monkeypatch):
    """A NaN at step 2: the run ends, names step and pairs, and what was saved before stays."""
    train.main(["--method", "simpo", *SHORT, "--steps", "1"])
    saved = (folder / "runs/toy/simpo/model/model.safetensors").read_bytes()
    loss, calls = train.fpo.method_loss, []

    def poisoned(*args, **kwargs):
        value, extra = loss(*args, **kwargs)
        calls.append(1)
        return (
            value * torch.where(torch.arange(len(value)) == 3, torch.nan, 1.0) if len(calls) > 1 else value
        ), extra

    monkeypatch.setattr(train.fpo, "method_loss", poisoned)
    with pytest.raises(SystemExit, match=r"^error: step 2: .*: \[\d+\]\n.*--on_nan skip"):
        train.main(["--method", "simpo", *SHORT, "--eval_every", "0", "--micro_batch_pairs", "32"])
    assert (folder / "runs/toy/simpo/model/model.safetensors").read_bytes() == saved


def test_weights_that_are_not_finite_reach_no_state(folder, monkeypatch):
    """A stop at a NaN saves the state before it, unless that is not finite either."""
    loss, load, calls = train.fpo.method_loss, presets.load_lm, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        value, extra = loss(*args, **kwargs)
        return value * (torch.nan if len(calls) == 3 else 1.0), extra

    def broken(*args, **kwargs):
        lm = load(*args, **kwargs)
        lm.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        return lm

    flags = ["--method", "simpo", *SHORT, "--eval_every", "0", "--micro_batch_pairs", "32"]
    monkeypatch.setattr(train.fpo, "method_loss", poisoned)
    with pytest.raises(SystemExit, match="--resume auto"):
        train.main([*flags, "--out", "good"])
    assert [path.name for path in (folder / "good/state").iterdir()] == ["step_00000002"]
    monkeypatch.setattr(train.presets, "load_lm", broken)
    with pytest.raises(SystemExit, match=r"step 1: .*\]$"):
        train.main([*flags, "--out", "bad"])
    assert not (folder / "bad/state").exists() and not (folder / "bad/model").exists()


def test_a_base_model_learns_to_stop(folder):
    """A generation config that knows EOS alone: the saved one ends at the turn's end too."""
    model = folder / "base"
    subprocess.run(["cp", "-rL", folder / "runs/toy/model", model], check=True)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    train.main(["--method", "sft", *SHORT, "--steps", "1", "--model", "./base"])
    saved = json.loads((folder / "runs/toy/sft/model/generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 107]


def test_activation_checkpointing_changes_nothing(folder):
    """The same three steps, blocks kept or made again, shared rows or separate ones."""
    runs = []
    for flags in (["--layout", "separate"], ["--activation_checkpointing", "--layout", "shared"]):
        train.main(["--method", "fpo", *SHORT, "--eval_every", "0", *flags])
        runs.append(metrics(folder, "runs/toy/fpo"))
    for a, b in zip(*runs, strict=True):
        for name in ("loss", "grad_norm", "mse_chosen"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name


def test_eval_script_agrees_with_the_run(folder):
    """eval_diversity.py --json on the saved model gives the scores that train.py ended with."""
    train.main(["--method", "fpo", *SHORT, "--lr", "2e-3", "--eval_every", "0"])
    flags = (
        "--preset",
        "toy",
        "--model",
        "runs/toy/fpo/model",
        "--reference",
        "runs/toy/model",
        "--samples",
        "1",
    )
    script(folder, *flags, "--prompts", "5", "--json", "a/b.json", name="eval_diversity.py")
    scores = json.loads((folder / "a/b.json").read_text())
    ended = json.loads((folder / "runs/toy/fpo/scores.json").read_text())["after"]
    assert {
        "accuracy",
        "reward_accuracy",
        "entropy",
        "kl_chosen",
        "kl_rejected",
        "mse_chosen",
        "mse_rejected",
    } <= set(scores)
    for name, value in ended.items():
        assert scores[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


# ---- flags
def test_presets_are_table_5():
    """The paper's values, as printed there."""
    for preset, optimizer in (("gemma-2-2b", "adam"), ("gemma-2-9b", "rmsprop")):
        for method, alpha, beta, gamma in (
            ("dpo", None, 0.1, None), ("tdpo1", None, 0.1, None), ("tdpo2", 0.5, 0.1, None),
            ("simpo", None, 2.0, 0.5), ("fpo", 0.5, 0.1, None),
        ):  # fmt: skip
            args = train.parse_args(["--preset", preset, "--method", method])
            assert (args.alpha, args.beta, args.gamma) == (alpha, beta, gamma), method
            assert (args.lr, args.warmup_steps, args.schedule, args.batch_size) == (5e-7, 150, "constant", 32)
            assert (args.epochs, args.optimizer, args.sae_width, args.k) == (1, optimizer, "16k", 50)
            assert args.activation_checkpointing is True
    assert train.parse_args([]).sae_layer == [25] and train.parse_args([]).sae_l0 == [55]
    nine = train.parse_args(["--preset", "gemma-2-9b"])
    assert nine.sae_layer == [41] and nine.sae_l0 is None and nine.sae == "google/gemma-scope-9b-pt-res"


def test_learning_rate():
    """By hand: linear over 4 steps, then constant; or a cosine over the remaining 6 to 0."""
    args = train.parse_args(["--lr", "1", "--warmup_steps", "4"])
    assert [train.learning_rate(s, 10, args) for s in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    args = train.parse_args(["--lr", "1", "--warmup_ratio", "0.4", "--schedule", "cosine"])
    assert train.learning_rate(0, 10, args) == 0.25
    assert train.learning_rate(4, 10, args) == 1.0
    assert train.learning_rate(7, 10, args) == pytest.approx(0.5)


def test_where_training_starts(tmp_path, monkeypatch):
    """The SFT model where there is one, else the base model with a line that names the SFT command."""
    monkeypatch.chdir(tmp_path)
    args = train.parse_args(["--method", "fpo"])
    assert args.model == args.reference == "google/gemma-2-2b" and "--method sft" in args.start_note
    (tmp_path / "runs/gemma-2-2b/sft/model").mkdir(parents=True)
    args = train.parse_args(["--method", "fpo"])
    assert args.model == args.reference == "runs/gemma-2-2b/sft/model"
    assert train.parse_args(["--method", "sft"]).model == "google/gemma-2-2b"
    assert "ultrachat" in train.parse_args(["--method", "sft"]).dataset
    assert train.parse_args(["--method", "fpo", "--model", "x/y", "--reference", "z"]).reference == "z"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--cache_top", "60"], "at least 4 k = 200"),
        (["--max_prompt_length", "1024"], "must be below --max_length 1024"),
        (["--warmup_ratio", "1"], "from 0 to below 1"),
        (["--sae_layer", "9"], "layer 9"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "./nowhere"], "./nowhere"),
        (["--sae", "/nowhere"], "/nowhere"),
        (["--sae_width", "65k"], "512"),
    ],
)  # fmt: skip
def test_wrong_values_end_with_one_line(folder, capsys, flags, says):
    with pytest.raises(SystemExit) as stop:
        train.main([*SHORT, *flags])
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and says in error[0]


def test_hub_errors_say_what_to_do():
    """A gated and a missing repository, as huggingface_hub raises them."""
    from types import SimpleNamespace

    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = SimpleNamespace(headers={}, request=None)
    cases = (
        (GatedRepoError, "a gated repo", "accept its licence"),
        (RepositoryNotFoundError, "no", "check the name"),
    )
    for kind, text, says in cases:
        with pytest.raises(ValueError, match=says), presets.hub_errors("model", "google/gemma-2-2b"):
            try:
                raise kind("no", response=response)
            except kind as error:  # transformers wraps it in an OSError
                raise OSError(text) from error
