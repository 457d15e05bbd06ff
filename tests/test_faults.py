"""Faults of values, input, disks and ranks, and what becomes of them. Runs that are cut: test_resume.py.

| fault | what happens | test |
|---|---|---|
| any flag of any script, any wrong value | one line, status 2, no model loaded | test_wrong_values |
| a full disk: cache, metrics, state, model | the file is named; resumes to the same bits | test_full_disk |
| a folder that the system refuses | one line that names it | test_a_folder_that_can_not_be_made |
| the cache is damaged in the loop | one line that names the shard | test_a_byte_that_flips_while_training |
| a new run in the folder of a longer one | its own states are resumed | test_a_run_that_begins_anew |
| a state.json that says nothing | refused, named | test_a_state_that_says_nothing |
| weights saved in another dtype | trained in --dtype | test_a_model_saved_in_another_dtype |
| SAE, tokenizer of another model | refused | test_a_model_that_does_not_fit |
| reference of another vocabulary | refused | test_a_reference_of_another_vocabulary |
| a single pair | trained | test_one_pair |
| ../ in texts, in a checkpoint's index | text as any; refused | test_names_that_climb_out |
| any text | counted once in each layout, or a reason | test_any_text_has_a_loss_in_every_layout |
| kill -9 of a rank | the others end, torchrun names it | test_a_dead_rank_is_named |
| one rank alone sees a NaN | all stop, or all skip that step | test_two_ranks_decide_alike |
| uneven shares, a rank without pairs | the losses of one process | test_two_ranks_decide_alike |
| kill -9 under --max_restarts 1 | started again, the same bits | test_restarted_by_torchrun |
| resume of three ranks | the same bits | test_three_ranks_resume |
"""

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bench
import claims
import data
import eval_diversity
import fpo
import offline
import presets
import report
import reproduce
import resume
import toy
import train

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------- flags
SCRIPTS = {
    "train.py": (train, ["--preset", "toy"]),
    "eval_diversity.py": (eval_diversity, ["--preset", "toy", "--samples", "0"]),
    "bench.py": (bench, []),
    "reproduce.py": (reproduce, ["control"]),
    "toy.py": (toy, []),
    "claims.py": (claims, ["theorem", "--preset", "gemma-2-2b"]),
}
# Numbers that may be 0: none of that thing, no limit, or the first one.
MAY_BE_0 = {
    "train.py": "sae_layer seed beta alpha gamma lr warmup_steps warmup_ratio max_grad_norm eval_every "
    "save_every eval_samples cache_top pack_to micro_batch_pairs micro_batch_tokens",
    "eval_diversity.py": "sae_layer seed beta temperature features_top bootstrap samples weight_inside "
    "weight_outside pack_to",
    "bench.py": "",
    "reproduce.py": "seeds",
    "toy.py": "seed",
    "claims.py": "pairs",
}
MODEL = ["", "./missing", "a/b/c", "empty_folder", "notes.txt"]
DATA = ["", "missing.jsonl", "empty_folder", "notes.txt", "empty.jsonl", "broken.jsonl"]
FOLDER = ["", "notes.txt", "notes.txt/below"]
FILE = ["", "empty_folder", "notes.txt/below.json"]
TEXTS = {  # flag: wrong values
    "model": MODEL, "reference": MODEL, "dataset": DATA, "eval_dataset": DATA, "train_pairs": DATA,
    "sae": ["", "/missing", "empty_folder", "notes.txt"], "sae_width": ["", "64k"],
    "cache_dir": FOLDER, "out": FOLDER, "assets": FOLDER, "json": FILE, "weights": FILE,
    "feature_weights": ["", "missing.json", "empty_folder", "notes.txt", "broken.jsonl"],
    "find_features": ["", "missing.jsonl", "empty_folder"], "what": ["", "no_such"],
    "run": ["", "missing", "empty_folder", "notes.txt"],
    "wandb": [""], "push_to_hub": [""],  # what can't be reached: test_report.py
    "draw": ["missing.json", "broken.jsonl", "empty_folder"],
    "questions": ["", "missing.jsonl", "empty_folder", "notes.txt", "empty.jsonl"],
}  # fmt: skip
ANSWERS = ["--export", "records", "--questions", "empty.jsonl", "--out", "answers.jsonl"]
WITH = {  # what a flag needs beside it to be read at all
    ("eval_diversity.py", "weights"): ["--find_features", "broken.jsonl", "broken.jsonl"],
    ("eval_diversity.py", "questions"): ANSWERS,
    ("eval_diversity.py", "out"): ANSWERS,
    ("eval_diversity.py", "temperature"): ANSWERS,
    ("eval_diversity.py", "sae"): ["--features_top", "3"],
    ("eval_diversity.py", "sae_width"): ["--features_top", "3"],
    ("eval_diversity.py", "sae_layer"): ["--features_top", "3"],
    ("eval_diversity.py", "sae_l0"): ["--features_top", "3"],
}


def flags_of(script):
    """The arguments that a script's own parser takes."""
    module, given = SCRIPTS[script]
    take = mock.Mock(side_effect=StopIteration)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=take) as parse:
        with pytest.raises(StopIteration):
            (module.parse_args if hasattr(module, "parse_args") else module.main)(given)
        (parser, *_), _ = parse.call_args
    return [a for a in parser._actions if a.nargs != 0 and a.help != argparse.SUPPRESS]


def wrong_values(script, flag):
    """Values that a flag must refuse, by what it is; a text that nobody thought about has none."""
    if flag.choices:
        return ["", "no_such"]
    if flag.type is None:
        return FILE if (script, flag.dest) == ("eval_diversity.py", "out") else TEXTS.get(flag.dest, [])
    zero = [] if flag.dest in MAY_BE_0[script].split() else ["0"]
    return ["", "x", "-1", "nan", "inf", str(2**70), *zero] + ["1.5"] * (flag.type is int)


CASES = [(script, flag) for script in SCRIPTS for flag in flags_of(script)]


@pytest.mark.parametrize("script, flag", CASES, ids=[f"{s}-{f.dest}" for s, f in CASES])
def test_wrong_values(folder, monkeypatch, capsys, script, flag):
    """Every flag of every script: one line, status 2, and no model was loaded."""
    (folder / "empty_folder").mkdir()
    (folder / "notes.txt").write_text("words\n")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "chosen"\n')
    loaded = mock.Mock(side_effect=AssertionError("a model was loaded"))
    monkeypatch.setattr(presets.AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(subprocess, "run", loaded)
    monkeypatch.setattr(toy, "make_world", loaded)
    module, given = SCRIPTS[script]
    values = wrong_values(script, flag)
    assert values, f"no wrong value is known of {script} --{flag.dest}"
    for value in values:
        words = [value, "b.svg"] if flag.nargs == 2 else [value]
        words = [f"--{flag.dest}", *words] if flag.option_strings else words
        with pytest.raises(SystemExit) as stop:
            module.main([*(given if flag.option_strings else []), *WITH.get((script, flag.dest), []), *words])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert stop.value.code == 2 and len(errors) == 1, (words, errors)
        assert f"--{flag.dest}" in errors[0] or (value or flag.dest) in errors[0], (words, errors)


def test_wrong_values_together(folder, capsys):
    """What is wrong only beside another flag, or is no folder at all."""
    for flags, says in (
        (["--warmup_ratio", "1"], "--warmup_ratio 1.0: must be from 0 to below 1"),
        (["--sae_layer", "3", "--sae_l0", "40", "50"], "--sae_l0 [40, 50]: one value, or one for each"),
        (["--plan", "--sae_width", "wide"], "--sae_width wide: a number is needed"),
        (["--no_such"], "--no_such"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(["--preset", "toy", *flags])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert stop.value.code == 2 and len(errors) == 1 and says in errors[0], (flags, errors)


def test_an_average_l0_is_a_folders_name(folder):
    """Gemma Scope's L0s are whole numbers; the SAE of the toy world is found by its own."""
    (path,) = (folder / "runs/toy/sae").rglob("average_l0_*")
    l0 = path.name.removeprefix("average_l0_")
    args = train.parse_args(["--preset", "toy", "--sae_l0", l0])
    assert [sae.m for sae in presets.load_saes(args, "cpu")[0]] == [512]


# ---------------------------------------------------------------------------- the disk
RUN = ["--preset", "toy", "--method", "fpo", "--steps", "6", "--warmup_steps", "2", "--batch_size", "16"]
RUN += ["--eval_every", "0", "--eval_samples", "0", "--no-eval_kl"]


def stopped(capsys, flags):
    """The one line that train.py ends with, status 2."""
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert stop.value.code == 2
    return line


def files(*folders):
    """{name: bytes} of all that lies in some folders."""
    found = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in found if path.name != "lock"}


def losses_of(run):
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


FULL = {  # at which function's call the disk is full, which call, bytes that a file still takes, which file
    "cache": (offline, "_write_shard", 2, 1000, "shard_00000"),
    "metrics": (train, "peak_memory_gb", 3, 0, "cut/metrics.jsonl"),
    "state": (resume, "save_state", 2, 1000, "cut/state/step_00000004.tmp"),
    "model": (report, "save_model", 1, 1000, "cut/model.tmp"),
}


@pytest.mark.parametrize("what", FULL)
def test_full_disk(folder, monkeypatch, capsys, what):
    """One line names the file; what was there is whole, what was begun gone; with room again it goes on."""
    (folder / "cut/model").mkdir(parents=True)
    (folder / "cut/model/weights").write_text("of an earlier run")
    module, name, full_at, room, named = FULL[what]
    real, before, hard = getattr(module, name), [], resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def cramped(*args, **kwargs):
        before.append(files("cut", "runs/toy/reference"))
        if len(before) == full_at:  # no file grows beyond it: the same error of every write, without a disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, cramped)
    try:
        assert named in stopped(capsys, [*RUN, "--out", "cut", "--save_every", "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert files("cut", "runs/toy/reference") == before[-1]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    train.main([*RUN, "--out", "cut", "--save_every", "2", "--resume", "auto"])
    train.main([*RUN, "--out", "whole"])
    weights = [Path(run, "model/model.safetensors").read_bytes() for run in ("cut", "whole")]
    assert weights[0] == weights[1] and not (folder / "cut/model/weights").exists()
    assert losses_of("cut") == losses_of("whole") and len(losses_of("cut")) == 6


def test_a_folder_that_can_not_be_made(folder, capsys):
    """Nobody makes folders in /proc, and no check beforehand knows it."""
    assert "/proc/fpo" in stopped(capsys, [*RUN, "--out", "/proc/fpo"])


def test_a_byte_that_flips_while_training(folder, capsys, monkeypatch):
    """The cache is damaged after the start has looked at it: one line names the shard."""
    scores = train.evaluate

    def flip(*args, **kwargs):
        for shard in Path("runs/toy/reference").rglob("shard_*.safetensors"):
            content = shard.read_bytes()
            shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        return scores(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", flip)
    assert "shard_00000.safetensors: not the bytes" in stopped(capsys, RUN)


# ---------------------------------------------------------------------------- states
def test_a_run_that_begins_anew(folder, monkeypatch, capsys):
    """In the folder of one that came further, cut after its first state: not taken for the other."""
    new = [*RUN, "--lr", "1e-3", "--save_every", "2"]
    train.main([*new, "--out", "whole"])
    train.main([*RUN, "--out", "cut", "--save_every", "3"])
    norm, steps = train.precision.clip_gradients, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return norm(*args)

    monkeypatch.setattr(train.precision, "clip_gradients", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main([*new, "--out", "cut"])
    train.main([*new, "--out", "cut", "--resume", "auto"])
    assert len(steps) == 4 + 4 and losses_of("cut") == losses_of("whole")
    assert Path("cut/state.old/step_00000006/state.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 3, "step": 1}'])
def test_a_state_that_says_nothing(folder, capsys, text):
    (folder / "cut/state/step_00000002").mkdir(parents=True)
    (folder / "cut/state/step_00000002/state.json").write_text(text)
    line = stopped(capsys, [*RUN, "--out", "cut", "--resume"])
    assert "step_00000002/state.json is not what a run writes" in line


# ---------------------------------------------------------------------------- input
def save_toy(folder, name, dtype=torch.float32, change=None):
    """The toy model again, at `name`: in another dtype, or with its config changed and random weights."""
    lm = AutoModelForCausalLM.from_pretrained(folder / "runs/toy/model", dtype=dtype)
    if change:
        lm = type(lm)(type(lm.config)(**{**lm.config.to_dict(), **change}))
    lm.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(folder / "runs/toy/model").save_pretrained(folder / name)


def test_a_model_saved_in_another_dtype(folder):
    """bf16 weights train in float32 as the same numbers in a float32 file do; float32 ones train in bf16."""
    save_toy(folder, "bf16", torch.bfloat16)
    lm = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.float32)
    save_toy(folder, "wide")
    lm.save_pretrained(folder / "wide")
    for name in ("bf16", "wide"):
        train.main([*RUN, "--steps", "2", "--model", f"./{name}", "--out", name + "_run"])
    assert losses_of("bf16_run") == losses_of("wide_run")
    train.main([*RUN, "--steps", "2", "--dtype", "bfloat16", "--out", "narrow"])
    (weights,) = Path("narrow/model").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    assert losses_of("narrow")[0] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden_size": 32}, "reads width 64, the model has 32"),
        ({"vocab_size": 100}, "train.jsonl: token "),
    ],
)
def test_a_model_that_does_not_fit(folder, capsys, change, says):
    save_toy(folder, "other", change=change)
    assert says in stopped(capsys, [*RUN, "--model", "./other"])


def test_a_reference_of_another_vocabulary(folder, capsys):
    save_toy(folder, "other", change={"vocab_size": 5000})
    assert "vocabulary" in stopped(capsys, [*RUN, "--reference", "./other"])


def test_one_pair(folder):
    """The loss of a data set of one pair is that pair's alone, step after step: ln 2, then below."""
    line = (folder / "runs/toy/train.jsonl").read_text().splitlines()[0]
    (folder / "one.jsonl").write_text(line)
    train.main(
        [*RUN, "--dataset", "one.jsonl", "--eval_dataset", "one.jsonl", "--lr", "1e-3", "--out", "one"]
    )
    losses = losses_of("one")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0]


def test_names_that_climb_out(folder, capsys):
    """A text with ../ is a text, no place to write to; a checkpoint's index reads nothing elsewhere."""
    record = dict.fromkeys(("prompt", "chosen"), "../../escaped") | {"rejected": "/tmp/escaped"}
    (folder / "climb.jsonl").write_text(json.dumps(record))
    before = set(files("."))
    train.main([*RUN, "--steps", "1", "--dataset", "climb.jsonl", "--out", "cut"])
    assert all(name.startswith(("cut/", "runs/toy/reference/")) for name in set(files(".")) - before)
    assert not list(folder.parent.rglob("escaped"))
    save_toy(folder, "split")
    Path("split/model.safetensors").rename("outside.safetensors")
    names = dict.fromkeys(load_file("outside.safetensors"), "../outside.safetensors")
    index = {"metadata": {}, "weight_map": names}
    Path("split/model.safetensors.index.json").write_text(json.dumps(index))
    assert "../outside.safetensors" in stopped(capsys, [*RUN, "--model", "./split"])


TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
FIELDS = dict.fromkeys(("prompt", "chosen", "rejected"), TEXT)


@given(records=st.lists(st.fixed_dictionaries(FIELDS), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_a_loss_in_every_layout(world, tmp_path, records):
    """A message, or log-probabilities and losses that are finite, and the same in each layout."""
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    try:
        pairs = data.load_pairs(str(path), tokenizer, max_length=48, max_prompt_length=24)
    except ValueError as error:
        assert "no usable record" in str(error)
        return
    policy = fpo.Policy(presets.load_lm(str(world / "model"), "cpu"))
    seen = []
    for rows in ({"layout": "separate"}, {"layout": "shared"}, {"layout": "shared", "pack_to": 200}):
        batch = data.collate(pairs, range(len(pairs)), **rows)
        with torch.no_grad():
            statistics, _ = policy(batch)
        loss, _ = fpo.method_loss("dpo", statistics, statistics, beta=0.1)
        assert statistics.lengths.sum() == pairs.is_target.sum() and loss.isfinite().all()
        seen.append(statistics.logps)
    assert torch.isfinite(seen[0]).all() and (seen[0] < 0).all()
    for logps in seen[1:]:
        assert torch.allclose(logps, seen[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- several ranks
def torchrun(folder, *words, ranks=2, options=()):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [*start, *options, *map(str, words)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def kill_rank(process, rank, run, after):
    """kill -9 of a rank once the run has logged so many steps."""
    metrics = Path(run, "metrics.jsonl")
    while not metrics.exists() or metrics.read_text().count("\n") < after:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = (pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(int(victim), signal.SIGKILL)


def test_a_dead_rank_is_named(folder):
    """The other rank ends with it, and torchrun says which one was first."""
    process = torchrun(folder, ROOT / "train.py", *RUN, "--steps", "500", "--out", "cut")
    kill_rank(process, 1, "cut", after=2)
    out, _ = process.communicate(timeout=60)
    first = out[out.index("Root Cause") :]
    assert process.returncode and re.search(r"rank +: 1 .*\n.*exitcode +: -9 .*SIGKILL", first), out[-9000:]
    assert not Path("cut/model").exists()


RANKS = """
import hashlib, json, os, sys
import torch.distributed as dist
import train
RUN, rank, seen = sys.argv[1:], os.environ["RANK"], {"calls": 0}
loss, save = train.fpo.method_loss, train.report.save_model

def poisoned(*args, **kwargs):  # rank 1 alone, in step 2
    value, extra = loss(*args, **kwargs)
    seen["calls"] += 1
    return (value * float("nan") if rank == "1" and seen["calls"] == 2 else value), extra

def noted(policy, *args):
    weights = b"".join(p.detach().numpy().tobytes() for p in policy.parameters())
    seen["weights"] = hashlib.sha256(weights).hexdigest()
    save(policy, *args)

dist.destroy_process_group = lambda: None  # three runs in one
train.main([*RUN, "--steps", "4", "--batch_size", "3", "--dataset", "four.jsonl", "--out", "uneven"])
train.fpo.method_loss, train.report.save_model = poisoned, noted
try:
    train.main([*RUN, "--out", "stop", "--on_nan", "stop"])
except SystemExit as error:
    seen["stop"] = str(error)
seen["calls"] = 0
train.main([*RUN, "--out", "skip", "--on_nan", "skip"])
open(f"rank_{rank}.json", "w").write(json.dumps(seen))
"""


def test_two_ranks_decide_alike(folder):
    """A NaN that rank 1 alone sees stops both, or both skip that step. Where the ranks' shares are uneven, or
    one has none (batches of 3 and 1), the losses are those of one process.
    """
    lines = (folder / "runs/toy/train.jsonl").read_text().splitlines()[:4]
    (folder / "four.jsonl").write_text("\n".join(lines))
    (folder / "ranks.py").write_text(RANKS)
    process = torchrun(folder, "ranks.py", *RUN)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out[-9000:]
    a, b = (json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert a["stop"] == b["stop"] and re.match(r"error: step 2: .*: \[\d+(, \d+){7}\]\n", a["stop"])
    assert a["weights"] == b["weights"]
    skipped = [json.loads(line) for line in (folder / "skip/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped if "skipped" in line] == [2] and len(skipped) == 6
    train.main([*RUN, "--steps", "4", "--batch_size", "3", "--dataset", "four.jsonl", "--out", "alone"])
    assert losses_of("uneven") == pytest.approx(losses_of("alone"), rel=1e-5)


@pytest.mark.kill
def test_restarted_by_torchrun(folder):
    """torchrun --max_restarts 1, --save_every, --resume auto: a kill -9 changes no bit of what comes out."""
    process = torchrun(folder, ROOT / "train.py", *RUN, "--steps", "60", "--out", "whole")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out[-9000:]
    flags = [*RUN, "--steps", "60", "--out", "cut", "--save_every", "5", "--resume", "auto"]
    process = torchrun(folder, ROOT / "train.py", *flags, options=["--max_restarts", "1"])
    kill_rank(process, 1, "cut", after=7)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out[-9000:]
    assert losses_of("cut") == losses_of("whole") and len(losses_of("cut")) == 60
    weights = [Path(run, "model/model.safetensors").read_bytes() for run in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.kill
def test_three_ranks_resume(folder):
    """Three ranks, left after step 3 of 6 and resumed: the same bits."""
    flags = [ROOT / "train.py", *RUN, "--save_every", "3", "--keep", "2"]
    for extra in (["--out", "whole"], ["--out", "cut"], ["--out", "cut", "--resume"]):
        process = torchrun(folder, *flags, *extra, ranks=3)
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out[-9000:]
        if extra == ["--out", "cut"]:
            shutil.rmtree(folder / "cut/state/step_00000006")
            shutil.rmtree(folder / "cut/model")
    assert losses_of("cut") == losses_of("whole")
    weights = [Path(run, "model/model.safetensors").read_bytes() for run in ("cut", "whole")]
    assert weights[0] == weights[1]
