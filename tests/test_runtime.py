"""runtime.py: files written whole, folders held alone, errors of one line; one rank tokenises for all."""

import json
import subprocess
import sys
import threading
import unittest.mock
from pathlib import Path

import pytest
import torch
from families import GEMMA_IT, GOOD, write

import batches
import data
import runtime
from data import load_pairs
from runtime import UserError


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "new/a.json"
    runtime.write_json(path, {"π": 1})
    assert json.loads(path.read_text()) == {"π": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(UserError, match=r"new/a\.json/b"):
        runtime.write_text(path / "b", "text")
    for keep in (False, True):
        with pytest.raises(UserError, match="half: disk full"), runtime.writing(tmp_path / "half", keep=keep):
            (tmp_path / "half").write_text("be")
            raise OSError("disk full")
        assert (tmp_path / "half").exists() == keep


HOLDER = "import filelock, sys; _ = filelock.FileLock(sys.argv[1]).acquire(); print(1, flush=True); input()"


def test_a_folder_is_held_by_one_process(tmp_path, capsys):
    with runtime.lock_folder(tmp_path), runtime.lock_folder(tmp_path):  # a process may hold it again
        pass
    words = [sys.executable, "-c", HOLDER, tmp_path / "lock"]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "1\n"
    (watchdog := threading.Timer(20, other.kill)).start()  # who waits here would wait for ever
    with pytest.raises(UserError, match="another process writes there"):
        runtime.lock_folder(tmp_path)
    watchdog.cancel()
    released = []
    threading.Timer(0.3, lambda: released.append(True) or other.communicate("\n")).start()
    with runtime.lock_folder(tmp_path, wait=True) as lock:
        assert released and lock.is_locked and other.wait(10) == 0
        assert "another process works there; waiting" in capsys.readouterr().out


def test_outputs_are_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    runtime.check_output("out", tmp_path / "a/b", folder=True)
    runtime.check_output("json", tmp_path / "file", folder=False)
    for path, folder in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file/a", True)):
        with pytest.raises(UserError, match=r"--out .* can be written there"):
            runtime.check_output("out", path, folder=folder)


def test_an_error_is_one_line(monkeypatch, capsys):
    """Of every rank, with its number where there are several: another one may know of none."""
    monkeypatch.delenv("RANK", raising=False)
    for rank, said in (None, "error: no"), (0, "error (rank 0): no"), (1, "error (rank 1): no"):
        if rank is not None:
            monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as end:
            runtime.run_script(unittest.mock.Mock(side_effect=UserError("no")))
        assert end.value.code == 2 and capsys.readouterr().err.strip() == said


FAILS = """
import sys
import batches, data, runtime
batches.LOADERS["cpu"] = 1

def lookup(index):
    raise {"user": runtime.UserError, "other": RuntimeError}[sys.argv[1]]("no")

pairs = data.Pairs([([2, 3], [4], [5])])
runtime.run_script(lambda: list(batches.stream(pairs, [[0]] * 50, device="cpu", lookup=lookup)))
"""


@pytest.mark.parametrize("kind, status, last", [("user", 2, "error: no"), ("other", 1, "RuntimeError: no")])
def test_an_error_where_batches_are_made_ends_the_rank(kind, status, last):
    """As on a card, in another process: a rank that stayed for it would keep the others waiting for hours."""
    words = [sys.executable, "-c", FAILS, kind]
    folder = Path(data.__file__).parent
    ended = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=folder)
    said = ended.stderr.strip().splitlines()
    assert ended.returncode == status and said[-1] == last and (status == 1 or len(said) == 1)


def test_the_library_s_errors_name_what_failed():
    message = "model 'owner/name' can't be loaded: outer inner words"
    with pytest.raises(UserError, match=message), runtime.hub_errors("model", "owner/name"):
        raise OSError("outer\n inner") from ValueError("words")


def in_two_ranks(rank, folder):
    """One rank tokenises, the other finds it; both raise an error; numbers of batches are made equal."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    encode, calls = data.encode, []
    data.encode = lambda *args, **options: calls.append(0) or encode(*args, **options)
    pairs = load_pairs(f"{folder}/data.jsonl", GEMMA_IT)
    assert runtime.ranks() == (rank, 2)
    with pytest.raises(UserError, match="0 usable records"):
        load_pairs(f"{folder}/bad.jsonl", GEMMA_IT)
    assert batches.lockstep([[0]] * (1 + rank), "cpu") == [[[0], []], [[0], [0]]][rank]
    Path(f"{folder}/rank_{rank}").write_text(json.dumps([pairs.digest(), len(calls)]))


def test_one_rank_tokenises_for_all(tmp_path):
    write(tmp_path / "data.jsonl", GOOD, {**GOOD, "chosen": "no"}, {"prompt": "a"})
    write(tmp_path / "bad.jsonl", {"prompt": "a"})
    torch.multiprocessing.start_processes(in_two_ranks, (tmp_path,), nprocs=2, start_method="forkserver")
    (digest, calls), (other, more) = (json.loads((tmp_path / f"rank_{i}").read_text()) for i in (0, 1))
    assert digest == other and calls + more == 3 + 1
