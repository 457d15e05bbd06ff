"""The memory that a rank needs at its peak, from a model's config alone: what trains on which card.

    python -m experiments.plan          a table: Gemma-2-2B and 9B, 4 ranks, 8 rows on each

Bytes are counted, not measured: what a step holds on CUDA, uncompiled. The peak is what always lies there,
and the largest of four moments:

    head          what all layers keep for the backward, the head's float32 blocks, the head's gradient
    last layer    what all layers keep, one layer made again with its widest operation, the head's gradient
    first layer   one layer made again, the head's gradient; by now FSDP2 has the gradients of all layers
    embedding     both gradients of the tied weight: the head's waits for the embedding's
"""

import itertools

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from losses import NEEDED
from scale import VOCABULARY_SLICE
from settings import PRESETS, Config

# What differs from Gemma2Config's defaults, which are the 2B model's.
GEMMA_2: dict[str, dict] = {"gemma-2-2b": {}, "gemma-2-9b": {"hidden_size": 3584, "intermediate_size": 14336}}
GEMMA_2["gemma-2-9b"] |= {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
CARDS = {"A100 40 GB": 42.4, "H100 80 GB": 85.0, "H200": 149.0}  # GB of 1e9 bytes that programs can use
RESERVE = 1.5  # GB of CUDA's context, of NCCL, and lost to gaps: an estimate
WAYS = {"": {}, " --shard fsdp": {"shard": "fsdp"}}
WAYS[" --no_activation_checkpointing"] = {"checkpointing": False}


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
    chunk = VOCABULARY_SLICE["cuda" if config._attn_implementation == "flex_attention" else "cpu"]
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


def main():
    """Print the table, with the smallest card that holds each number and RESERVE."""
    print("| GB on each of 4 ranks | 8 × 1024 tokens | 8 × 2048 tokens |\n|---|---:|---:|")
    for name, method, (flags, way) in itertools.product(GEMMA_2, ("fpo", "tdpo2"), WAYS.items()):
        config = Gemma2Config(**GEMMA_2[name], attn_implementation="flex_attention")
        rule, cells = PRESETS[name].get("optimizer", Config.optimizer), []
        for length in (1024, 2048):  # of train.py: --micro_batch_tokens 8192 (its default) and 16384
            gb = plan(config, method=method, rule=rule, tokens=8 * length, **way)["total"]
            fits = [card for card, size in CARDS.items() if gb + RESERVE <= size]
            cells.append(f"{gb:.1f} ({fits[0] if fits else 'none of these'})")
        print(f"| `{name}` `{method}{flags}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
