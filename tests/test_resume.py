"""Faults: runs that are killed, stopped, poisoned or lied to. The rest of the table: test_faults.py.

| fault | what happens | test |
|---|---|---|
| kill -9 of any rank, at any moment | resumes to the same bits | test_killed_at_any_moment |
| a second run in a run's folder | refused, writes nothing | test_two_runs_in_one_folder |
| SIGTERM, SIGINT | saves at the step's end, status 0, same bits | test_sigterm_saves_and_leaves |
| resume with other ranks | the same losses | test_resume_with_another_number_of_ranks |
| resume with other settings or reference | refused, each named | test_resume_refuses_another_run |
| a state that is cut short, or a pickle | refused, named; no code runs | test_bad_state_is_refused |
| a shard cut, flipped, missing, a pickle | it alone is made again | test_broken_shards |
| a byte flips between start and use | stops, named; made again next | test_byte_flips_after_the_start |
| a manifest that is no manifest | the cache is made again | test_broken_manifest |
| two processes build one cache | the second waits, both are whole | test_two_processes_one_cache |
| a place that can't be written | one line, status 2 | test_cache_dir_that_cannot_be_written |
| loss or gradient not finite | stop, or skip the step; never saved | test_not_finite_is_skipped |
| a model saved as a pickle | refused | test_pickled_model_is_refused |

Of 100 starts of the soak (pytest -m soak -s; 8 min 34 s, 2 cores) 89 were killed alive: 20 while caching, 20
training, 20 saving, 14 resuming, 15 anywhere. Each time the run came to its end, it had the bits of one that
was never interrupted.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_lm, make_pairs, make_sae

import fpo
import offline
import train

ROOT = Path(__file__).parent.parent
RUN = ["--preset", "toy", "--method", "fpo", "--steps", "6", "--warmup_steps", "2", "--eval_every", "0"]
RUN += ["--eval_samples", "0", "--no-eval_kl", "--batch_size", "16"]


class Evil:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def steps_of(run):
    """Steps of the whole lines of a run's metrics so far."""
    path = Path(run) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]


def losses_of(run):
    return [json.loads(line)["loss"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def drop_last_state(run):
    states = sorted((Path(run) / "state").glob("step_*"))
    shutil.rmtree(states[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_resume_is_bit_identical(folder, dtype, optimizer):
    """Uninterrupted, and left after step 3 of 6: the same bits; no metrics line lost or doubled."""
    flags = [*RUN, "--dtype", dtype, "--optimizer", optimizer]
    train.main([*flags, "--out", "whole"])
    train.main([*flags, "--out", "cut", "--save_every", "3", "--keep", "2"])
    drop_last_state("cut")
    (folder / "cut/metrics.jsonl").write_text((folder / "cut/metrics.jsonl").read_text()[:-20])  # a cut line
    train.main([*flags, "--out", "cut", "--resume", "--micro_batch_pairs", "0"])
    assert sha("cut/model/model.safetensors") == sha("whole/model/model.safetensors")
    assert steps_of("cut") == [1, 2, 3, 4, 5, 6] and losses_of("cut") == losses_of("whole")


def launch(folder, *flags, ranks=2):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [*start, ROOT / "train.py", *RUN, *flags], cwd=folder, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process, limit=240):
    out, _ = process.communicate(timeout=limit)
    assert process.returncode == 0, out[-3000:]
    return out


def ranks_of(process) -> list[int]:
    """Process ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


MOMENTS = ("caching", "training", "saving", "resuming", "anywhere")


def wait_for(moment, process, folder, rng):
    """Return when the run is at the moment to kill it at, or has ended."""
    run, cache = folder / "cut", folder / "runs/toy/reference"
    shards, steps = len(list(cache.rglob("shard_*.safetensors"))), len(steps_of(run))
    began, delay = time.time(), rng.uniform(0.5, 9)
    while process.poll() is None:
        made = len(list(cache.rglob("shard_*.safetensors")))
        if moment == "caching" and (made > shards or list(cache.rglob("*.tmp"))):
            return
        if moment == "training" and len(steps_of(run)) > steps:
            time.sleep(rng.uniform(0, 0.3))
            return
        if moment == "saving" and list((run / "state").glob("*.tmp")):
            return
        if moment in ("resuming", "anywhere") and time.time() - began > delay:
            return
        time.sleep(0.002)


def same_as_whole(folder):
    """The run that was killed has the uninterrupted one's bits, and each of its lines once."""
    run, whole = folder / "cut", folder / "whole"
    assert sha(run / "model/model.safetensors") == sha(whole / "model/model.safetensors")
    assert steps_of(run) == [1, 2, 3, 4, 5, 6] and losses_of(run) == losses_of(whole)


def kill_and_resume(folder, moments, seed):
    """Kill a run at each moment and resume it; whenever it ends, it ends as an uninterrupted one. The log."""
    finish(launch(folder, "--out", "whole", "--cache_dir", "other"))
    rng, log = random.Random(seed), []
    for moment in moments:
        if moment == "caching":  # the next start has a cache to make
            for shard in list((folder / "runs/toy/reference").rglob("shard_*"))[::2]:
                shard.unlink()
        process = launch(folder, "--out", "cut", "--save_every", "1", "--resume", "auto")
        wait_for(moment, process, folder, rng)
        ranks = ranks_of(process)
        victim = rng.choice([*ranks, process.pid]) if ranks else process.pid
        done = process.poll() is not None
        if not done:
            os.kill(victim, signal.SIGKILL)
            for rank in ranks if victim == process.pid else ():  # torchrun's ranks outlive it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
        who = (
            "ended before" if done else "torchrun" if victim == process.pid else f"rank {ranks.index(victim)}"
        )
        log.append(f"{moment}: {who}, after step {len(steps_of(folder / 'cut'))}")
        print(len(log), log[-1], flush=True)
        if done:
            assert process.returncode == 0, out[-3000:]
        if (folder / "cut/scores.json").exists():  # all six steps are behind it: begin again
            same_as_whole(folder)
            shutil.rmtree(folder / "cut")
    finish(launch(folder, "--out", "cut", "--save_every", "1", "--resume", "auto"))
    same_as_whole(folder)
    return log


def test_killed_at_any_moment(folder):
    kill_and_resume(folder, MOMENTS, seed=0)


def test_two_runs_in_one_folder(folder, capfd):
    """While a process holds a run's folder another is refused and writes nothing; then it goes on."""
    code = "import resume, sys; lock = resume.hold('run'); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
    where = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", code], env=where, **pipes)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as error:
        train.main([*RUN, "--out", "run"])
    assert error.value.code == 2 and "--out run: another run writes there" in capfd.readouterr().err
    assert [path.name for path in (folder / "run").iterdir()] == ["lock"]
    other.kill()
    other.wait()
    train.main([*RUN, "--out", "run"])
    assert steps_of("run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.kill
def test_killed_twenty_times(folder):
    kill_and_resume(folder, MOMENTS * 4, seed=1)


@pytest.mark.soak
def test_killed_a_hundred_times(folder):
    """At least three of the kills that struck a living run at each moment: pytest -m soak -s."""
    log = kill_and_resume(folder, MOMENTS * 20, seed=2)
    struck = [line.split(":")[0] for line in log if "ended before" not in line]
    assert len(struck) >= 80 and all(struck.count(moment) >= 3 for moment in MOMENTS), log


@pytest.mark.parametrize("loaders", [0, 1])
def test_sigterm_saves_and_leaves(folder, loaders):
    """SIGTERM to a rank's whole group, as torchrun sends it, the process that makes batches included (CUDA's
    only): status 0, a state; --resume auto ends with the same bits.
    """
    train.main([*RUN, "--out", "whole"])
    code = f"import sys, fpo, train; fpo.LOADERS['cpu'] = {loaders}; sys.exit(train.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *RUN, "--out", "cut", "--resume", "auto"], cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not (folder / "cut/metrics.jsonl").exists() or not steps_of("cut"):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "go on with --resume auto" in out, out
    assert 0 < len(steps_of("cut")) < 6 and not (folder / "cut/model").exists()
    train.main([*RUN, "--out", "cut", "--resume", "auto"])
    assert sha("cut/model/model.safetensors") == sha("whole/model/model.safetensors")


@pytest.mark.parametrize("shard", ["states", "none"])
def test_resume_with_another_number_of_ranks(folder, shard):
    """Saved by two ranks, with sharded states or with all of them on both, resumed by one."""
    finish(launch(folder, "--out", "cut", "--save_every", "3", "--keep", "9", "--shard", shard))
    whole = losses_of("cut")
    drop_last_state("cut")
    train.main([*RUN, "--out", "cut", "--resume", "--shard", shard])
    assert steps_of("cut") == [1, 2, 3, 4, 5, 6]
    assert losses_of("cut") == pytest.approx(whole, rel=1e-4)


def stopped(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")][-1]


def test_resume_refuses_another_run(folder, capsys):
    train.main([*RUN, "--out", "cut", "--save_every", "3"])
    said = stopped([*RUN, "--out", "cut", "--resume", "--lr", "1e-5", "--alpha", "3"], capsys)
    assert (
        "--lr was 0.0" in said
        and "is 1e-05" in said
        and "--alpha was 0.5, is 3.0" in said
        and "--force" in said
    )
    assert "no state" in stopped([*RUN, "--out", "elsewhere", "--resume"], capsys)
    # Another reference in the same place: the model was trained against something else.
    target = folder / "runs/toy/model/model.safetensors"
    copy = folder / "copy"
    subprocess.run(["cp", "-rL", folder / "runs/toy/model", copy], check=True)
    from safetensors.torch import load_file, save_file

    weights = load_file(target)
    weights["model.norm.weight"] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    (folder / "runs/toy/model").unlink()
    copy.rename(folder / "runs/toy/model")
    assert "another reference" in stopped([*RUN, "--out", "cut", "--resume"], capsys)


def test_bad_state_is_refused(folder, capsys):
    train.main([*RUN, "--out", "cut", "--save_every", "6"])
    state = folder / "cut/state/step_00000006/rank_0.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-100])
    assert "rank_0.safetensors" in stopped([*RUN, "--out", "cut", "--resume"], capsys)
    state.write_bytes(pickle.dumps(Evil()))
    assert "rank_0.safetensors" in stopped([*RUN, "--out", "cut", "--resume"], capsys)
    assert not (folder / "unpickled").exists()


def test_pickled_model_is_refused(folder, capsys):
    subprocess.run(["cp", "-rL", folder / "runs/toy/model", folder / "evil"], check=True)
    (folder / "evil/model.safetensors").unlink()
    (folder / "evil/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert "evil" in stopped([*RUN, "--model", "./evil"], capsys)
    assert not (folder / "unpickled").exists()


def test_not_finite_is_skipped(folder, monkeypatch):
    """--on_nan skip: the step is left out and named, the run ends, its weights are finite."""
    loss, calls = train.fpo.method_loss, []

    def poisoned(*args, **kwargs):
        value, extra = loss(*args, **kwargs)
        calls.append(1)
        return (value * torch.nan if len(calls) == 2 else value), extra

    monkeypatch.setattr(train.fpo, "method_loss", poisoned)
    train.main([*RUN, "--out", "skip", "--on_nan", "skip", "--micro_batch_pairs", "16"])
    lines = [json.loads(line) for line in (folder / "skip/metrics.jsonl").read_text().splitlines()]
    assert "not finite" in lines[1]["skipped"] and "loss" not in lines[1] and lines[5]["loss"] > 0
    from safetensors.torch import load_file

    assert all(t.isfinite().all() for t in load_file(folder / "skip/model/model.safetensors").values())


# ---- the cache
@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A small cache of three shards, and how to build or find it again."""
    monkeypatch.setattr(offline, "SHARD", 4)
    pairs, policy = make_pairs(10), fpo.Policy(make_lm(), [make_sae()], [(1, "res")])
    identity = offline.reference_identity(
        policy, pairs, weights=offline.digest(policy.lm.state_dict()), arithmetic={"layout": "separate"}
    )
    return lambda: offline.build_reference(
        policy, pairs, tmp_path / "cache", identity, max_pairs=3, layout="separate"
    )


def content(cache):
    statistics = cache.lookup(torch.arange(10))
    return torch.cat([statistics.logps[:, None], statistics.features[0]], 1)


FAULTS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "flipped": lambda path: path.write_bytes((b := path.read_bytes())[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
    "missing": lambda path: path.unlink(),
    "no note": lambda path: path.with_suffix(".json").unlink(),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_shards(cache, fault, tmp_path, monkeypatch):
    """Detected at the start; that shard alone is made again."""
    monkeypatch.chdir(tmp_path)
    whole = cache()
    expected, folder = content(whole), whole.folder
    paths = sorted(folder.glob("shard_*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in paths}
    time.sleep(0.01)
    FAULTS[fault](paths[1])
    again = cache()
    assert again.folder == folder and torch.equal(content(again), expected)
    assert [path.stat().st_mtime_ns == times[path] for path in paths] == [True, False, True]
    assert not (tmp_path / "unpickled").exists()


def test_shard_of_another_cache(cache):
    """A whole file in the wrong place: not taken for this cache's."""
    whole = cache()
    expected, folder = content(whole), whole.folder
    path = folder / "shard_00000.safetensors"
    offline.save_file({"logps": torch.zeros(4, 2)}, path, metadata={"cache": "other"})
    stat = path.stat()
    note = {"sha256": offline._checksum(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    offline.write_json(path.with_suffix(".json"), note)
    assert torch.equal(content(cache()), expected)


def test_byte_flips_after_the_start(cache):
    """Same size and time, so the start does not see it: the lookup does, and the next start mends it."""
    whole = cache()
    expected, path = content(whole), whole.folder / "shard_00001.safetensors"
    stat = path.stat()
    FAULTS["flipped"](path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    started = cache()
    with pytest.raises(OSError, match="shard_00001"):
        started.lookup(torch.tensor([5]))
    assert torch.equal(content(cache()), expected)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": {"version": 0}, "pairs": 3, "shard": 4}'])
def test_broken_manifest(cache, text):
    expected = content(whole := cache())
    (whole.folder / "manifest.json").write_text(text)
    assert torch.equal(content(cache()), expected)


def test_two_processes_one_cache(cache, capfd):
    """The second waits for the lock, then finds everything made."""
    whole = cache()
    expected = content(whole)
    for path in whole.folder.glob("shard_*"):
        path.unlink()
    held = open(whole.folder / "lock", "w")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX)
    result = []
    second = threading.Thread(target=lambda: result.append(cache()))
    second.start()
    time.sleep(0.3)
    assert second.is_alive() and not list(whole.folder.glob("shard_*")), (
        "it builds while another holds the lock"
    )
    held.close()
    second.join(30)
    assert torch.equal(content(result[0]), expected) and "waiting" in capfd.readouterr().out


def test_cache_dir_that_cannot_be_written(folder, capsys):
    (folder / "file").write_text("")
    assert "file" in stopped([*RUN, "--cache_dir", "file/cache"], capsys)
