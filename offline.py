"""The offline reference (Sec. 3): Phase 1 runs π_ref once and stores what the losses need, Phase 2 reads it.

    build_reference      Phase 1: shards of pairs, split over the ranks, each written aside and renamed
    ReferenceCache       Phase 2: the statistics of any pairs, read as they are asked for
    reference_identity   what the stored values depend on; another identity is another cache

A pair costs two log-probabilities and both responses' non-zero pooled features: no logits, no token's states.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from data import Pairs, micro_batches
from fpo import Policy, Statistics, barrier, lockstep, ranks, stream

SHARD = 256  # pairs to a file: what an interruption can lose
NO_MATTER = {"dtype", "transformers_version", "architectures"}  # of a config, to the cached values


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over every tensor's name, type, shape and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def reference_identity(policy: Policy, pairs: Pairs, *, weights: str, arithmetic: dict, cache_top=0) -> dict:
    """What the cached values depend on; learning rate, α, β, γ, k, method and folder are not among it.

    Args:
        weights: `digest` of the reference's state dict.
        arithmetic: what changes the rounding: row layout, device, compile.
        cache_top: features kept of each response, 0 for all that are not zero.
    """
    saes = []
    for sae, (layer, site) in zip(policy.saes, policy.sites, strict=True):
        encoder = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "threshold")}
        saes.append([layer, site, sae.m, digest(encoder)])
    # Softcap, window, RoPE, epsilon: what weights alone don't tell.
    config = json.loads(json.dumps(policy.lm.config.to_diff_dict(), default=str))
    config = {name: config[name] for name in sorted(config) if name[0] != "_" and name not in NO_MATTER}
    identity = {"version": 2, "tokens": pairs.digest(), "weights": weights, "config": config}
    identity |= {"dtype": str(policy.lm.dtype), "attention": policy.lm.config._attn_implementation}
    return identity | arithmetic | {"cache_top": cache_top if saes else 0, "saes": saes}


def find_reference(cache_dir, identity: dict) -> Path:
    """The folder of a cache with this identity: one that has all its SAEs, perhaps more; else a new one."""
    for folder in sorted(Path(cache_dir).glob("*/")):
        if _serves(_manifest(folder), identity):
            return folder
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir) / key


def _serves(manifest: dict | None, identity: dict) -> bool:
    """Whether a cache of that manifest gives what this identity asks for."""
    if manifest is None or manifest["shard"] != SHARD:
        return False
    found, wanted = manifest["identity"], identity["saes"]
    fixed = [key for key in identity if key not in ("saes", "cache_top")]
    same = all(found.get(key) == identity[key] for key in fixed)
    features = not wanted or found.get("cache_top") == identity["cache_top"]
    return same and features and all(sae in found.get("saes", []) for sae in wanted)


def build_reference(policy: Policy, pairs: Pairs, cache_dir, identity, *, max_tokens=0, max_pairs=0, **rows):
    """Phase 1 (Sec. 3): run π_ref once over the pairs and store what the loss needs of it.

    Stored per pair: both sums of log-probabilities (β and the lengths are applied later) and both pooled
    feature vectors, sparse. Shards of `SHARD` pairs are split over the ranks, written aside and renamed;
    those already there are kept, so an interrupted pass goes on where it was.

    Args:
        policy: a Policy whose lm is the reference.
        identity: see `reference_identity`.
        max_tokens, max_pairs, rows: the micro-batches, as `data.micro_batches` and `data.collate` take them.
    Returns:
        ReferenceCache.
    """
    (rank, world), device = ranks(), policy.lm.device
    folder = find_reference(cache_dir, identity)
    barrier()  # every rank has looked before any writes
    with _lock(folder) if rank == 0 else contextlib.nullcontext():  # let go of on an error too
        if rank == 0 and not _serves(_manifest(folder), identity):
            write_json(folder / "manifest.json", {"identity": identity, "pairs": len(pairs), "shard": SHARD})
        barrier()
        shards = [folder / f"shard_{s:05d}.safetensors" for s in range(-(-len(pairs) // SHARD))]
        missing = [s for s, path in enumerate(shards) if not _whole(path)]
        barrier()  # every rank has seen the same
        budget = {"max_pairs": max_pairs, "max_tokens": max_tokens}
        groups, ends = _shard_batches(pairs, missing[rank::world], rows["layout"], budget)
        groups = lockstep(groups, device)
        policy.eval()
        parts, dropped = [], []
        bar = tqdm(
            total=len(groups), desc="reference (Phase 1)", unit=" batches", disable=rank > 0 or not groups
        )
        with torch.no_grad(), bar:
            for i, (batch, _) in enumerate(stream(pairs, groups, device=device, **rows)):
                statistics, _ = policy(batch)
                if groups[i]:
                    parts.append(_sparse(batch.index, statistics, identity["cache_top"], dropped))
                if i in ends:
                    _write_shard(shards[ends[i]], parts)
                    parts = []
                bar.update()
        if dropped and rank == 0:
            _say_dropped(dropped)
        barrier()
    return ReferenceCache(folder, identity["saes"])


def _shard_batches(pairs, shards, layout, budget):
    """Micro-batches of some shards, one shard's after the other's; and which of them ends which shard."""
    lengths, groups, ends = pairs.row_lengths(layout), [], {}
    for shard in shards:
        members = range(shard * SHARD, min(len(pairs), (shard + 1) * SHARD))
        groups += micro_batches(members, lengths, 1, **budget)
        ends[len(groups) - 1] = shard
    return groups, ends


def _sparse(index, statistics, top, dropped):
    """Per pair of a batch: its index, both log-probabilities, per SAE the non-zero features of both sides.

    With `top` a response keeps its so many largest features; `dropped` then gets, of each batch, the share
    of the squared activations that was left out, and the largest activation among them.
    """
    logps = statistics.logps.cpu().view(2, -1).T
    kept = []
    for c in statistics.features:
        c = c.cpu()
        if top:
            best = c.topk(min(top, c.shape[1]))
            rest = c.scatter(1, best.indices, 0.0)
            dropped.append((rest.square().sum() / c.square().sum().clamp(min=1e-30), rest.max()))
            c = c - rest
        kept.append([[(row.nonzero()[:, 0].int(), row[row != 0]) for row in side] for side in c.chunk(2)])
    return [
        (i, logps[b], [[side[b] for side in sides] for sides in kept]) for b, i in enumerate(index.tolist())
    ]


def _say_dropped(dropped):
    """Print what --cache_top leaves out, of `_sparse`'s notes."""
    share, largest = (torch.stack(column) for column in zip(*dropped, strict=True))
    what = f"{share.mean():.2%} are dropped, the largest {largest.max():.3g}"
    print(f"--cache_top: of the squared activations {what}")


def _write_shard(path, parts):
    """Pairs in order of their index; a feature vector is a run of ids and values, `counts` long."""
    pairs = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    tensors = {"logps": torch.stack([logps for _, logps, _ in pairs])}
    for s in range(len(pairs[0][2])):
        vectors = [vector for _, _, features in pairs for vector in features[s]]
        tensors[f"counts.{s}"] = torch.tensor([len(ids) for ids, _ in vectors]).view(-1, 2)
        tensors[f"ids.{s}"] = torch.cat([ids for ids, _ in vectors])
        tensors[f"values.{s}"] = torch.cat([values for _, values in vectors])
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    with writing(aside):
        save_file(tensors, aside, metadata={"cache": path.parent.name})
    checksum, stat = _checksum(aside), aside.stat()
    aside.replace(path)
    note = {"sha256": checksum, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    write_json(path.with_suffix(".json"), note)


def _checksum(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(path) -> bool:
    """Whether a shard is there, is this cache's, and has the bytes that were written.

    The checksum is taken where size or time are not those noted at the writing; lookups take it in any case.
    """
    try:
        note, stat = json.loads(path.with_suffix(".json").read_text()), path.stat()
        untouched = (note["size"], note["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        if not untouched and note["sha256"] != _checksum(path):
            return False
        with safe_open(path, "pt") as file:
            return file.metadata()["cache"] == path.parent.name
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def _lock(folder):
    """Hold a cache folder alone: a second process that builds the same cache waits for the first.

    The system takes a flock from a process that dies, so a killed one keeps nobody waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: another process builds this cache; waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    for left in folder.glob("*.tmp"):  # of a process that died while it wrote
        left.unlink()
    return lock


def _manifest(folder) -> dict | None:
    """A cache's manifest; None where it is missing, not JSON or not of this form."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        return manifest if {"identity", "pairs", "shard"} <= set(manifest) else None
    except (OSError, ValueError, TypeError):
        return None


def write_json(path, value):
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path, text: str):
    """Write a file aside and rename it: a reader sees the old one or the new one."""
    aside = Path(f"{path}.{os.getpid()}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    with writing(aside):
        aside.write_text(text)
    aside.replace(path)


@contextlib.contextmanager
def writing(path, *, keep: bool = False):
    """Turn a failed write into an OSError that names the path. Unless `keep`, remove what was begun: a full
    disk needs the room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not keep:
            shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None


class ReferenceCache:
    """Phase 2's reference: statistics of any pairs, read from the shards as they are asked for.

    Args:
        folder: what `build_reference` wrote.
        saes: the SAEs wanted, as in its identity; those of the cache may be more.
    """

    def __init__(self, folder, saes):
        self.folder = Path(folder)
        manifest = _manifest(self.folder)
        stored = manifest["identity"]["saes"]
        self.pairs, self.shard = manifest["pairs"], manifest["shard"]
        self.places = [(stored.index(sae), sae[2]) for sae in saes]  # (number in the shards, m)
        self._open = {}  # shard -> (file, log-probabilities, per SAE where each vector starts)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("shard_*.safetensors"))

    def _shard(self, number):
        if number not in self._open:
            path = self.folder / f"shard_{number:05d}.safetensors"
            note = path.with_suffix(".json")
            if not note.exists() or json.loads(note.read_text())["sha256"] != _checksum(path):
                note.unlink(missing_ok=True)
                raise OSError(f"{path}: not the bytes that were written; start again to make it anew")
            file = safe_open(path, "pt")
            starts = {}
            for s, _ in self.places:
                starts[s] = F.pad(file.get_tensor(f"counts.{s}").flatten().cumsum(0), (1, 0)).tolist()
            self._open[number] = file, file.get_tensor("logps"), starts
        return self._open[number]

    def lookup(self, index) -> Statistics:
        """Statistics of the B pairs at places `index` (B,): logps (2B,), features per SAE (2B, m)."""
        index = index.tolist()
        logps = torch.empty(2, len(index))
        features = tuple(torch.zeros(2 * len(index), m) for _, m in self.places)
        for b, i in enumerate(index):
            file, shard_logps, starts = self._shard(i // self.shard)
            row = i % self.shard
            logps[:, b] = shard_logps[row]
            for (s, _), dense in zip(self.places, features, strict=True):
                ids, values = file.get_slice(f"ids.{s}"), file.get_slice(f"values.{s}")
                for side in (0, 1):
                    a, z = starts[s][2 * row + side : 2 * row + side + 2]
                    dense[b + side * len(index), ids[a:z].long()] = values[a:z]
        return Statistics(logps.flatten(), features=features)
