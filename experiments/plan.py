"""What a step needs of a card that is not there: memory at its peak, FLOPs by part, bytes moved, least time.

    python -m experiments.plan             tables of GB: the presets' models on 4 cards, some on one
    python -m experiments.bench --count    FLOPs and bytes of a step, and the least time for both

**Memory** is what a step holds on CUDA, uncompiled. What lies there always is told by the config. How much a
layer keeps for the backward, and what it, the head and the SAE take on top, is counted on fake tensors: the
real code runs on the real batch, in packed rows and with their masks, but no tensor has data. The peak is
what always lies there, and the largest of five moments:

    SAE           what all layers keep for the backward, a slice of the features
    head          what all layers keep, the head's float32 blocks, the gradient of its weight
    last layer    what all layers keep, one layer made again and its backward
    first layer   one layer made again and its backward; by now FSDP2 has the gradients of all layers
    embedding     its gradient

The gradient of the head's weight lies there from the second moment on where the embedding is the same weight,
whose gradient it waits for, and under FSDP2.

**Time**: the real layers, head and SAE run over fake tensors. Products and attention run at the card's peak
for their dtype, which hides the bytes that they move, as communication is hidden; all else moves bytes at the
speed of the card's memory. Bytes are counted in three ways:

    eager      each operation reads its inputs and writes its outputs
    compiled   in the layers, the operations between two products are one kernel: it reads what was made
               before it, and writes what is read after it
    fused      compiled, and so is the head's work on a slice of logits; clip and update take one pass each,
               as scale.py does on CUDA
"""

import argparse
import contextlib
import itertools
import weakref
from types import SimpleNamespace
from unittest.mock import patch
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import data
import scale
from batches import Batch, collate
from fpo import Policy, attention_mask
from loading import ROWS
from losses import NEEDED
from metrics import BF16_PEAK
from runtime import refuse, run_script
from settings import PRESETS, Config

# The makers' figures: GB of 1e9 bytes that programs can use; FLOP/s of dense products in bf16, and in TF32
# for the SAE; bytes/s of the memory.
CARDS: dict[str, dict] = {
    "A100 40 GB": {"GB": 42.4, "bfloat16": 312e12, "tf32": 156e12, "memory": 1.555e12},
    "H100 80 GB": {"GB": 85.0, "bfloat16": BF16_PEAK["H100"], "tf32": 494e12, "memory": 3.35e12},
    "H200": {"GB": 149.0, "bfloat16": BF16_PEAK["H100"], "tf32": 494e12, "memory": 4.8e12},
}
# What differs from Gemma2Config's defaults, which are the 2B model's.
GEMMA_2: dict[str, dict] = {"gemma-2-2b": {}, "gemma-2-9b": {"hidden_size": 3584, "intermediate_size": 14336}}
GEMMA_2["gemma-2-9b"] |= {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
# Of the other presets what the makers' config.json say, and the SAE's width, and k of a TopK SAE.
GEMMA_3_1B = Gemma3TextConfig(vocab_size=262144, hidden_size=1152, intermediate_size=6912)
GEMMA_3_1B.update({"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256})
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
QWEN3_2B = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16}
QWEN3_2B |= {"num_hidden_layers": 28, "tie_word_embeddings": True}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
QWEN3_8B |= {"num_hidden_layers": 36, "tie_word_embeddings": False}
MODELS = {name: (Gemma2Config(**changes), 16384, None) for name, changes in GEMMA_2.items()}
MODELS["gemma-3-1b"] = GEMMA_3_1B, 16384, None
MODELS["qwen3-1.7b"] = Qwen3Config(**QWEN3, **QWEN3_2B), 32768, 50
MODELS["qwen3-8b"] = Qwen3Config(**QWEN3, **QWEN3_8B), 65536, 50
# One card: a few that many have.
ONE_CARD = {"RTX 4090 24 GB": 25.3, "L40S 48 GB": 47.7, "H100 80 GB": 85.0}
RESERVE = 1.5  # GB of CUDA's context, of NCCL, and lost to gaps: an estimate
FLAGS = {"": {}, " --shard fsdp": {"shard": "fsdp"}}
FLAGS[" --no_activation_checkpointing"] = {"checkpointing": False}
DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by bytes of a number
WAYS = ("eager", "compiled", "fused")
# By these ways, bytes a bf16 parameter that clip and update move: an operation at a time as in commit d6594d8
# did, and in one pass, as scale.py says of CUDA.
CLIP = (38, 38, 2)
UPDATE = {"adam": (162, 162, 26), "rmsprop": (142, 142, 18)}
# Operations that move nothing, or next to nothing: they pick or put single values.
MOVES_NOTHING = ("index", "gather", "scatter_add", "embedding", "empty", "_unsafe_view")
# Products: torch's formulas, and that of the one that it leaves out, x.addmm_(a, b), by shapes.
FLOPS = flop_registry | {torch.ops.aten.addmm_: lambda x, a, b, **_: 2 * a.shape[0] * a.shape[1] * b.shape[1]}


# ---------------------------------------------------------------------------- memory
def plan(
    config, batch, *, method, rule, ranks=4, shard="states", checkpointing=True, sae_width=16384, sae_k=None,
    size=2,
):  # fmt: skip
    """GB that a rank needs at its peak; no weight is made.

    Args:
        config: a text model's.
        batch: the step's only micro-batch.
        method, rule, shard: train.py's --method, --optimizer, and --shard states or fsdp.
        sae_width, sae_k: m of FPO's SAE, and k of a TopK SAE; None: a JumpReLU's.
        size: bytes of a number that the layers compute with: 2 in bf16, 4 in float32.
    Returns: dict of what always lies there, "gradients, activations" at the worst moment, and "total".
    """
    P, layer = parameters_of(config)
    depth, N, fsdp, held = config.num_hidden_layers, len(batch.target), shard == "fsdp", method in NEEDED
    dW, root = size * config.vocab_size * config.hidden_size, P - depth * layer  # root: what is in no layer
    # Bytes of a weight between steps, and of its gradient; the parts that both are divided into.
    stored, parts = (4, ranks) if fsdp else (size, 1)
    states = {"adam": 8, "rmsprop": 4}[rule] + (0 if fsdp or size == 4 else 2)  # 2: the rest of a bf16 master
    resident = {"weights": P * stored / parts, "optimizer": P * states / ranks}
    if held:  # FSDP2 divides the reference's layers, not its embedding
        resident["reference"] = size * (root + (P - root) / parts)
    if fsdp:  # embedding and head stay whole; of layers one, its gradient, and the next
        resident["in flight"] = size * (root + 3 * layer)
    # DDP's buckets hold all gradients, always; FSDP2's come layer by layer, the root's last.
    before, after = (0 if fsdp else P * stored), (P - root if fsdp else P) * stored / parts
    outside, kept, backward = body_bytes(config, batch, size, checkpointing)
    all_kept, waits = outside + depth * kept, dW * (config.tie_word_embeddings or fsdp)
    head, features = head_bytes(config, N, size, held), 0
    if method == "fpo":  # beside the head lie the states that the SAE reads, then their gradient
        head += 4 * N * config.hidden_size
        resident["SAE"], features = sae_bytes(config, batch, sae_width, sae_k)
    # The SAE or the head; the last layer; the first one; the embedding.
    worst = max(
        before + all_kept + max(features, dW + head),
        before + all_kept + waits + backward,
        after + outside + kept + waits + max(backward, dW - kept),
    )
    items = {**resident, "gradients, activations": worst, "total": sum(resident.values()) + worst}
    return {name: n / 1e9 for name, n in items.items()}


def parameters_of(config) -> tuple[int, int]:
    """Numbers in all weights, and in those of one layer."""
    with torch.device("meta"):  # a copy of the config, since from_config writes into it
        lm = AutoModelForCausalLM.from_config(type(config)(**config.to_dict()), attn_implementation="eager")
    return tuple(sum(p.numel() for p in part.parameters()) for part in (lm, lm.model.layers[0]))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still held: `now`, and the most there were."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.peak = WeakSet(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and (storage := x.untyped_storage()) not in self.storages:
                self.storages.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, n):
        """A storage of n bytes begins; of -n, ends."""
        self.now += n
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def like_a_card():
    """Fake tensors that are treated as a card's; attention is one operation there, as flex_attention is."""
    ALL_ATTENTION_FUNCTIONS["flex_attention"] = one_kernel
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), patch.object(torch.Tensor, "is_cuda", True):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["flex_attention"]


def fake_policy(config, dtype, saes=(), checkpointing=True):
    """A Policy on fake tensors, each weight with its gradient; SAEs read the last layer."""
    options = {"dtype": dtype, "attn_implementation": "flex_attention"}
    lm = AutoModelForCausalLM.from_config(type(config)(**config.to_dict()), **options)
    policy = Policy(lm, saes, [(config.num_hidden_layers - 1, "res")] * len(saes), fused=False)
    if checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    for parameter in policy.train().parameters():
        parameter.grad = torch.zeros_like(parameter)
    return policy


def body_bytes(config, batch, size, checkpointing):
    """Bytes that a forward keeps outside the layers, and in each; and what a layer's backward takes on top.

    Two layers less one are a layer. The embedding's gradient is left out: a vocabulary of eight tokens.
    """
    found, changes = [], {"vocab_size": 8, "pad_token_id": None, "layer_types": None}
    for depth in (1, 2):
        shallow = type(config)(**config.to_dict() | changes | {"num_hidden_layers": depth})
        with like_a_card(), LiveBytes() as live:
            policy = fake_policy(shallow, DTYPES[size], checkpointing=checkpointing)
            before = live.now
            states = policy._read(batch)[0]  # (N, d)
            kept = live.now - before
            live.peak = live.now
            states.backward(torch.empty_like(states))
            found.append((kept, live.peak - before - kept))
    (one, _), (two, backward) = found
    return 2 * one - two, two - one, backward


def head_bytes(config, N, size, held):
    """Bytes that the head of N tokens takes beyond the states, the weights and the weight's gradient."""
    softcap, d = getattr(config, "final_logit_softcapping", None), config.hidden_size
    with like_a_card(), LiveBytes() as live:
        options = {"dtype": DTYPES[size], "requires_grad": True}
        states, weight = (torch.empty(n, d, **options) for n in (N, config.vocab_size))
        reference = {"ref_weight": weight.detach()} if held else {}
        target, before = torch.empty(N, dtype=torch.int64), live.now
        reference |= {"ref_states": torch.empty_like(states)} if held else {}
        logps, kl, *_ = scale.token_statistics(
            states, weight, target, softcap=softcap, fused=False, **reference
        )
        (logps + kl if held else logps).sum().backward()
    return live.peak - before - weight.nbytes


def sae_bytes(config, batch, m, k):
    """Bytes of the encoder; and of the states that it reads, the pooled features, and all between them."""
    N, responses, d = len(batch.target), len(batch.lengths), config.hidden_size
    with like_a_card(), LiveBytes() as live:
        W_enc, (b_enc, threshold) = torch.empty(d, m), torch.empty(2, m)
        sae, encoder = SimpleNamespace(W_enc=W_enc, b_enc=b_enc, threshold=threshold, k=k), live.now
        states = torch.empty(N, d, requires_grad=True)  # of the float32 stream
        owner, lengths = torch.zeros(N, dtype=torch.int64), torch.ones(responses)
        pooled = scale.pooled_features(states, sae, owner, lengths)
        pooled.backward(torch.empty_like(pooled))
    return encoder, live.peak - encoder


# ---------------------------------------------------------------------------- FLOPs and bytes
class Counter(TorchDispatchMode):
    """Counts FLOPs, and the bytes that all but products move, `eager` and `compiled`: see this file's head.

    widening: casts to float32 count; on CUDA scale.py's products sum in float32 without them.
    """

    def __init__(self, widening=True):
        super().__init__()
        self.widening, self.flops, self.eager, self.compiled = widening, 0, 0, 0
        self.run = 0  # the number of a run of operations between two products
        # Storages, held weakly, so that real tensors are let go as without the counter.
        self.made: WeakKeyDictionary = WeakKeyDictionary()  # by which run; None: a product, or written
        self.read: WeakSet = WeakSet()  # by this run

    def so_far(self):
        """(3,) what was counted: FLOPs, bytes eager, bytes compiled."""
        return np.array([self.flops, self.eager, self.compiled], dtype=float)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        product = func.overloadpacket in FLOPS or "attention" in name
        free = func.is_view or func.namespace == "prim" or name.startswith(MOVES_NOTHING)
        if free or (name == "_to_copy" and not self.widening and bytes_of(out) > bytes_of(args[0])):
            return out
        sources = args[1:] if name == "copy_" else (args, kwargs)
        read, written = ([x for x in tree_leaves(part) if torch.is_tensor(x)] for part in (sources, out))
        if product:
            self.run, self.read = self.run + 1, WeakSet()
            if func.overloadpacket in FLOPS:
                self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        else:
            self.eager += sum(map(bytes_of, read + written))
        for tensor in read:
            storage = tensor.untyped_storage()
            maker = self.made.get(storage)
            if maker is not None and maker != self.run:  # the run that made it has to write it, once
                self.compiled += bytes_of(tensor)
                self.made[storage] = maker = None
            if maker is None and not product and storage not in self.read:
                self.compiled += bytes_of(tensor)
                self.read.add(storage)
        for tensor in written:
            self.made[tensor.untyped_storage()] = None if product else self.run
        return out


def bytes_of(tensor) -> int:
    """Bytes of a tensor in memory: what it repeats counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


# ---------------------------------------------------------------------------- the parts of a step
def one_kernel(module, query, key, value, mask, **_):
    """Attention as one operation, as flex_attention is; its FLOPs go by the mask, below."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("one_kernel", one_kernel)


def body_cost(config, tokens):
    """The transformer's cost without attention's FLOPs: of a forward, the backward, all layers' forward."""
    costs, options = [], {"dtype": torch.bfloat16, "attn_implementation": "one_kernel"}
    for depth in (1, 2):  # all layers cost the same
        shallow = config.to_dict() | {"num_hidden_layers": depth, "layer_types": None}
        with FakeTensorMode():
            lm = AutoModelForCausalLM.from_config(type(config)(**shallow), **options)
            place = torch.zeros(tokens.shape, dtype=torch.int64)
            masks = dict.fromkeys(("full_attention", "sliding_attention"))
            with Counter() as counter:
                # As in fpo.Policy: a float32 residual stream.
                embedded = lm.get_input_embeddings()(place).float()
                with torch.autocast("cpu", torch.bfloat16):
                    rows = {"inputs_embeds": embedded, "attention_mask": masks, "position_ids": place}
                    out = lm.model(**rows, use_cache=False)
                forward = counter.so_far()
                out.last_hidden_state.backward(torch.empty_like(out.last_hidden_state))
                costs.append(np.stack([forward, counter.so_far() - forward]))
    layer = costs[1] - costs[0]
    return *(costs[0] + (config.num_hidden_layers - 1) * layer), config.num_hidden_layers * layer[0]


def attention_flops(config, batch) -> float:
    """FLOPs of all layers' attention in a forward: two products over the blocks that the mask leaves."""
    masks, visited = attention_mask(batch, config, torch.bfloat16), 0
    for kind in getattr(config, "layer_types", None) or [None] * config.num_hidden_layers:
        mask = masks[kind] if kind else masks  # models whose layers are alike have one mask
        blocks = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
        visited += int(blocks) * np.prod(mask.BLOCK_SIZE)
    return 2 * 2 * config.num_attention_heads * config.head_dim * visited


def head_cost(config, N, held):
    """Head and log-probabilities of N tokens, both directions; `held`: a reference's too, for the KL."""
    shapes, options = (N, config.vocab_size), {"dtype": torch.bfloat16, "requires_grad": True}
    with FakeTensorMode(), Counter(widening=False) as counter:
        states, weight = (torch.empty(n, config.hidden_size, **options) for n in shapes)
        softcap = getattr(config, "final_logit_softcapping", None)
        inputs = states, weight, torch.empty(N, dtype=torch.int64), softcap
        inputs += (states, weight) if held else (None, None)
        logps, kl, *_ = scale._TokenStatistics.apply(*inputs, scale.VOCABULARY_SLICE["cuda"], False, False)
        (logps + kl if held else logps).sum().backward()
    return counter.so_far()


@torch.no_grad()
def sae_cost(config, N, m, responses):
    """The pooled features of N tokens; the backward's products have the sizes of the forward's."""
    d = config.hidden_size
    with FakeTensorMode(), Counter() as counter:
        sae = SimpleNamespace(W_enc=torch.empty(d, m), b_enc=torch.empty(m), threshold=torch.empty(m), k=None)
        states, owner = torch.empty(N, d), torch.zeros(N, dtype=torch.int64)  # of the float32 stream
        scale.pooled_features(states, sae, owner, torch.ones(responses))
    return 2 * counter.so_far()


# ---------------------------------------------------------------------------- the whole step
def tables(args, batch, method) -> dict:
    """A rank's step of one micro-batch as two tables, lists of rows: the parts, and what each card allows.

    args: of bench.py. N parameters and T tokens make 6NT FLOPs, 8NT with checkpointing.
    """
    config, held, again = args.config, method in NEEDED, args.checkpointing
    N, P = len(batch.target), parameters_of(config)[0]
    forward, backward, layers = (cost[[0, 1, 2, 2]] for cost in body_cost(config, batch.tokens))
    costs = {  # (4,) each: FLOPs, and bytes eager, compiled, fused
        "body": forward + backward,
        "recompute": again * layers,
        "reference": held * forward,
        # Of attention's two products the backward makes one again, and two gradients of each.
        "attention": attention_flops(config, batch) * np.array([3.5 + again + held, 0, 0, 0]),
        "head": head_cost(config, N, held)[[0, 1, 1, 2]],
        "SAE": (method == "fpo") * sae_cost(config, N, args.sae_width, len(batch.lengths))[[0, 1, 1, 1]],
        "clip": P * np.array([0, *CLIP]),
        "update": P / args.rank_of * np.array([0, *UPDATE[args.rule]]),
    }
    NT, total = P * batch.tokens.numel(), sum(costs.values())
    parts, bounds = [], []
    for part, (flops, *ways) in (costs | {"sum": total}).items():
        row = {"part": part, "TFLOP": flops / 1e12, "/ 6NT": flops / (6 * NT), "/ 8NT": flops / (8 * NT)}
        parts.append(row | {f"GB {way}": size / 1e9 for way, size in zip(WAYS, ways, strict=True)})
    for name, card in CARDS.items():
        speeds = {part: card["tf32" if part == "SAE" else "bfloat16"] for part in costs}
        products = sum(cost[0] / speeds[part] for part, cost in costs.items())
        for way, moved in zip(WAYS, total[1:], strict=True):
            s = products + moved / card["memory"]
            mfu = 6 * NT / s / card["bfloat16"]
            bounds.append({"card": name, "way": way, "least ms": 1e3 * s, "MFU": mfu})
    return {"by part": parts, "at a card's limits": bounds}


def pairs_of(n, tokens) -> Batch:
    """A card's micro-batch of n pairs of so many tokens: a quarter prompt, two responses of equal length."""
    parts = [[0] * (tokens // 4), *([0] * (tokens * 3 // 8) for _ in range(2))]
    return collate(data.Pairs([parts] * n), range(n), layout="shared", **ROWS["cuda"])


def cell(name, batch, ranks, cards, **way) -> str:
    """GB on each rank, and the smallest of the cards that holds them and RESERVE."""
    config, m, k = MODELS[name]
    gb = plan(config, batch, ranks=ranks, sae_width=m, sae_k=k, **way)["total"]
    return f"{gb:.1f} ({next((card for card, GB in cards.items() if gb + RESERVE <= GB), 'none of these')})"


def main(argv=None):
    """Print the tables: GB on each of 4 ranks, and on one card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.parse_args(argv)  # it has no flags but --help
    cards = {name: card["GB"] for name, card in CARDS.items()}
    rules = {name: PRESETS[name].get("optimizer", Config.optimizer) for name in MODELS}
    # Of train.py: --micro_batch_tokens 8192, its default, and 16384.
    print("| GB on each of 4 ranks | 8 × 1024 tokens | 8 × 2048 tokens |\n|---|---:|---:|")
    batches = [pairs_of(8, length) for length in (1024, 2048)]
    for name, method, (flags, way) in itertools.product(MODELS, ("fpo", "tdpo2"), FLAGS.items()):
        options = way | {"method": method, "rule": rules[name]}
        cells = [cell(name, batch, 4, cards, **options) for batch in batches]
        print(f"| `{name}` `{method}{flags}` | {' | '.join(cells)} |", flush=True)
    print("\n| GB on one card | 2 × 1024 tokens | 8 × 1024 tokens |\n|---|---:|---:|")
    batches = [pairs_of(n, 1024) for n in (2, 8)]
    names = ("gemma-3-1b", "qwen3-1.7b", "gemma-2-2b")
    for name, rule, checkpointing in itertools.product(names, ("adam", "rmsprop"), (True, False)):
        options = {"method": "fpo", "rule": rule, "checkpointing": checkpointing}
        cells = [cell(name, batch, 1, ONE_CARD, **options) for batch in batches]
        flags = "" if checkpointing else " --no_activation_checkpointing"
        print(f"| `{name}` `fpo --optimizer {rule}{flags}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
