"""The offline reference (Sec. 3): Phase 1 runs π_ref once and stores what the losses need, Phase 2 reads it.

    build_reference      Phase 1: shards of pairs, split over the ranks, each written aside and renamed
    ReferenceCache       Phase 2: the statistics of any pairs, read as they are asked for
    reference_identity   what the stored values depend on; another identity is another cache

It can be stored since the reference is frozen and its inputs are fixed. A pair costs two log-probabilities
and the non-zero pooled features of both responses: no logits, no token's states.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import runtime
from batches import lockstep, plan_for_one, stream
from fpo import Policy, Statistics
from runtime import UserError

SHARD = 256  # pairs to a file: what an interruption can lose
# Config keys that cannot change the cached values.
IGNORED_CONFIG_KEYS = {"dtype", "transformers_version", "architectures"}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over every tensor's name, type, shape and bytes; several tensors at a time, as threads allow."""

    def one(name):
        """sha256 of one tensor, with what it is."""
        tensor = tensors[name].detach().cpu().contiguous()
        total = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets other threads run
        return hashlib.sha256("".join(pool.map(one, sorted(tensors))).encode()).hexdigest()


def sae_identity(sae, place) -> list:
    """What features depend on: [layer, site, m, k, digest of the encoder], as JSON has it."""
    encoder = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "threshold")}
    return [*place, sae.m, sae.k, digest(encoder)]


def reference_identity(policy: Policy, pairs: data.Pairs, *, weights: str, arithmetic: dict) -> dict:
    """What the cached values depend on; learning rate, α, β, γ, k, method and folder are not part of it.

    Args:
        weights: `digest` of the reference's state dict.
        arithmetic: what changes the rounding: row layout, device, compile.
    """
    # Softcap, window, RoPE, epsilon: what the weights alone don't tell.
    config = json.loads(json.dumps(policy.lm.config.to_diff_dict(), default=str))
    config = {
        name: config[name] for name in sorted(config) if name[0] != "_" and name not in IGNORED_CONFIG_KEYS
    }
    identity = {"version": 6, "tokens": pairs.digest(), "weights": weights, "config": config}
    identity["saes"] = [sae_identity(*pair) for pair in zip(policy.saes, policy.sites, strict=True)]
    identity |= {"dtype": str(policy.lm.dtype), "attention": policy.lm.config._attn_implementation}
    return identity | arithmetic


# ---------------------------------------------------------------------------- Phase 1
def build_reference(policy: Policy, pairs: data.Pairs, cache_dir, identity, *, max_tokens=0, **row_options):
    """Phase 1 (Sec. 3): run π_ref once over the pairs and store what the losses need of it.

    Stored per pair: both sums of log-probabilities (β and the lengths are applied later), both pooled feature
    vectors as their non-zero entries, and the mean ‖h‖² of both responses. Shards of `SHARD` pairs are split
    over the ranks. Shards that are already there are kept, so an interrupted pass goes on where it was.

    Args:
        policy: a Policy whose lm is the reference.
        identity: see `reference_identity`; its digest names the cache's folder.
        max_tokens, row_options: the micro-batches, as `plan_for_one` and `collate` take them.
    Returns:
        ReferenceCache.
    """
    (rank, world), device = runtime.ranks(), policy.lm.device
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    # One process at a time builds a cache; another waits here, and then finds its shards.
    with runtime.lock_folder(folder, wait=True) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            for left in folder.glob("*.tmp"):  # of a process that died while it wrote
                left.unlink()
            manifest = {"identity": identity, "pairs": len(pairs), "shard": SHARD}
            runtime.write_json(folder / "manifest.json", manifest)
        runtime.barrier()
        # ---- which shards are to be made, and by which rank
        shards = [folder / f"shard_{s:05d}.safetensors" for s in range(-(-len(pairs) // SHARD))]
        missing = _missing(shards, device)
        groups, ends = shard_batches(pairs, missing[rank::world], device, max_tokens, row_options)
        groups = lockstep(groups, device)  # FSDP's forwards are collectives: every rank makes as many
        # ---- π_ref once over their pairs
        was_training, parts = policy.training, list[tuple]()
        policy.eval()
        batches = stream(pairs, groups, device=device, **row_options)
        quiet = rank > 0 or not groups
        with torch.no_grad():
            for i, (batch, _) in enumerate(tqdm(batches, "reference (Phase 1)", len(groups), disable=quiet)):
                parts += _to_parts(groups[i], policy(batch)[0])
                if i in ends:
                    _write_shard(shards[ends[i]], parts)
                    parts.clear()
        policy.train(was_training)
        runtime.barrier()
    return ReferenceCache(folder)


def _missing(shards, device) -> list[int]:
    """Numbers of the shards that are not there as they were written, the same on every rank.

    Every byte is read once a start, a rank's share by each; that all tell each other is a barrier too, so
    none writes before all have looked.
    """
    rank, world = runtime.ranks()
    broken = torch.zeros(len(shards), dtype=torch.int32)
    for s in range(rank, len(shards), world):
        broken[s] = not _whole(shards[s])
    if dist.is_initialized():
        broken = broken.to(device)
        dist.all_reduce(broken)
    return broken.nonzero()[:, 0].tolist()


def shard_batches(pairs, shards, device, max_tokens, row_options):
    """Micro-batches of some shards, one shard's after the other's; and which of them ends which shard.

    They don't depend on the ranks, and scores are made of the same: so a policy that has not moved computes
    the same bits as Phase 1 did, in any dtype and on any processor.
    """
    groups, ends = [], {}
    for shard in shards:
        members = range(shard * SHARD, min(len(pairs), (shard + 1) * SHARD))
        groups += plan_for_one(pairs, members, device, max_tokens=max_tokens, **row_options)
        ends[len(groups) - 1] = shard
    return groups, ends


def _to_parts(group, statistics):
    """What is stored of each pair of a micro-batch, on the host, sparse. An empty micro-batch stores
    nothing."""
    logps = statistics.logps.cpu()  # (2B,)
    features, norms = ([x.cpu() for x in per_sae] for per_sae in (statistics.features, statistics.norms))
    for b, pair in enumerate(group):
        rows = [b, b + len(group)]  # chosen, rejected
        vectors = [[(c[r].nonzero()[:, 0].int(), c[r][c[r] != 0]) for r in rows] for c in features]
        yield pair, logps[rows], vectors, [norm[rows] for norm in norms]


def _write_shard(path, parts):
    """Pairs in order of their index; a feature vector is a run of ids and values, `counts` long."""
    pairs = sorted(parts, key=lambda pair: pair[0])
    tensors = {"logps": torch.stack([logps for _, logps, _, _ in pairs])}  # (pairs, 2)
    for s in range(len(pairs[0][2])):
        vectors = [vector for _, _, features, _ in pairs for vector in features[s]]
        tensors[f"counts.{s}"] = torch.tensor([len(ids) for ids, _ in vectors]).view(-1, 2)
        tensors[f"ids.{s}"] = torch.cat([ids for ids, _ in vectors])
        tensors[f"values.{s}"] = torch.cat([values for _, values in vectors])
        tensors[f"norms.{s}"] = torch.stack([norms[s] for *_, norms in pairs])
    aside = path.with_suffix(".tmp")
    with runtime.writing(aside):
        save_file(tensors, aside)
        runtime.write_text(path.with_suffix(".sha256"), runtime.file_digest(aside))
        aside.replace(path)


def _whole(path) -> bool:
    """True if the shard is there and holds the bytes that were written."""
    note = path.with_suffix(".sha256")
    return path.exists() and note.exists() and note.read_text() == runtime.file_digest(path)


# ---------------------------------------------------------------------------- Phase 2
class ReferenceCache:
    """Phase 2's reference: statistics of any pairs, read from the shards as they are asked for.

    Args:
        folder: what `build_reference` wrote.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        manifest = json.loads((self.folder / "manifest.json").read_text())
        self.pairs, self.shard = manifest["pairs"], manifest["shard"]
        self.widths = [sae[2] for sae in manifest["identity"]["saes"]]  # m of each SAE
        self._open = {}  # shard -> (file, log-probabilities, per SAE where each vector starts)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("shard_*.safetensors"))

    def units(self, lengths) -> tuple[float, ...]:
        """Per SAE s² = mean ‖h‖² over all the reference's response positions. lengths: (pairs, 2), |y|."""
        units = []
        for s in range(len(self.widths)):
            shards = range(-(-self.pairs // self.shard))
            norms = torch.cat([self._shard(n)[0].get_tensor(f"norms.{s}") for n in shards]).double()  # (n, 2)
            units.append(((norms * lengths).sum() / lengths.sum()).item())
        return tuple(units)

    def _shard(self, number):
        if number not in self._open:
            path = self.folder / f"shard_{number:05d}.safetensors"
            try:  # its bytes were compared at the start
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: {error}; start again to make it anew") from None
            starts = []  # per SAE, of 2 vectors a pair, chosen then rejected, and where the last one ends
            for s in range(len(self.widths)):
                starts.append(F.pad(file.get_tensor(f"counts.{s}").flatten().cumsum(0), (1, 0)).tolist())
            self._open[number] = file, file.get_tensor("logps"), starts
        return self._open[number]

    def lookup(self, index) -> Statistics:
        """Statistics of the B pairs at places `index` (B,): logps (2·B,), features per SAE (2·B, m)."""
        index = index.tolist()
        logps = torch.empty(2, len(index))
        features = tuple(torch.zeros(2 * len(index), m) for m in self.widths)
        for b, i in enumerate(index):
            file, shard_logps, starts = self._shard(i // self.shard)
            row = i % self.shard
            logps[:, b] = shard_logps[row]
            for s, dense in enumerate(features):
                ids, values = file.get_slice(f"ids.{s}"), file.get_slice(f"values.{s}")
                for side in (0, 1):  # its run of non-zero entries, by id
                    a, z = starts[s][2 * row + side : 2 * row + side + 2]
                    dense[b + side * len(index), ids[a:z].long()] = values[a:z]
        return Statistics(logps.flatten(), features=features)
