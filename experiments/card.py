"""The measurements of card.sh, and the record of what each of its commands did.

What it does is the first word of the command line:

    record OUT.json NAME SECONDS COMMAND ...    run a command, keep how it ended and what it said
    attention, head                             time and memory on a card, as a line of JSON
    step_1 RUN                                  a run's first step beside the audit's floor
"""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import fpo
import runtime
import scale
from batches import collate
from data import Pairs

HEAD = {"V": 256_000, "d": 2304, "N": 6144, "softcap": 30.0}  # Gemma-2-2B's, and the targets of 8,192 tokens
KERNELS = {
    "default": {},
    "blocks of 64": {"BLOCK_M": 64, "BLOCK_N": 64},
    "blocks of 32": {"BLOCK_M": 32, "BLOCK_N": 32},
    "FLASH": {"BACKEND": "FLASH"},
}


def record(out, name, limit, command) -> dict:
    """Run a command for at most `limit` seconds; its end, time and last lines go into OUT.json at `name`."""
    start, there = time.perf_counter(), Path(out)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=float(limit))
        status, said = ended.returncode, ended.stdout + ended.stderr
    except subprocess.TimeoutExpired as late:
        status, said = None, b"".join(part or b"" for part in (late.stdout, late.stderr)).decode()
    found = {"command": " ".join(command), "status": status, "seconds": time.perf_counter() - start}
    found["said"] = said.splitlines()[-12:]
    results = json.loads(there.read_text()) if there.exists() else {"made_by": runtime.made_by()}
    runtime.write_json(there, results | {name: found})
    return found


def timed(step, rounds=5) -> dict:
    """Of a call on CUDA: milliseconds, the median after a warm-up, and GB at the peak above those before."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": sorted(times)[rounds // 2], "GB": (torch.cuda.max_memory_allocated() - before) / 1e9}


# ---------------------------------------------------------------------------- attention
def attention() -> dict:
    """Forward and backward of a layer's attention in a packed row, Gemma-2-2B's heads, by kernel options."""
    heads, kv_heads, width, softcap = 8, 4, 256, 50.0
    generator, sizes = torch.Generator().manual_seed(0), []
    while sum(sizes) < 7800:  # prompts and responses of pairs as they come
        sizes.append(int(torch.randint(100, 500, (1,), generator=generator)))
    # a third each: prompt, chosen, rejected
    pairs = Pairs([([5] * n, [6] * n, [7] * n) for n in (size // 3 for size in sizes)])
    batch = collate(pairs, range(len(pairs)), layout="shared", row_tokens=16384, row_multiple=128).to("cuda")
    flex, L = SimpleNamespace(_attn_implementation="flex_attention"), batch.tokens.shape[1]
    mask = fpo.attention_mask(batch, flex, torch.bfloat16)
    # q, k, v; of k and v there are fewer heads (grouped queries)
    shapes = ((1, n, L, width) for n in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)

    def capped(score, b, h, i, j):
        """Gemma-2's softcap of a score."""
        return softcap * torch.tanh(score / softcap)

    found = {"tokens": L}
    for name, options in KERNELS.items():
        kernel = torch.compile(partial(flex_attention, score_mod=capped, block_mask=mask, enable_gqa=True))
        call = partial(kernel, q, k, v, kernel_options=options)
        try:
            found[name] = timed(lambda call=call: call().sum().backward())
        except Exception as error:  # what a version or a card can't do is a result
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


# ---------------------------------------------------------------------------- the head
def head_in_token_slices(states, weight, targets, softcap, size=1024):
    """(N,) log π of the targets: plain logits of `size` tokens at a time, made again in the backward."""

    def one(h, target):
        """(n,) of a slice."""
        z = (h @ weight.T).float()
        return (softcap * torch.tanh(z / softcap)).log_softmax(-1).gather(1, target[:, None])[:, 0]

    parts = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(one, h, target, use_reentrant=False) for h, target in parts])


def head() -> dict:
    """Time and memory of both ways, forward and backward, at Gemma-2-2B's vocabulary, in bf16."""
    V, d, N, softcap = HEAD.values()
    states, weight = (torch.randn(n, d, device="cuda").bfloat16().requires_grad_() for n in (N, V))
    targets, found = torch.randint(V, (N,), device="cuda"), {}
    ways = {
        "vocabulary": lambda: scale.token_statistics(states, weight, targets, softcap=softcap)[0],
        "tokens": lambda: head_in_token_slices(states, weight, targets, softcap),
    }
    for name, way in ways.items():
        found[name] = timed(lambda way=way: way().sum().backward())
        states.grad = weight.grad = None
    return found


# ---------------------------------------------------------------------------- a run's first step
def step_1(run) -> dict:
    """Rewards and D_FPO before any weight has moved, beside the D_FPO that the audit says rounding makes."""
    line = json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[0])
    names = ("loss", "reward_chosen", "reward_rejected", "mse_chosen", "mse_rejected", "fill", "mfu")
    audit = json.loads((Path(run) / "config.json").read_text())["audit"]
    return {"floor": audit["floor"]} | {name: line[name] for name in names if name in line}


def main(words=None):
    """One of this file's head."""
    what, *rest = words or sys.argv[1:] or ["help"]
    if what == "record" and len(rest) > 3:
        found = record(*rest[:3], rest[3:])
        print(f"{rest[1]}: status {found['status']}, {found['seconds']:.0f} s")
        return
    sections = {"attention": attention, "head": head, "step_1": step_1}
    if what not in sections:
        runtime.refuse(f"{what}: one of record, {', '.join(sections)}")
    if what != "step_1" and not torch.cuda.is_available():
        runtime.refuse(f"{what}: needs a card")
    if len(rest) != (what == "step_1") or not all((Path(run) / "config.json").exists() for run in rest):
        runtime.refuse(f"{' '.join([what, *rest])}: step_1 takes a run's folder, the others nothing")
    print(json.dumps(sections[what](*rest)))


if __name__ == "__main__":
    runtime.run_script(main)
