"""experiments/plan.py: its bytes are those of whole steps, on fake tensors and on real ones."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import batches
import data
import fpo
import scale
from experiments import plan
from loading import ROWS

# Gemma-2-2B's shape with every width a ninth, and Qwen3's, whose heads together are wider than the model.
GEMMA = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA |= {"head_dim": 128, "num_hidden_layers": 5}
QWEN = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN |= {"head_dim": 64, "num_hidden_layers": 5}
# Five pairs of 108, 107, … tokens in one row: 530 of them, padded to 640.
LENGTHS = [(24, 42, 42 - i) for i in range(5)]
PAIRS = data.Pairs([[[5] * n for n in lengths] for lengths in LENGTHS])
BATCH = batches.collate(PAIRS, range(5), layout="shared", **ROWS["cuda"])


@pytest.mark.parametrize("name, P", [("gemma-2-2b", 2_614_341_888), ("gemma-2-9b", 9_241_705_984)])
def test_bytes_of_a_parameter(name, P):
    options = {"method": "tdpo2", "rule": "rmsprop", "ranks": 1}
    found = plan.plan(plan.MODELS[name][0], BATCH, **options)
    # bf16 weight; RMSprop's average and the rest of the float32 master; the frozen reference.
    bytes_each = [found[item] * 1e9 / P for item in ("weights", "optimizer", "reference")]
    assert bytes_each == pytest.approx([2, 6, 2])


@pytest.mark.parametrize("name, billions", [("gemma-3-1b", 1.0), ("qwen3-1.7b", 1.72), ("qwen3-8b", 8.19)])
def test_parameters_that_the_makers_name(name, billions):
    assert plan.parameters_of(plan.MODELS[name][0])[0] / 1e9 == pytest.approx(billions, rel=0.005)


def test_live_bytes_by_hand():
    with plan.LiveBytes() as live:
        x = torch.zeros(100)
        y = x + x
        assert live.now == live.peak == 800
        z = x[:50].view(5, 10)  # a view is no bytes
        del x
        assert live.now == 800
        del y, z
    assert (live.now, live.peak) == (0, 800)


@pytest.mark.parametrize("config", [Gemma2Config(**GEMMA), Qwen3Config(**QWEN)], ids=["gemma", "qwen"])
def test_bytes_that_a_real_layer_keeps(config):
    """Of a model of two layers less those of one, under autocast in bf16: all that autograd saves of them."""
    kept = []
    for depth in (1, 2):
        shallow, saved = (
            type(config)(**config.to_dict() | {"num_hidden_layers": depth, "layer_types": None}),
            {},
        )
        options = {"dtype": torch.bfloat16, "attn_implementation": "one_kernel"}
        lm = AutoModelForCausalLM.from_config(shallow, **options)
        weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}

        def keep(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        masks = dict.fromkeys(("full_attention", "sliding_attention"))
        stream = torch.randn(1, 640, config.hidden_size, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast("cpu", torch.bfloat16),
        ):
            _ = lm.model(inputs_embeds=stream, attention_mask=masks, use_cache=False)
        kept.append(sum(storage.nbytes() for place, storage in saved.items() if place not in weights))
    found = plan.body_bytes(config, BATCH, 2, checkpointing=False)[1]
    assert kept[1] - kept[0] == pytest.approx(found, rel=0.001)


def take_step(config, method, checkpointing, size, m, k):
    """A whole step but for the optimizer: no formula, the real code."""
    options = {"dtype": plan.DTYPES[size], "attn_implementation": "flex_attention"}
    lm, saes = AutoModelForCausalLM.from_config(config, **options), []
    if method == "fpo":
        d = config.hidden_size
        arrays = {"W_enc": torch.zeros(d, m), "b_enc": torch.zeros(m), "threshold": torch.zeros(m)}
        saes = [SimpleNamespace(**arrays, k=k, d=d, m=m)]
    policy = fpo.Policy(lm, saes, [(config.num_hidden_layers - 1, "res")] * len(saes), fused=False)
    if method == "tdpo2":
        reference = AutoModelForCausalLM.from_config(config, **options)
        policy.hold_reference(fpo.Policy(reference, fused=False))
    if checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    for parameter in policy.train().parameters():
        parameter.grad = torch.zeros_like(parameter)
    statistics, held = policy(BATCH)
    held = held or fpo.Statistics(torch.zeros(10), features=(torch.zeros(10, m),) * len(saes))
    fpo.method_loss(method, statistics, held, beta=0.1, alpha=0.5)[0].mean().backward()


# By the worst moment. The model; columns of logits at once; method, checkpointing, bytes of a number, the
# SAE's m and k.
STEPS = {
    "last layer": (Gemma2Config(**GEMMA, vocab_size=9000), 300, ("fpo", True, 2, 1024, None)),
    "head": (Gemma2Config(**GEMMA, vocab_size=9000), 8192, ("fpo", True, 2, 1024, None)),
    "head, all kept": (Gemma2Config(**GEMMA, vocab_size=4000), 8192, ("tdpo2", False, 4, 8, None)),
    "SAE, TopK": (Qwen3Config(**QWEN, vocab_size=300), 8192, ("fpo", False, 2, 8192, 20)),
    "head, untied": (Qwen3Config(**QWEN, vocab_size=9000), 8192, ("dpo", True, 2, 8, None)),
    "layer, untied": (Qwen3Config(**QWEN, vocab_size=9000), 300, ("dpo", True, 2, 8, None)),
    "Gemma-3": (Gemma3TextConfig(**GEMMA, vocab_size=2000), 8192, ("fpo", False, 2, 1024, None)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_packed_rows_on_fake_tensors(name, monkeypatch):
    config, columns, (method, checkpointing, size, m, k) = STEPS[name]
    monkeypatch.setitem(scale.VOCABULARY_SLICE, "cuda", columns)
    assert BATCH.tokens.shape == (1, 640)
    with plan.like_a_card(), plan.LiveBytes() as live:
        take_step(config, *STEPS[name][2])
    options = {"checkpointing": checkpointing, "size": size, "sae_width": m, "sae_k": k}
    found = plan.plan(config, BATCH, method=method, rule="adam", **options)
    assert found["total"] - found["optimizer"] == pytest.approx(live.peak / 1e9, rel=0.01)


def test_a_step_on_real_tensors(monkeypatch):
    """Where the gradient of a tied embedding is the worst moment. By what the allocator was asked for."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", plan.one_kernel)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(scale.VOCABULARY_SLICE, device, 1000)
    config = Gemma2Config(**GEMMA, vocab_size=40_000)
    with torch.profiler.profile(profile_memory=True) as profile:
        take_step(config, "dpo", True, 4, 8, None)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
    )
    found = plan.plan(config, BATCH, method="dpo", rule="adam", size=4)
    assert found["total"] - found["optimizer"] == pytest.approx(max(held) / 1e9, rel=0.01)


def test_attention_of_a_model_without_layer_types():
    """Llama's: one mask for all layers; a block of queries sees its own block and those before it."""
    pairs = data.Pairs([([2] * 100, [5] * 100, [6] * 56)])
    batch = batches.collate(pairs, [0], layout="separate", row_tokens=256, row_multiple=128)
    config = LlamaConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, head_dim=8)
    config._attn_implementation = "flex_attention"
    assert not hasattr(config, "layer_types")
    # Documents of 200 and 156 tokens in rows of 256: blocks (0, 0), (1, 0) and (1, 1) of each of two rows.
    visited = 3 * 2 * 3 * 128**2
    assert plan.attention_flops(config, batch) == 2 * 2 * 4 * 8 * visited
