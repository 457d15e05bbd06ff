"""Real torchrun: restarts, three ranks, two agents as on two machines. `pytest -m kill` runs them."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import ROOT, finish, lines_of, start
from test_resume import RUN, bits_of, losses_of

pytestmark = [pytest.mark.kill, pytest.mark.usefixtures("one_thread")]


def torchrun(folder, *words, ranks=2, options=()):
    return start(folder, ROOT / "train.py", *RUN, *words, ranks=ranks, options=options)


def ranks_of(process) -> list[int]:
    """Process ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def kill_rank(process, rank, run, after):
    """kill -9 of a rank once the run has logged so many steps."""
    while len(lines_of(run)) < after:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.005)
    wanted = f"\0RANK={rank}\0"
    (victim,) = (pid for pid in ranks_of(process) if wanted in Path(f"/proc/{pid}/environ").read_text())
    os.kill(victim, signal.SIGKILL)


def test_restarted_by_torchrun(folder):
    """torchrun --max_restarts 1, --save_every, --resume: a kill -9 changes no bit of what comes out."""
    finish(torchrun(folder, "--steps", "60", "--out", "whole"))
    flags = ["--steps", "60", "--out", "cut", "--save_every", "5", "--resume"]
    process = torchrun(folder, *flags, options=["--standalone", "--max_restarts", "1"])
    kill_rank(process, 1, "cut", after=7)
    finish(process)
    assert bits_of("cut") == bits_of("whole")


def test_three_ranks_resume(folder):
    """Three ranks, killed after step 4 of 6 and resumed from step 3: the same bits."""
    finish(torchrun(folder, "--out", "whole", ranks=3))
    process = torchrun(folder, "--out", "cut", "--save_every", "3", ranks=3)
    kill_rank(process, 2, "cut", after=4)
    process.communicate(timeout=120)
    finish(torchrun(folder, "--out", "cut", "--save_every", "3", "--resume", ranks=3))
    assert bits_of("cut") == bits_of("whole")


def test_two_agents(folder):
    """Two torchruns of one rank each, as on two machines: the losses of one torchrun with two ranks."""
    finish(torchrun(folder, "--out", "one"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    options = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", place]
    agents = [torchrun(folder, "--out", "two", ranks=1, options=options) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert losses_of("two") == pytest.approx(losses_of("one"), rel=1e-6)
