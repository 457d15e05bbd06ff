"""The memory that a rank will need, item by item, from a model's config alone: train.py --plan.

Bytes are counted, not measured: what a forward, a loss and a backward of this code hold at their peak on
CUDA. bench.py measures them.
"""

import copy
import os
import re

import torch
from transformers import AutoModelForCausalLM

import fpo
import presets
from chunked import TOKEN_SLICE, VOCABULARY_SLICE


def plan_run(args):
    """--plan: the plan of train.py's flags, printed."""
    import bench  # the presets' shapes, known without a download

    if args.preset in bench.SHAPES and not os.path.isdir(args.model):
        config = bench.shape_config(args.preset, "flex_attention")
    else:
        config = presets.load_config(args.model)
    width = re.fullmatch(r"(\d+)([km]?)", args.sae_width)
    if width is None:
        raise ValueError(f"--sae_width {args.sae_width}: a number is needed for --plan, as in 512, 16k or 1m")
    m = int(width[1]) * {"": 1, "k": 2**10, "m": 2**20}[width[2]]
    items = plan(
        config, method=args.method, dtype=args.dtype or "bfloat16", rule=args.optimizer, ranks=args.ranks,
        shard=args.shard, micro_batch_tokens=args.micro_batch_tokens or 8 * args.max_length,
        response_share=1.0, checkpointing=args.activation_checkpointing,
        sae_shape=(config.hidden_size, m), row_tokens=args.max_length,
    )  # fmt: skip
    print_plan(items, args.gpu_gb)
    if args.eval_kl and args.method not in (*fpo.NEEDED, "sft"):
        lent = parameters_of(config)[0] * (2 if args.dtype != "float32" else 4) / 1e9
        print(f"and {lent:.2f} GB while --eval_kl evaluates: the reference")
    print(
        "compare peak_memory_gb of metrics.jsonl"
        if torch.cuda.is_available()
        else "not checked: no CUDA here"
    )


def print_plan(items, gpu_gb=80.0):
    """The plan as a table, and whether it fits a card of `gpu_gb`."""
    for name, gb in items.items():
        print(f"{name:<20}{gb:>10.2f} GB")
    print(f"{'fits' if items['total'] <= gpu_gb else 'does not fit'} {gpu_gb:g} GB a rank")


def plan(
    config, *, method, dtype, rule, ranks, shard, micro_batch_tokens, response_share, checkpointing,
    sae_shape=None, row_tokens=1024,
):  # fmt: skip
    """GB that a rank needs at its peak, item by item; no weight is made.

    Args:
        config: Gemma-2's; eager attention keeps its scores, flex_attention none.
        method: one of fpo.METHODS: TDPO and SimPO+KL hold the reference, FPO the SAE's encoder.
        dtype, rule: "float32" or "bfloat16", of weights and gradients; "adam" or "rmsprop".
        ranks, shard: processes; "none", "states" (the optimizer's) or "fsdp" (all; float32 masters).
        micro_batch_tokens, response_share: tokens of a forward, as they lie in the rows, padding counted; the
            share of them that predict response tokens.
        checkpointing: only each layer's input is kept.
        sae_shape: (d, m), or None. row_tokens: length of a row, for eager's scores.
    Returns:
        dict of GB by item and "total": the allocator's peak, without the CUDA context (about 0.5 GB).
    """
    P, layer = parameters_of(config)
    T, N, fsdp = micro_batch_tokens, micro_batch_tokens * response_share, shard == "fsdp"
    d, depth, embedding = config.hidden_size, config.num_hidden_layers, config.vocab_size * config.hidden_size
    held = method in fpo.NEEDED
    stored = 4 if fsdp or dtype == "float32" else 2  # bytes of a weight between steps, and of its gradient
    b = 2 if dtype == "bfloat16" else 4  # bytes of a number in the computation
    states = {"adam": 8, "rmsprop": 4}[rule] + (2 if stored == 2 else 0)  # 2: the rest of the bf16 master
    kept, moment = layer_bytes(config, b, row_tokens)
    chunk = VOCABULARY_SLICE["cuda" if config._attn_implementation == "flex_attention" else "cpu"]
    items = {
        "weights": P * stored / (ranks if fsdp else 1),
        "gradients": P * stored / (ranks if fsdp else 1),
        "optimizer": P * states / (1 if shard == "none" else ranks),
        "layers in flight": 3 * layer * b + 2 * embedding * b if fsdp else 0,
        "activations": T * ((depth * d * b + kept if checkpointing else depth * kept) + moment),
        # Float32 blocks of its backward: logits, slope, gradient and its product, TDPO's reference; states.
        "head": N * chunk * 4 * (5 if held else 4) + N * d * (4 + 2 * b),
        "tied gradients": 2 * embedding * b,  # the head's waits for the embedding's, then both are summed
        "SAE": 0,
        "reference": P * b / (ranks if fsdp else 1) + T * moment + N * d * b if held else 0,
    }
    if method == "fpo" and sae_shape:  # the encoder; z, c and masks of a slice; the states it reads
        items["SAE"] = 4 * sae_shape[1] * (sae_shape[0] + 4 * min(N, TOKEN_SLICE)) + N * d * b
    return {name: size / 1e9 for name, size in {**items, "total": sum(items.values())}.items()}


def parameters_of(config) -> tuple[int, int]:
    """(numbers in all weights, numbers in a layer)."""
    with torch.device("meta"):  # from_config writes into its argument
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    return tuple(sum(p.numel() for p in module.parameters()) for module in (lm, lm.model.layers[0]))


def layer_bytes(config, b, row_tokens):
    """Bytes a token that a Gemma-2 layer keeps for its backward, and that its widest moment takes on top.

    Four RMSNorms keep input and output in float32, the MLP four tensors of its width, attention its queries,
    keys, values and output; eager repeats keys and values for every head, and keeps a tanh and a softmax of
    each score.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    eager = config._attn_implementation != "flex_attention"
    scores, kv = (config.num_attention_heads * row_tokens, q) if eager else (0, kv)
    softmax = 4 if b == 4 else 4 + b  # float32, and its copy in bf16
    kept = 32 * d + b * (2 * d + 4 * f + 2 * q + 2 * kv) + scores * (b + softmax)
    return kept, max(3 * b * f, 8 * scores)
