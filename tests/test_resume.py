"""Faults of runs, disks and ranks, and what becomes of them.

| fault | what happens | test |
|---|---|---|
| kill -9 of any rank, at any moment | resumes to the same bits | test_killed_at_any_moment |
| SIGTERM, SIGINT | saves at the step's end, status 0, same bits | test_sigterm_saves_and_leaves |
| a second run in a run's folder | refused, writes nothing | test_two_runs_in_one_folder |
| resume with other settings, ranks or files | refused, each named | test_resume_refuses_another_run |
| a state that is cut short, or a pickle | refused, named; no code runs | test_bad_state_is_refused |
| a new run in the folder of a longer one | its own states are resumed | test_a_run_that_begins_anew |
| a killed run in a finished one's folder | that is whole in earlier_1 | test_a_folder_s_files_are_one_run_s |
| a full disk: cache, metrics, state, model | the file is named; resumes to the same bits | test_full_disk |
| a shard cut, flipped, missing, a pickle | it alone is made again | test_cache.py |
| a byte flips between start and use | stops, named; made again next | test_cache.py |
| two processes build one cache | the second waits, both are whole | test_cache.py |
| one rank sees a NaN | all stop, the step and its pairs are named | test_two_ranks_decide_alike |
| kill -9 under --max_restarts 1 | the same bits | test_restarted_by_torchrun |
| two torchruns, as on two machines | the same losses | test_two_agents |
"""

import contextlib
import hashlib
import json
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from conftest import ROOT, Evil, lines_of, make_folder
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM

import checkpoint
import eval_diversity
import fpo
import offline
import settings
import train
from runtime import UserError

RUN = ["--preset", "toy", "--method", "fpo", "--steps", "6", "--warmup_steps", "2", "--eval_every", "0"]
RUN += ["--no_eval_kl", "--batch_size", "16"]
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*flags):
    train.main(settings.parse_args([*RUN, *map(str, flags)]))


def refused(*flags) -> str:
    with pytest.raises(UserError) as error:
        run(*flags)
    return str(error.value)


def losses_of(run):
    return [line["loss"] for line in lines_of(run)]


def bits_of(run):
    """A run's end: a digest of the weights, its losses, each step's once, what it answers, and answered."""
    assert [line["step"] for line in lines_of(run)] == [*range(1, len(lines_of(run)) + 1)]
    weights = hashlib.sha256(Path(run, "model/model.safetensors").read_bytes()).hexdigest()
    return weights, losses_of(run), json.loads(Path(run, "samples.json").read_text())


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Bits of the uninterrupted run by RUN."""
    folder, threads = make_folder(world, tmp_path_factory.mktemp("whole")), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        run("--out", "whole")
        found = bits_of("whole")
    torch.set_num_threads(threads)
    return found


def run_until(step, *flags):
    """A run that dies after its `step`-th step."""
    real, calls = train.step_sums, []

    def dies(*args):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "step_sums", dies)
        run(*flags)


# ---------------------------------------------------------------------------- interruptions
@pytest.mark.parametrize("optimizer, dtype", [("adam", "float32"), ("rmsprop", "bfloat16")])
def test_resume_is_bit_identical(folder, optimizer, dtype):
    """Uninterrupted, and dead in step 5 of 6 after a state of step 3: the same bits; no metrics line lost."""
    flags = ["--dtype", dtype, "--optimizer", optimizer, "--save_every", "3"]
    run(*flags, "--out", "whole")
    run_until(4, *flags, "--out", "cut")
    (folder / "cut/metrics.jsonl").write_text((folder / "cut/metrics.jsonl").read_text()[:-20])  # a cut line
    (folder / "cut/state/step_00000001").mkdir()  # as if it had died before the older state went
    (folder / "cut/state/step_00000004.tmp").mkdir()  # and while it wrote another
    run(*flags, "--out", "cut", "--resume")
    assert bits_of("cut") == bits_of("whole")
    assert [path.name for path in (folder / "cut/state").iterdir()] == ["step_00000006"]


MOMENTS = ("caching", "training", "saving", "resuming", "anywhere")


def wait_for(moment, processes, folder, rng):
    """Return when the run is at the moment to kill it at, or has ended."""
    run, cache = folder / "cut", folder / "runs/toy/reference"
    shards, steps = len(list(cache.rglob("shard_*.safetensors"))), len(lines_of(run))
    began, delay = time.time(), rng.uniform(0.5, 9)
    while processes.running():
        made = len(list(cache.rglob("shard_*.safetensors")))
        if moment == "caching" and (made > shards or list(cache.rglob("*.tmp"))):
            return
        if moment == "training" and len(lines_of(run)) > steps:
            time.sleep(rng.uniform(0, 0.3))
            return
        if moment == "saving" and list((run / "state").glob("*.tmp")):
            return
        if moment in ("resuming", "anywhere") and time.time() - began > delay:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("moments", [MOMENTS[:3], pytest.param(MOMENTS * 4, marks=pytest.mark.kill)])
def test_killed_at_any_moment(folder, fork, moments):
    """Kill one of two ranks at each moment and resume: the end is that of an uninterrupted run."""

    def launch(*flags):
        return fork(folder, ROOT / "train.py", *RUN, *flags, ranks=2)

    launch("--out", "whole", "--cache_dir", "other").finish()
    rng, flags = random.Random(0), ["--out", "cut", "--save_every", "1", "--resume"]
    for moment in moments:
        if moment == "caching":  # the next start has a cache to make
            for shard in list((folder / "runs/toy/reference").rglob("shard_*"))[::2]:
                shard.unlink()
        ranks = launch(*flags)
        wait_for(moment, ranks, folder, rng)
        if ranks.running():
            rng.choice(ranks.processes).kill()
            while ranks.running():  # the other is ended, as torchrun does it
                time.sleep(0.005)
        else:  # it has ended before
            ranks.finish()
        if (folder / "cut/scores.json").exists():  # all six steps are behind it: begin again
            assert bits_of("cut") == bits_of("whole")
            shutil.rmtree(folder / "cut")
    launch(*flags).finish()
    assert bits_of("cut") == bits_of("whole")


STOPS = """
import os, signal
import batches, runtime, train

batches.LOADERS["cpu"] = 1
real, calls = train.step_sums, []

def step_sums(*args):  # once a step, here
    calls.append(1)
    if len(calls) == 2:
        os.killpg(0, signal.SIGTERM)
    return real(*args)

train.step_sums = step_sums
runtime.run_script(train.main)
"""


def test_sigterm_saves_and_leaves(folder, fork, whole):
    """SIGTERM to a rank's whole group, as torchrun sends it, the process that makes batches included (CUDA's
    only): status 0, a state; --resume ends with the same bits.
    """
    out = fork(folder, "-c", STOPS, *RUN, "--out", "cut", "--resume").finish()
    assert "stopped by a signal after step 2; go on with --resume" in out
    assert len(lines_of("cut")) == 2 and not (folder / "cut/model").exists()
    run("--out", "cut", "--resume")
    assert bits_of("cut") == whole


@pytest.mark.slow
def test_fsdp_resumes_bit_for_bit(folder, fork):
    """Each of two ranks saves its shards, and gets them back."""
    flags = [*RUN, "--shard", "fsdp"]
    fork(folder, ROOT / "train.py", *flags, "--out", "whole", ranks=2).finish()
    fork(folder, "-c", STOPS, *flags, "--out", "cut", ranks=2).finish()
    first, second = (load_file(f"cut/state/step_00000002/rank_{rank}.safetensors") for rank in range(2))
    name = "exp_avg/lm.model.embed_tokens.weight"
    assert len(lines_of("cut")) == 2 and first[name].any() and not torch.equal(first[name], second[name])
    fork(folder, ROOT / "train.py", *flags, "--out", "cut", "--resume", ranks=2).finish()
    assert bits_of("cut") == bits_of("whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_finds_the_former_handlers(number, monkeypatch):
    """The first is noted, of either kind; so is one right after it. A later one does what it did before."""
    both, heard = (signal.SIGTERM, signal.SIGINT), []
    before = {n: signal.signal(n, lambda n, frame: heard.append(n)) for n in both}
    try:
        former, stop = [signal.getsignal(n) for n in both], checkpoint.StopSignal()
        assert not stop.came and [signal.getsignal(n) for n in both] == [stop.note] * 2
        signal.raise_signal(number)
        signal.raise_signal(number)  # torchrun passes on what a scheduler sent to all
        assert stop.came and not heard
        monkeypatch.setattr(checkpoint.StopSignal, "GRACE", 0.0)
        signal.raise_signal(number)
        assert heard == [number] and [signal.getsignal(n) for n in both] == former
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_two_runs_in_one_folder(folder, capsys):
    """While another holds a run's folder a run is refused and writes nothing; then it goes on."""
    (folder / "a run").mkdir()
    with filelock.FileLock(folder / "a run/lock"):
        assert "a run" in refused("--out", "a run")
        assert [path.name for path in (folder / "a run").iterdir()] == ["lock"]
    run("--out", "a run", "--steps", "1")
    assert len(lines_of("a run")) == 1
    # The command that it ends with can be typed as it stands.
    *_, words = (shlex.split(line) for line in capsys.readouterr().out.splitlines() if "--reference" in line)
    assert words == ["python", "eval_diversity.py", "--model", "a run/model", "--reference", "runs/toy/model"]


# ---------------------------------------------------------------------------- what a run goes on with
def test_resume_refuses_another_run(folder):
    """Other settings, labels, SAE or reference in the same place are named; another number of ranks too."""
    shutil.copytree(folder / "runs/toy/model", folder / "ref")
    flags = ["--out", "cut", "--save_every", "3", "--resume", "--reference", "./ref"]
    run_until(4, *flags)
    said = refused(*flags, "--lr", "1e-5", "--alpha", "3")
    assert "--lr was 0.0003, is 1e-05" in said and "--alpha was 0.5, is 3.0" in said
    pairs = folder / "runs/toy/train.jsonl"
    text = pairs.read_text()
    swapped = text.replace('"chosen"', '"x"').replace('"rejected"', '"chosen"')
    pairs.write_text(swapped.replace('"x"', '"rejected"'))
    assert "--dataset: other content" in refused(*flags)
    pairs.write_text(text)
    (path,) = (folder / "runs/toy/sae").rglob("params.npz")
    sae = folder / "sae" / path.relative_to(folder / "runs/toy/sae")
    sae.parent.mkdir(parents=True)
    arrays = dict(np.load(path))
    np.savez(sae, **{**arrays, "threshold": arrays["threshold"] + 1e-3})
    (folder / "runs/toy/sae").unlink()
    (folder / "runs/toy/sae").symlink_to(folder / "sae")
    assert "--sae: other content" in refused(*flags)
    weights = load_file(folder / "ref/model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, folder / "ref/model.safetensors", metadata={"format": "pt"})
    assert "--reference: other content" in refused(*flags)
    (path,) = (folder / "cut/state").glob("*/state.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": 3}))
    assert "written by 3 ranks" in refused(*flags)


def test_bad_state_is_refused(folder):
    flags = ["--out", "cut", "--save_every", "3", "--resume"]
    run_until(4, *flags)
    state = folder / "cut/state/step_00000003"
    for content in ((state / "rank_0.safetensors").read_bytes()[:-100], pickle.dumps(Evil())):
        (state / "rank_0.safetensors").write_bytes(content)
        assert "step_00000003: not a whole state" in refused(*flags)
    for text in ("", "{", "[]", '{"settings": 3, "step": 1}'):
        (state / "state.json").write_text(text)
        assert "step_00000003/state.json is not what a run writes" in refused(*flags)
    assert not (folder / "unpickled").exists()


def test_pickled_model_is_refused(folder):
    shutil.copytree(folder / "runs/toy/model", folder / "evil")
    (folder / "evil/model.safetensors").unlink()
    (folder / "evil/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert "evil" in refused("--model", "./evil") and not (folder / "unpickled").exists()


def test_a_run_that_begins_anew(folder, whole):
    """In the folder of one that came further, dead after its first state: not taken for the other."""
    run_until(4, "--lr", "1e-3", "--out", "cut", "--save_every", "4")
    run_until(3, "--out", "cut", "--save_every", "2")
    run("--out", "cut", "--save_every", "2", "--resume")
    assert bits_of("cut") == whole
    assert Path("cut/earlier_1/state/step_00000004/state.json").exists()


def test_a_resume_may_begin_to_score_the_kl(folder, capsys):
    """What was not scored at the start stands as NaN beside what is at the end."""
    run_until(3, "--out", "cut", "--save_every", "2")
    run("--out", "cut", "--resume", "--eval_kl")
    before, after = (json.loads(Path("cut/scores.json").read_text())[end] for end in ("before", "after"))
    assert re.search(r"kl_rejected +nan +\d", capsys.readouterr().out)
    assert "kl_rejected" not in before and after["kl_rejected"] > 0


def test_a_folder_s_files_are_one_run_s(folder):
    """A second run that dies on its way leaves no settings of its own beside the first one's model."""
    run("--out", "two", "--steps", "2")
    first = files("two")
    assert {Path(name).parts[1] for name in first} <= set(checkpoint.RUN_FILES)  # nothing else is written
    run_until(2, "--out", "two", "--steps", "3", "--beta", "0.7", "--save_every", "5")
    assert not Path("two/model").exists()  # that is to stand beside beta 0.7
    moved = {name.replace("/earlier_1", ""): content for name, content in files("two/earlier_1").items()}
    assert moved == first and eval_diversity.run_of("two/earlier_1/model")["beta"] == 0.1
    run("--out", "two", "--steps", "2", "--beta", "0.3")  # the dead one left its log alone
    assert eval_diversity.run_of("two/model")["beta"] == 0.3
    betas = [json.loads(Path(f"two/earlier_{n}/config.json").read_text())["beta"] for n in (1, 2)]
    assert betas == [0.1, 0.7] and len(Path("two/earlier_2/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("moves", range(6))
def test_killed_while_it_moves_an_earlier_run(tmp_path, monkeypatch, moves):
    """However far it came: at the next start all is in one folder, and no model is beside other settings."""
    out = tmp_path / "out"
    names = "earlier_1/model/a model/a state/step_1/a config.json metrics.jsonl scores.json"
    for name in names.split():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    there = {name: text for name, text in files(out).items() if "earlier" not in name}
    rename, left = Path.rename, [moves]

    def dies(path, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", dies)
        checkpoint.set_aside(out)
    assert moves == 0 or not (out / "model").exists()
    checkpoint.set_aside(out)
    checkpoint.set_aside(out)  # nothing is left to be moved
    assert sorted(path.name for path in out.iterdir()) == ["earlier_1", "earlier_2"]
    assert {name.replace("/earlier_2", ""): text for name, text in files(out / "earlier_2").items()} == there
    assert (out / "earlier_1/model/a").read_text() == "earlier_1/model/a"


# ---------------------------------------------------------------------------- the disk
def files(*folders):
    """{name: bytes} of all that lies in some folders."""
    found = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in found if "lock" not in path.name}


def test_too_little_disk_is_told_at_the_start(folder, monkeypatch):
    """By hand: Adam keeps 12 bytes a parameter, two states at once, and the model 4; RMSprop's states 8."""
    asked, free = [], shutil.disk_usage(folder)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or free)
    said = refused("--out", "cut")
    n = sum(p.numel() for p in fpo.Policy(Gemma2ForCausalLM.from_pretrained("runs/toy/model")).parameters())
    stored = 16 * 512 * (160 + 40)  # ids and values of both responses' features
    assert f"take up to {(28 * n + stored) / 1e9:.1f} GB, 0.0 are free" in said and "--save_every 0" in said
    config = settings.parse_args([*RUN, "--optimizer", "rmsprop", "--out", "cut"])
    policy = SimpleNamespace(dtype=torch.float32, parameters=lambda: [torch.empty(10**9, device="meta")])
    for save_every, need in ((1000, 2 * 8 + 4), (0, 4)):
        config.save_every = save_every
        with pytest.raises(UserError, match=f"up to {need + 1}.0 GB"):
            checkpoint.check_disk(config, policy, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free._replace(free=21 * 10**9))
    config.save_every = 1000
    checkpoint.check_disk(config, policy, 10**9)
    # The room of a state that is there is used again by a run that goes on, not by one that begins anew.
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free._replace(free=15 * 10**9))
    (folder / "cut/state/step_00000003").mkdir(parents=True)
    with open(folder / "cut/state/step_00000003/rank_0.safetensors", "wb") as file:
        file.truncate(6 * 10**9)
    with pytest.raises(UserError, match=r"up to 21\.0 GB, 15\.0 are free"):
        checkpoint.check_disk(config, policy, 10**9)
    config.resume = True
    checkpoint.check_disk(config, policy, 10**9)


def test_a_state_has_what_the_ranks_share_once(folder, fork):
    """With --shard none two ranks hold the same: 12 bytes a parameter are written, and read by both."""
    flags = [*RUN, "--shard", "none", "--save_every", "5", "--out"]
    fork(folder, ROOT / "train.py", *flags, "cut", ranks=2).finish()
    n = sum(tensor.numel() for tensor in load_file("cut/model/model.safetensors").values())
    first, second = (path.stat().st_size for path in sorted(Path("cut/state/step_00000005").glob("rank_*")))
    assert 12 * n < first < 12.2 * n and second < 1000
    whole = bits_of("cut")
    fork(folder, ROOT / "train.py", *flags, "cut", "--resume", ranks=2).finish()
    assert bits_of("cut") == whole


FULL = {  # at which function's call the disk is full, which call, bytes that a file still takes, which file
    "cache": (offline, "_write_shard", 2, 1000, "shard_00000"),
    "metrics": (train, "peak_memory_gb", 3, 0, "cut/metrics.jsonl"),
    "state": (train, "save_state", 2, 1000, "cut/state/step_00000004.tmp"),
    "model": (train, "save_model", 2, 1000, "cut/model.tmp"),
}


@pytest.mark.parametrize("what", FULL)
def test_full_disk(folder, monkeypatch, whole, what):
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
        assert named in refused("--out", "cut", "--save_every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    old = {name: content for name, content in before[-1].items() if "model.tmp" not in name}
    assert old.items() <= files("cut", "runs/toy/reference").items()
    monkeypatch.setattr(module, name, real)
    run("--out", "cut", "--save_every", "2", "--resume")
    assert bits_of("cut") == whole
    assert not (folder / "cut/model/weights").exists()


# ---------------------------------------------------------------------------- several ranks


RANKS = """
import json, os, sys
import fpo, runtime, settings, train
rank, calls = os.environ["RANK"], []

def poisoned(*args, **kwargs):  # rank 1 alone, in step 2, the third call
    loss, values = fpo.method_loss(*args, **kwargs)
    calls.append(1)
    return (loss * float("nan") if rank == "1" and len(calls) == 3 else loss), values

try:
    train.main(settings.parse_args(sys.argv[1:]), loss_function=poisoned)
except train.UserError as error:
    open(f"rank_{rank}.json", "w").write(json.dumps(str(error)))
"""


def test_two_ranks_decide_alike(folder, fork):
    """A NaN that rank 1 alone sees stops both, and they name the step and its pairs; step 1 is kept."""
    fork(folder, "-c", RANKS, *RUN, "--out", "stop", ranks=2).finish()
    a, b = (json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert a == b and re.match(r"step 2: .*not finite; .* pairs \[\d+(, \d+){15}\]", a)
    assert [path.name for path in checkpoint.saved_states(folder / "stop")] == ["step_00000001"]
