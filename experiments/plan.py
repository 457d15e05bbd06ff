"""What a step needs of a card that is not there: memory at its peak, FLOPs by part, bytes moved, least time.

    python -m experiments.plan             a table of GB: Gemma-2-2B and 9B, 4 ranks, 8 rows on each
    python -m experiments.bench --count    FLOPs and bytes of a step, and the least time for both

**Memory** is counted from the config alone: what a step holds on CUDA, uncompiled. The peak is what always
lies there, and the largest of four moments:

    head          what all layers keep for the backward, the head's float32 blocks, the head's gradient
    last layer    what all layers keep, one layer made again with its widest operation, the head's gradient
    first layer   one layer made again, the head's gradient; by now FSDP2 has the gradients of all layers
    embedding     both gradients of the tied weight: the head's waits for the embedding's

**Time**: the real layers, head and SAE run over fake tensors. Products and attention run at the card's peak
for their dtype, which hides the bytes that they move, as communication is hidden; all else moves bytes at the
speed of the card's memory. Bytes are counted in three ways:

    eager      each operation reads its inputs and writes its outputs
    compiled   in the layers, the operations between two products are one kernel: it reads what was made
               before it, and writes what is read after it
    fused      compiled, and so is the head's work on a slice of logits; clip and update take one pass each,
               as scale.py does on CUDA
"""

import itertools
from types import SimpleNamespace
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma2Config

import scale
from fpo import attention_mask
from losses import NEEDED
from metrics import BF16_PEAK
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
RESERVE = 1.5  # GB of CUDA's context, of NCCL, and lost to gaps: an estimate
FLAGS = {"": {}, " --shard fsdp": {"shard": "fsdp"}}
FLAGS[" --no_activation_checkpointing"] = {"checkpointing": False}
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
    config, *, method, rule, tokens, ranks=4, shard="states", checkpointing=True, response_share=0.75,
    row_tokens=1024, sae_width=16384, size=2,
):  # fmt: skip
    """GB that a rank needs at its peak; no weight is made.

    Args:
        config: Gemma-2's; eager attention keeps its scores, flex_attention none.
        method, rule, shard: train.py's --method, --optimizer, and --shard states or fsdp.
        tokens: of the step's only micro-batch, in rows of row_tokens; response_share predict responses.
        size: bytes of a number that the layers compute with: 2 in bf16, 4 in float32.
    Returns: dict of what always lies there, "gradients, activations" at the worst moment, and "total".
    """
    P, layer = parameters_of(config)
    d, depth, E = config.hidden_size, config.num_hidden_layers, config.vocab_size * config.hidden_size
    N, fsdp, held = tokens * response_share, shard == "fsdp", method in NEEDED
    # Bytes of a weight between steps, and of its gradient; the parts that both are divided into.
    stored, parts = (4, ranks) if fsdp else (size, 1)
    states = {"adam": 8, "rmsprop": 4}[rule] + (0 if fsdp or size == 4 else 2)  # 2: the rest of a bf16 master
    resident = {"weights": P * stored / parts, "optimizer": P * states / ranks}
    if held:  # FSDP2 divides the reference's layers, not its embedding
        resident["reference"] = size * (E + (P - E) / parts)
    if method == "fpo":  # encoder, which features are active (a byte each), the states that it read
        resident["SAE"] = 4 * sae_width * d + N * (sae_width + 4 * d)
    if fsdp:  # the embedding stays whole; of layers one, its gradient, and the next
        resident["in flight"] = size * (E + 3 * layer)
    # DDP's buckets hold all gradients, always; FSDP2's come layer by layer, the embedding's last.
    before, after = (0 if fsdp else P * stored), (P - E if fsdp else P) * stored / parts
    kept, widest = (tokens * n for n in layer_bytes(config, row_tokens, size))
    inputs = depth * (tokens * d * 4 if checkpointing else kept)  # of the residual stream: float32
    again = kept + widest if checkpointing else widest
    # Blocks of the head's backward: logits, slope, gradient, its product, TDPO's reference; and the states.
    chunk = scale.VOCABULARY_SLICE["cuda" if config._attn_implementation == "flex_attention" else "cpu"]
    head = N * min(chunk, config.vocab_size) * 4 * (5 if held else 4) + N * d * (4 + 2 * size)
    # Head or last layer; first layer or embedding. Beside each lies the head's gradient.
    worst = size * E + max(before + inputs + max(head, again), after + max(again, size * E))
    items = {**resident, "gradients, activations": worst, "total": sum(resident.values()) + worst}
    return {name: n / 1e9 for name, n in items.items()}


def parameters_of(config) -> tuple[int, int]:
    """Numbers in all weights, and in those of one layer."""
    with torch.device("meta"):  # a copy of the config, since from_config writes into it
        lm = AutoModelForCausalLM.from_config(type(config)(**config.to_dict()), attn_implementation="eager")
    return tuple(sum(p.numel() for p in part.parameters()) for part in (lm, lm.model.layers[0]))


def layer_bytes(config, row_tokens, size=2):
    """Bytes a token that a Gemma-2 layer keeps for its backward, and that its widest operation takes on top.

    Four RMSNorms keep input and output in float32. Products keep what they read of the stream's width: in
    bf16 five copies, in float32 two tensors. The MLP keeps four tensors of its width, attention queries,
    keys, values, output; eager also keys and values a head, each score's tanh, two softmaxes.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    eager = config._attn_implementation != "flex_attention"
    scores, kv = (config.num_attention_heads * row_tokens, q) if eager else (0, kv)
    copies = 2 * 5 * d if size == 2 else 4 * 2 * d
    return 32 * d + copies + size * (4 * f + 2 * q + 2 * kv) + 8 * scores, max(3 * size * f, 8 * scores)


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
    for kind in config.layer_types:
        blocks = masks[kind].kv_num_blocks.sum() + masks[kind].full_kv_num_blocks.sum()
        visited += int(blocks) * np.prod(masks[kind].BLOCK_SIZE)
    return 2 * 2 * config.num_attention_heads * config.head_dim * visited


def head_cost(config, N, held):
    """Head and log-probabilities of N tokens, both directions; `held`: a reference's too, for the KL."""
    shapes, options = (N, config.vocab_size), {"dtype": torch.bfloat16, "requires_grad": True}
    with FakeTensorMode(), Counter(widening=False) as counter:
        states, weight = (torch.empty(n, config.hidden_size, **options) for n in shapes)
        inputs = states, weight, torch.empty(N, dtype=torch.int64), config.final_logit_softcapping
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


def main():
    """Print the table, with the smallest card that holds each number and RESERVE."""
    print("| GB on each of 4 ranks | 8 × 1024 tokens | 8 × 2048 tokens |\n|---|---:|---:|")
    for name, method, (flags, way) in itertools.product(GEMMA_2, ("fpo", "tdpo2"), FLAGS.items()):
        config = Gemma2Config(**GEMMA_2[name], attn_implementation="flex_attention")
        rule, cells = PRESETS[name].get("optimizer", Config.optimizer), []
        for length in (1024, 2048):  # of train.py: --micro_batch_tokens 8192 (its default) and 16384
            gb = plan(config, method=method, rule=rule, tokens=8 * length, **way)["total"]
            fits = [card for card, of in CARDS.items() if gb + RESERVE <= of["GB"]]
            cells.append(f"{gb:.1f} ({fits[0] if fits else 'none of these'})")
        print(f"| `{name}` `{method}{flags}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
