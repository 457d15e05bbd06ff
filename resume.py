"""Resume to the bit: the whole state of a run in a folder, written aside, flushed and renamed.

    OUT/state/step_00000100/state.json           step, settings, the reference's digest, scores at the start
                            rank_0.safetensors   weights, and the optimizer states that rank 0 holds
                            rank_1.safetensors   what only rank 1 holds; and so on

A tensor stands by its parameter's name, with the rows it covers: whole with DDP, this rank's with FSDP2.
So another number of ranks finds what it needs, and with the same number a resumed run has the bits of one
that was never interrupted. Nothing is unpickled.
"""

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import fpo
import offline

# May differ between a run and its continuation: they change only rounding, or what is looked at.
FREE = {"resume", "save_every", "keep", "force", "on_nan", "out", "cache_dir", "start_note", "base"}
FREE |= {"eval_every", "eval_samples", "eval_kl", "eval_tokens", "sample_batch"}
FREE |= {
    "micro_batch_pairs",
    "micro_batch_tokens",
    "wandb",
    "tensorboard",
    "push_to_hub",
    "plan",
    "gpu_gb",
    "ranks",
}


# ---------------------------------------------------------------------------- pieces
def _rows(tensor) -> tuple[torch.Tensor, int]:
    """(this rank's rows of a parameter, the first one's number)."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    sizes = torch.tensor([len(tensor.to_local())], device=tensor.to_local().device)
    before = [torch.zeros_like(sizes) for _ in range(dist.get_world_size())]
    dist.all_gather(before, sizes)
    return tensor.to_local().detach(), int(sum(before[: dist.get_rank()]))


def _held(policy, optimizer):
    """{name: (tensor, first row, whether every rank holds the same)} of weights and this rank's states."""
    inner = getattr(optimizer, "optim", optimizer)  # within a ZeroRedundancyOptimizer: this rank's share
    held, mine = {}, {id(p): group for group in inner.param_groups for p in group["params"]}
    for name, parameter in policy.named_parameters():
        local, first = _rows(parameter)
        whole = not isinstance(parameter, DTensor)
        held[f"weight/{name}"] = local, first, whole
        if id(parameter) in mine:
            rule = mine[id(parameter)]["rule"]
            state = inner.state[parameter] = inner.state[parameter] or inner.new_state(parameter, rule)
            for key, tensor in state.items():
                held[f"{key}/{name}"] = tensor, first, whole and inner is optimizer
    return held


# ---------------------------------------------------------------------------- save
def save_state(out, step: int, policy, optimizer, meta: dict, *, keep: int = 1):
    """Write the state after `step` into OUT/state, and keep the last `keep`. Every rank must call it.

    Args:
        meta: what state.json says besides step and ranks (settings, reference, scores before training).
    """
    rank, world = fpo.ranks()
    folder = Path(out) / "state"
    aside, final = folder / f"step_{step:08d}.tmp", folder / f"step_{step:08d}"
    if final.exists():  # this run's own, of this step: there is nothing to add
        return
    fpo.barrier()  # every rank has looked
    if rank == 0:
        for left in folder.glob("step_*.tmp"):  # of a run that died while it wrote
            shutil.rmtree(left)
        aside.mkdir(parents=True)
    fpo.barrier()
    pieces, firsts = {}, {}
    for name, (tensor, first, everywhere) in _held(policy, optimizer).items():
        if not (everywhere and rank):  # what every rank holds, rank 0 writes
            pieces[name], firsts[name] = tensor.contiguous(), str(first)
    with offline.writing(aside):
        path = aside / f"rank_{rank}.safetensors"
        # What safetensors writes of no tensor and no metadata it can't read: a rank that holds nothing.
        save_file(pieces, path, metadata={"rank": str(rank), **firsts})
        _flush(path)
    fpo.barrier()
    if rank == 0:
        offline.write_json(aside / "state.json", {"step": step, "ranks": world, **meta})
        _flush(aside / "state.json")
        aside.rename(final)
        _flush(folder)
        for old in saved_states(out)[: -max(1, keep)]:
            shutil.rmtree(old)
    fpo.barrier()


def _flush(path):
    """Have the disk hold a file, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---------------------------------------------------------------------------- load
def saved_states(out) -> list[Path]:
    """Whole states of a run, oldest first; what was being written when a run died is not among them."""
    return sorted(path for path in (Path(out) / "state").glob("step_*") if path.suffix != ".tmp")


def set_aside(out):
    """Move an earlier run's states to OUT/state.old when a run begins anew in its folder.

    Left there, later ones would pass for this run's last.
    """
    folder, old = Path(out) / "state", Path(out) / "state.old"
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)


def read_meta(out, args, reference: str | None = None) -> dict:
    """state.json of the last state, after checking that this run continues it (None: the reference is not).

    Raises:
        ValueError: no state, or a damaged one; other settings (each named; --force takes them); another
            reference.
    """
    states = saved_states(out)
    if not states:
        raise ValueError(f"--resume: no state in {Path(out) / 'state'}; auto starts anew where there is none")
    path = states[-1] / "state.json"
    try:
        meta = json.loads(path.read_text())
        before, _ = dict(meta["settings"]), (meta["step"], meta["before"], meta["reference"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {path} is not what a run writes: {error!r}") from None
    now = json.loads(json.dumps(vars(args)))
    changed = [name for name in now if name not in FREE and before.get(name) != now[name]]
    if changed and not args.force:
        what = ", ".join(f"--{name} was {before.get(name)}, is {now[name]}" for name in changed)
        raise ValueError(f"--resume {states[-1]}: {what}; --force goes on with the new values")
    if reference is not None and meta["reference"] != reference:
        raise ValueError(f"--resume {states[-1]}: trained against another reference than {args.reference}")
    return meta


def load_state(out, policy, optimizer):
    """Put the last state's weights and optimizer states in, bit for bit."""
    folder = saved_states(out)[-1]
    files = [_open(path) for path in sorted(folder.glob("rank_*.safetensors"))]
    for name, (tensor, first, _) in _held(policy, optimizer).items():
        found = [(file, int(firsts[name])) for file, firsts in files if name in firsts]
        if not found:
            raise ValueError(f"{folder}: nothing for {name}")
        if tensor.ndim == 0:
            tensor.copy_(found[0][0].get_tensor(name))
            continue
        done = 0
        for file, start in found:
            piece = file.get_slice(name)
            low, high = max(first, start), min(first + len(tensor), start + piece.get_shape()[0])
            if low < high:
                if list(tensor.shape[1:]) != piece.get_shape()[1:]:
                    raise ValueError(f"{folder}: {name} is of another model: {piece.get_shape()}")
                with torch.no_grad():
                    tensor[low - first : high - first].copy_(piece[low - start : high - start])
                done += high - low
        if done != len(tensor):
            raise ValueError(f"{folder}: {name} has {done} of {len(tensor)} rows")


def _open(path):
    try:
        file = safe_open(path, "pt")
        return file, file.metadata()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def cut_metrics(path, step: int):
    """Keep metrics.jsonl's lines up to `step`: none lost, none doubled."""
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line that a kill cut short
            continue
    offline.write_text(path, "".join(kept))


# ---------------------------------------------------------------------------- one run a folder
def hold(out):
    """Hold a run's folder until this process ends; keep what is returned. OSError while another run has it.

    A killed torchrun leaves its ranks at work: a run started again would write over theirs. (lockf, by which
    a process may hold a file twice: a run can follow another in it.)
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    lock = open(Path(out) / "lock", "w")  # noqa: SIM115
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OSError(f"--out {out}: another run writes there; end it, or choose another folder") from None
    return lock


# ---------------------------------------------------------------------------- signals
class StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to save and leave at the step's end. A second one kills."""

    def __init__(self):
        self.came = False
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.came = True
        self.restore()

    def restore(self):
        """Put the former handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
