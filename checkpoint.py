"""A run's state: saved whole, found, compared with what resumes it, put back bit for bit; signals."""

import itertools
import json
import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import runtime
import scale
from runtime import UserError, refuse

# Settings that a resumed run may change: they do not change what is learned.
MAY_CHANGE_ON_RESUME = {
    "resume",
    "save_every",
    "out",
    "cache_dir",
    "eval_every",
    "eval_kl",
    "show",
    "report_to",
}


# What a run writes into its folder, the model first.
RUN_FILES = ("model", "config.json", "metrics.jsonl", "scores.json", "samples.json", "state", "tensorboard")


def state_tensors(policy, optimizer) -> dict[str, torch.Tensor]:
    """This rank's weights and optimizer states by parameter name; of what is sharded its shards."""
    inner, tensors = getattr(optimizer, "optim", optimizer), dict[str, torch.Tensor]()
    updated = {id(p) for group in inner.param_groups for p in group["params"]}  # by this rank
    for name, parameter in policy.named_parameters():
        tensors[f"weight/{name}"] = scale.local(parameter).detach()
        if id(parameter) in updated:  # with --shard states each rank updates a part
            tensors |= {f"{key}/{name}": tensor for key, tensor in inner.state_of(parameter).items()}
    return tensors


def save_state(out, step: int, policy, optimizer, meta: dict):
    """Write OUT/state/step_N: state.json and a file a rank; aside, then renamed; then the older one goes."""
    rank, world = runtime.ranks()
    aside, final = out / f"state/step_{step:08d}.tmp", out / f"state/step_{step:08d}"
    if rank == 0:
        for left in (out / "state").glob("step_*.tmp"):  # of a run that died while it wrote
            shutil.rmtree(left)
        aside.mkdir(parents=True)
    runtime.barrier()
    # What is not sharded is the same on every rank, so rank 0 alone writes it: with --shard states the
    # weights, with `none` the optimizer's states too.
    weights_sharded = isinstance(next(policy.parameters()), DTensor)
    states_sharded = weights_sharded or hasattr(optimizer, "optim")
    mine = {
        name: tensor.contiguous()
        for name, tensor in state_tensors(policy, optimizer).items()
        if rank == 0 or (weights_sharded if name.startswith("weight/") else states_sharded)
    }
    with runtime.writing(aside):
        # safetensors cannot reopen a file that has neither tensors nor metadata, so always write metadata.
        save_file(mine, aside / f"rank_{rank}.safetensors", metadata={"rank": str(rank)})
    runtime.barrier()
    if rank == 0:
        runtime.write_json(aside / "state.json", {"step": step, "ranks": world, **meta})
        os.sync()  # the disk has all of it before it gets its name
        aside.rename(final)
        for old in saved_states(out)[:-1]:
            shutil.rmtree(old)
    runtime.barrier()


def check_disk(config, policy, cache_bytes: int):
    """UserError where the free disk is less than a run will write: two states, the model and Phase 1's cache.

    A state has 12 bytes a parameter (Adam) or 8 (RMSprop); one exists while the next is written. cache_bytes:
    the most that Phase 1 can write.
    """
    out, cache = Path(config.out).absolute(), Path(config.cache_dir).absolute()
    # ---- bytes that each folder will take
    n, width = sum(p.numel() for p in policy.parameters()), torch.finfo(policy.dtype).bits // 8
    states = 2 * n * {"adam": 12, "rmsprop": 8}[config.optimizer] if config.save_every else 0
    kept = saved_states(out) if config.resume else []  # whose room is used again; else they are set aside
    there = sum(file.stat().st_size for state in kept for file in state.iterdir())
    needs = {"--out": (out, max(0, states - there) + n * width), "--cache_dir": (cache, cache_bytes)}
    # ---- and that the disk has under it, or under the nearest folder that is there
    places = {name: next(p for p in (path, *path.parents) if p.exists()) for name, (path, _) in needs.items()}
    for name, place in places.items():  # what goes to the same disk adds up
        disk = [other for other in places if places[other].stat().st_dev == place.stat().st_dev]
        need, free = sum(needs[other][1] for other in disk), shutil.disk_usage(place).free
        if need > free:
            what = f"{' and '.join(disk)} take up to {need / 1e9:.1f} GB, {free / 1e9:.1f} are free"
            refuse(f"{name} {needs[name][0]}: {what}; --save_every 0 saves no states but on a signal")


def saved_states(out) -> list[Path]:
    """Whole states of a run, oldest first; what was being written when a run died is not among them."""
    return sorted(path for path in Path(out, "state").glob("step_*") if path.suffix != ".tmp")


def read_meta(config, input_digests=None) -> dict:
    """state.json of the last state. UserError where this run does not continue it: each difference is named.

    input_digests: digests of the tokens, SAEs, template and weights, by the flag that names them.
    """
    path = saved_states(config.out)[-1] / "state.json"
    try:
        meta = json.loads(path.read_text())
        settings, before, ranks = meta["settings"], meta["input_digests"], meta["ranks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {path} is not what a run writes: {error!r}") from None
    # ---- every difference is named, not the first alone
    now = json.loads(json.dumps(asdict(config))).items()
    odd = [
        f"--{n} was {settings.get(n)}, is {v}"
        for n, v in now
        if n not in MAY_CHANGE_ON_RESUME and settings.get(n) != v
    ]
    odd += [
        f"--{n}: other content than before" for n, v in (input_digests or {}).items() if before.get(n) != v
    ]
    odd += [f"written by {ranks} ranks, here are {runtime.ranks()[1]}"] if ranks != runtime.ranks()[1] else []
    if odd:
        refuse(f"--resume {path.parent}: {'; '.join(odd)}; a run goes on only as it began")
    return meta


def load_state(out, policy, optimizer):
    """Put the last state's weights and optimizer states in, bit for bit. UserError for a damaged state."""
    folder, rank = saved_states(out)[-1], runtime.ranks()[0]
    try:
        files = [safe_open(folder / f"rank_{r}.safetensors", "pt") for r in sorted({0, rank}, reverse=True)]
        with torch.no_grad():
            for name, tensor in state_tensors(policy, optimizer).items():  # own file first, else rank 0's
                file = next(file for file in files if name in file.keys())  # noqa: SIM118
                tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError, StopIteration, RuntimeError) as error:
        text = f"--resume {folder}: not a whole state of this model: {error}"
        raise UserError(text) from None


def set_aside(out):
    """Move what an earlier run left in OUT to OUT/earlier_N, all of it: a folder's files are one run's.

    The model goes first, and the folder gets its number last: killed in between, it is moved on at the next
    start, and no model is left beside settings that are not its own.
    """
    out, aside = Path(out), Path(out, "earlier.tmp")
    log = out / "metrics.jsonl"
    there = [(out / name).exists() for name in ("model", "state", "scores.json")]
    if not (aside.exists() or any(there) or (log.exists() and log.stat().st_size)):
        return  # nothing that a new run would not write over
    with runtime.writing(aside, keep=True):
        aside.mkdir(exist_ok=True)
        for name in RUN_FILES:
            if (out / name).exists():
                (out / name).rename(aside / name)
        free = (out / f"earlier_{n}" for n in itertools.count(1))
        aside.rename(next(path for path in free if not path.exists()))


def cut_metrics(path, step: int):
    """Keep metrics.jsonl's lines up to `step`: none lost, none doubled. A kill may have cut the last one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = (line for line in lines if line.endswith("\n"))
    runtime.write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


class StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to save and leave at the step's end. A second one kills.

    But not within GRACE seconds: a scheduler may signal every process, and torchrun passes its own on.
    """

    GRACE = 2.0

    def __init__(self):
        self.came = 0.0  # when, by the monotonic clock
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number, frame):
        """A handler: the loop reads `came`."""
        if self.came and time.monotonic() - self.came > self.GRACE:
            self.restore()
            signal.raise_signal(number)
        self.came = self.came or time.monotonic()

    def restore(self):
        """Put the former handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
