"""Phase 1's cache: what becomes of broken shards, and of two processes that build one."""

import pickle
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import Evil, build, make_lm, make_pairs, make_sae
from safetensors.torch import save_file

import batches
import fpo
import offline
from runtime import lock_folder, run_script

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A small cache of three shards: how to build it, or find it again."""
    monkeypatch.setattr(offline, "SHARD", 4)
    pairs, policy = make_pairs(10), fpo.Policy(make_lm(), [make_sae()], [(1, "res")])
    return lambda: build(policy, pairs, tmp_path / "cache")


def content(cache):
    statistics = cache.lookup(torch.arange(10))
    return torch.cat([statistics.logps[:, None], statistics.features[0]], 1)


def flip(path):
    """Change one bit of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])


FAULTS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
    "no note": lambda path: path.with_suffix(".sha256").unlink(),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "another cache's": lambda path: save_file({"logps": torch.zeros(4, 2)}, path),
    "manifest": lambda path: (path.parent / "manifest.json").write_text('{"pairs": 3}'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_shards(cache, fault, tmp_path):
    """The broken shard alone is made again, and holds what it held."""
    first = cache()
    before, shards = content(first), sorted(first.folder.glob("shard_*.safetensors"))
    times = [path.stat().st_mtime_ns for path in shards]
    FAULTS[fault](shards[1])
    again = cache()
    assert torch.equal(content(again), before) and again.folder == first.folder
    now = [path.stat().st_mtime_ns for path in shards]
    assert now[0] == times[0] and now[2] == times[2] and (now[1] != times[1] or fault == "manifest")
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_shard_that_goes_during_a_run(cache, monkeypatch, capsys, loaders):
    """It is named in one line at its first look-up, on whatever rank, also where another process makes the
    batches (as on a card); the next start makes it anew.
    """
    found = cache()
    (found.folder / "shard_00002.tmp").write_text("of a process that died while it wrote")
    before = content(cache())
    assert not list(found.folder.glob("*.tmp"))
    FAULTS["cut"](found.folder / "shard_00001.safetensors")
    monkeypatch.setitem(batches.LOADERS, "cpu", loaders)
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        made = batches.stream(make_pairs(10), [[9], [5]], device="cpu", lookup=found.lookup)
        run_script(lambda: list(made))
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(r"error \(rank 1\): .*shard_00001\.safetensors: .*start again to make it anew", said)
    assert torch.equal(content(cache()), before)


def test_two_processes_one_cache(cache, capfd):
    """The second waits for the first, says so, and finds its shards."""
    folder, results = cache().folder, []
    for shard in folder.glob("shard_*"):
        shard.unlink()
    with lock_folder(folder):
        waiting = threading.Thread(target=lambda: results.append(content(cache())))
        waiting.start()
        time.sleep(0.5)
        assert not results and "waiting" in capfd.readouterr().out
    waiting.join(timeout=60)
    assert torch.equal(results[0], content(cache()))
