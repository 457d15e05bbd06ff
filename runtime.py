"""Processes and files: nothing of FPO. Ranks, folders held alone, files written whole, errors of one line."""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging as transformers_logging


# ---------------------------------------------------------------------------- errors
class UserError(ValueError):
    """What the user can mend: a wrong value, file, record or disk."""


LESS_MEMORY = "a lower --micro_batch_tokens or --max_length, or --shard fsdp on several cards, takes less"


def refuse(message):
    """Raise UserError."""
    raise UserError(message)


def run_script(main):
    """Run a script's main(). A UserError ends it with one line on stderr and status 2: no traceback.

    So does a full card, wherever it is met. Every rank says its own, with its number: none can know whether
    another one fails too.
    """
    try:
        main()
    except (UserError, torch.OutOfMemoryError) as error:
        told = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            told = f"the card's memory is full ({told:.150}); {LESS_MEMORY}"
        rank = os.environ.get("RANK")  # of torchrun: the processes may not have joined yet
        tqdm.write(f"error: {told}" if rank is None else f"error (rank {rank}): {told}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def hub_errors(what: str, name: str):
    """Turn the libraries' many errors about a model, tokenizer or data set into a UserError of one line."""
    try:
        yield
    except Exception as error:
        # The libraries say what to do (accept a licence, log in), in several lines, or in the cause.
        told = " ".join(f"{error} {error.__cause__ or ''}".split())[:400] or type(error).__name__
        if not os.path.exists(name) and (name.startswith((".", "/", "runs/")) or name.count("/") > 1):
            told = "no such file or folder, and a hub name is OWNER/NAME"
        raise UserError(f"{what} {name!r} can't be loaded: {told}") from error


# ---------------------------------------------------------------------------- ranks
def ranks() -> tuple[int, int]:
    """(this process's rank, how many there are); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def start_processes() -> torch.device:
    """Join torchrun's other processes, by gloo, on CUDA nccl; alone without it. Returns the rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    transformers_logging.disable_progress_bar()  # bars of half a second, one a rank
    if cuda:
        torch.cuda.set_device(device)
        torch._dynamo.config.recompile_limit = 64  # flex_attention: past it shapes run unfused, in silence
    if "RANK" in os.environ and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one torchrun, which may start its ranks again:
            # they would find the dead ones' addresses in the store that it keeps (pytorch/pytorch#135712)
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        options = {"store": store, "rank": rank, "world_size": world, "device_id": device if cuda else None}
        patience = timedelta(hours=2)  # a rank may wait for a download, a slow disk, another run's cache
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, **options)
    return device


# ---------------------------------------------------------------------------- files
@contextlib.contextmanager
def writing(path, keep: bool = False):
    """Turn a failed write into a UserError that names the path.

    Unless `keep`, what was begun is removed: it may fill the disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            if not keep:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        raise UserError(f"{path}: {error}") from error


def write_text(path, text: str):
    """Write a file aside and rename it: a reader sees the old one or the new one."""
    aside = Path(f"{path}.{os.getpid()}.tmp")
    with writing(aside):
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
    aside.replace(path)


def write_json(path, value):
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def file_digest(path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_folder(folder, wait: bool = False):
    """Hold a folder alone, until the returned lock is released (it is a context) or the process ends.

    Where another process holds it (a killed torchrun leaves its ranks at work): `wait`, or a UserError.
    """
    with writing(folder, keep=True):
        Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / "lock", is_singleton=True)  # of one process: runs may follow each other
    with writing(lock.lock_file, keep=True), contextlib.suppress(Timeout):  # it may be another user's
        return lock.acquire(timeout=0)  # the system takes it back from a process that dies
    if not wait:
        raise UserError(f"{folder}: another process writes there; end it, or go elsewhere")
    print(f"{folder}: another process works there; waiting for it", flush=True)
    return lock.acquire()


def check_output(flag: str, path, *, folder: bool):
    """UserError where nothing can be written at `path`: before the work, not after it."""
    place = Path(path).absolute()
    there = next(p for p in ([place] if folder else []) + list(place.parents) if p.exists())
    if (place.is_dir() and not folder) or not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--{flag} {path}: no {'folder' if folder else 'file'} can be written there")


def made_by() -> dict:
    """What a file of results says of its making: command, commit (+ where files differ from it), hardware."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
    commit, here = "", Path(__file__).parent
    if shutil.which("git"):
        commit = subprocess.run(words, capture_output=True, text=True, cwd=here).stdout.strip()
    cards = torch.cuda.device_count()
    hardware = f"{cards} × {torch.cuda.get_device_name()}" if cards else f"{os.cpu_count()} CPU cores"
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return {"command": command, "commit": commit or "unknown", "hardware": hardware}
