"""bench.py: the script writes its figures, its comparison head is right, the plan counts real bytes."""

import argparse
import json
import sys

import pytest
import torch

import bench
import chunked
import fpo
import memory
import precision
from data import collate


def small(**changes):
    """A tiny shape's flags: 2 pairs of 24 + 2 × 8 tokens, 2 layers."""
    flags = ["--pairs", "2", "--prompt", "24", "--response", "8", "--layers", "2", "--vocab", "300"]
    args = bench.parse_args(flags)
    return bench.with_shape(argparse.Namespace(**vars(args) | changes), "tiny")


def test_the_script_measures_two_methods(tmp_path, monkeypatch):
    out = tmp_path / "figures.json"
    flags = (
        "--shape tiny --pairs 2 --prompt 24 --response 8 --layers 1 --vocab 300 --rounds 2 --peak_tflops 0.5"
    )
    # Each method's memory is measured by the script run again, in a process of its own.
    monkeypatch.setattr(
        sys, "argv", ["bench.py", *flags.split(), "--json", str(out), "--methods", "simpo", "fpo"]
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench.main()
    figures = json.loads(out.read_text())["figures"]["tiny"]
    # Unshared: 2 pairs × 2 rows of 24 + 8. Computed: one row of 24 + 8 + 8 a pair.
    assert (figures["tokens_real"], figures["tokens_computed"]) == (128, 80)
    # Of a layer: q, o 128², k, v 128 × 64, three 128 × 512, four norms; then the embedding and the last norm.
    N = 2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 512 + 4 * 128 + 300 * 128 + 128
    simpo, other = figures["methods"]
    for row in (simpo, other):
        s = row["ms/step"] / 1e3
        assert row["tokens/s"] == pytest.approx(128 / s) and row["pairs/s"] == pytest.approx(2 / s)
        assert row["MFU computed"] == pytest.approx(6 * N * 80 / s / 0.5e12)
        assert 16 * N / 1e9 < row["peak GB"] < 1  # weights, gradients and Adam's states at least
    assert simpo["time/SimPO"] == simpo["memory/SimPO"] == 1
    assert other["memory/SimPO"] == pytest.approx(other["peak GB"] / simpo["peak GB"])


def test_plain_head_equals_the_chunked_one():
    torch.manual_seed(0)
    states, weight, ref_states, ref_weight = (torch.randn(n, 16) for n in (9, 3000, 9, 3000))
    targets = torch.randint(3000, (9,))
    results = []
    for head in (bench.plain_statistics, chunked.token_statistics):
        h, W = states.clone().requires_grad_(), weight.clone().requires_grad_()
        values = head(h, W, targets, softcap=5.0, ref_states=ref_states, ref_weight=ref_weight, entropy=True)
        (values[0] - 0.3 * values[1]).sum().backward()
        results.append([*(v.detach() for v in values), h.grad, W.grad])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-5)


def test_step_moves_every_weight_only_where_a_rank_holds_its_states():
    args = small(rank_of=2)
    steps = bench.Steps(args, ["fpo"])
    before = [p.detach().clone() for p in steps.parameters]
    with steps.turn("fpo") as step:
        step()
    share = {id(p) for p in steps.optimizer.param_groups[0]["params"]}
    moved = {id(p) for p, old in zip(steps.parameters, before, strict=True) if not torch.equal(p, old)}
    assert moved == share and 0 < len(share) < len(before)
    total, mine = (
        sum(p.numel() for p in steps.parameters),
        sum(p.numel() for p in steps.parameters if id(p) in share),
    )
    assert total / 2 <= mine <= 0.6 * total


PLAN = {"method": "fpo", "rule": "adam", "ranks": 1, "shard": "none", "micro_batch_tokens": 1024}
PLAN |= {"response_share": 0.75, "checkpointing": True}


@pytest.mark.parametrize(
    "shape, parameters, layer_KiB", [("gemma-2-2b", 2_614_341_888, 165), ("gemma-2-9b", 9_241_705_984, 262)]
)
def test_plan_of_gemma_2(shape, parameters, layer_KiB):
    args = bench.with_shape(bench.parse_args([]), shape)
    args.config._attn_implementation = "flex_attention"
    items = memory.plan(args.config, dtype="bfloat16", **PLAN)
    # bf16 weight and gradient; Adam's two averages and the other half of the float32 master.
    assert [items[name] * 1e9 for name in ("weights", "gradients", "optimizer")] == [
        pytest.approx(bytes * parameters) for bytes in (2, 2, 10)
    ]
    four = {"ranks": 4, "shard": "states", "rule": "rmsprop"}
    assert memory.plan(args.config, dtype="bfloat16", **PLAN | four)["optimizer"] * 1e9 == 1.5 * parameters
    assert (
        memory.layer_bytes(args.config, 2, 1024)[0] == layer_KiB * 1024
    )  # measured on the real layer, in bf16
    held = memory.plan(args.config, dtype="bfloat16", **PLAN | {"method": "tdpo2"})
    assert held["reference"] * 1e9 > 2 * parameters and items["reference"] == 0
    assert items["total"] == pytest.approx(sum(v for name, v in items.items() if name != "total"))


@pytest.mark.parametrize("dtype, rule", [("float32", "adam"), ("bfloat16", "adam"), ("bfloat16", "rmsprop")])
def test_plan_counts_the_bytes_of_a_small_model(dtype, rule):
    args = small(dtype=dtype)
    lm = bench.make_lm(args)
    optimizer = precision.ExactOptimizer(list(lm.parameters()), 1e-3, rule=rule)
    kept, config = {}, args.config
    for depth in (2, 1):  # the difference is one layer's
        config.num_hidden_layers = depth
        config.layer_types = config.layer_types[:depth]
        model = bench.make_lm(args) if depth == 1 else lm
        kept[depth], tokens, L = saved_bytes(model.train(), args)
    config.num_hidden_layers, config.layer_types = 2, ["sliding_attention", "full_attention"]
    for p in lm.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    items = memory.plan(config, dtype=dtype, **PLAN | {"rule": rule})
    assert items["weights"] * 1e9 == pytest.approx(size(lm.parameters()))
    assert items["gradients"] * 1e9 == pytest.approx(size(p.grad for p in lm.parameters()))
    assert items["optimizer"] * 1e9 == pytest.approx(size(states))
    formula, _ = memory.layer_bytes(config, 4 if dtype == "float32" else 2, L)
    assert (kept[2] - kept[1]) / tokens == pytest.approx(formula, rel=0.01)


def saved_bytes(lm, args):
    """Bytes that the transformer keeps for its backward, weights left out; tokens; length of a row."""
    batch = collate(bench.make_pairs(args, 2), range(2), layout="shared")
    weights, kept = {p.untyped_storage().data_ptr() for p in lm.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held: an address is not given twice
        return tensor

    mask = fpo.attention_mask(batch, lm.config, lm.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.model(batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()), batch.tokens.numel(), batch.tokens.shape[1]


def test_plan_says_whether_it_fits(capsys):
    memory.print_plan({"weights": 79.0, "total": 81.0})
    assert "does not fit 80 GB" in capsys.readouterr().out
    memory.print_plan({"weights": 79.0, "total": 81.0}, gpu_gb=96)
    assert "fits 96 GB" in capsys.readouterr().out
