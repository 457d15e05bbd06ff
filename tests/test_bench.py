"""experiments/bench.py and plan.py: the script writes its figures; bytes, FLOPs and limits by hand."""

import json
import math
import random
from functools import partial

import pytest
import torch
from conftest import SERVER

import data
import runtime
import scale
from experiments import bench, plan

FLAGS = ["--prompt", "24", "--response", "8", "--rounds", "1"]


def test_the_script_measures_two_methods(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: SERVER)  # a new process, at once
    bench.main([*FLAGS, "--json", str(tmp_path / "figures.json"), "--methods", "simpo", "fpo"])
    simpo, other = json.loads((tmp_path / "figures.json").read_text())["figures"]["tiny"]
    assert simpo["pairs/s"] == pytest.approx(8e3 / simpo["ms"])
    # Of 4 layers: q, o 128², k, v 128 × 64, three 128 × 512, four norms; then embedding and last norm.
    N = 4 * (2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 512 + 4 * 128) + 4096 * 128 + 128
    assert 16 * N / 1e9 < simpo["peak GB"] < 1  # weights, gradients and Adam's states at least
    assert simpo["time/simpo"] == simpo["memory/simpo"] == 1
    assert other["memory/simpo"] == pytest.approx(other["peak GB"] / simpo["peak GB"])


def test_one_rank_of_two_updates_about_half():
    args = bench.parse_args([*FLAGS, "--rank_of", "2"])
    policies = bench.make_policies(args, ["tdpo2", "fpo"])
    parameters = list(policies["fpo"].lm.parameters())
    before = [p.detach().clone() for p in parameters]
    for step in bench.make_steps(args, policies).values():
        step()
    moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    sizes = torch.tensor([p.numel() for p in parameters])
    assert 0.5 <= sizes[torch.tensor(moved)].sum() / sizes.sum() <= 0.75


def test_a_step_on_pairs_of_a_data_set(monkeypatch):
    """Gradients are those of the mean over its first pairs, however they are packed and cut."""
    draw, found = random.Random(0), []
    rows = [[[draw.randrange(9_999) for _ in range(draw.randint(2, 60))] for _ in "xwl"] for _ in range(9)]
    monkeypatch.setattr(bench, "load_dataset", lambda args: data.Pairs(rows))
    for limit, unpacked in ((0, []), (200, []), (200, ["--unpacked"])):
        monkeypatch.setattr(bench.Config, "micro_batch_tokens", limit)
        flags = ["--dataset", "d", "--model", "m", "--shape", "tiny", "--pairs", "6", *unpacked]
        args = bench.parse_args(flags)
        made = bench.micro_batches(args, bench.make_pairs(args, 6))
        assert len(made) == 1 if limit == 0 else len(made) > 2
        assert max(int(batch.tokens.max()) for batch in made) < 4096  # ids of another vocabulary are folded
        policies = bench.make_policies(args, ["simpo"])
        lm = policies["simpo"].lm
        steps = bench.make_steps(args, policies)
        monkeypatch.setattr(lm, "zero_grad", lambda **_: None)
        steps["simpo"]()
        found.append(torch.cat([p.grad.flatten() for p in lm.parameters()]))
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-4 * found[0].norm()


def test_bytes_by_hand():
    """x (4 × 8, float32: 128 bytes): two products, and between them four operations, one of which sums."""
    x, W = torch.randn(4, 8), torch.randn(8, 8)
    with plan.Counter() as counter:
        y = x @ W
        z = (y * 2).relu() + x.sum(1, keepdim=True)
        z @ W
    # Each of ×, relu: 128 read, 128 written; the sum: 128, 16; the addition: 128 + 16, 128.
    assert counter.eager == 2 * 256 + 144 + 272
    assert counter.compiled == 128 + 128 + 128  # y and x are read, z is written


@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
def test_bytes_that_scale_py_names(rule):
    """Its table for the CPU: norm 18, scaling 4, Adam 170, RMSprop 150 bytes a parameter."""
    parameter = torch.nn.Parameter(torch.zeros(2**16, dtype=torch.bfloat16))
    optimizer = scale.make_optimizer(rule, [parameter], 1e-3, shard=False)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    wanted, found = [18, 4, 170 if rule == "adam" else 150], []
    norm, scaled = (
        partial(scale.gradient_norm, [parameter]),
        partial(scale.scale_gradients_, [parameter], 0.5),
    )
    for step in (norm, scaled, optimizer.step):
        with plan.Counter() as counter:
            step()
        found.append(counter.eager / 2**16)
    assert found == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize(
    "shape, eager, compiled, fused", [("gemma-2-9b", 0.34, 0.45, 0.59), ("gemma-2-2b", 0.28, 0.37, 0.55)]
)
def test_limits_of_an_h100(shape, eager, compiled, fused):
    """MFU of FPO at 8 × 1024 tokens, 4 ranks, checkpointing; FLOPs against 2 a weight and token."""
    args = bench.parse_args(["--count", "--checkpointing", "--rank_of", "4", "--shape", shape])
    tables = plan.tables(args, bench.all_pairs(args), "fpo")
    T, N, config = 8 * 1024, 8 * 768, args.config
    E = config.vocab_size * config.hidden_size
    layers = (plan.parameters_of(config)[0] - E) * 2 * T
    # Prompt and responses are 2, 3 and 3 blocks of 128: 3, 6 and 6 of themselves, 6 and 6 of the prompt.
    attention = 8 * (3 + 2 * (6 + 6)) * 128**2 * 4 * config.num_attention_heads * config.head_dim
    wanted = {"body": 3 * layers, "recompute": layers, "head": 4 * 2 * N * E, "reference": 0, "clip": 0}
    wanted |= {"attention": 4.5 * config.num_hidden_layers * attention}
    wanted |= {"SAE": 4 * N * 16384 * (config.hidden_size + 16)}  # encoded, then pooled over 16 responses
    found = {row["part"]: row["TFLOP"] * 1e12 for row in tables["by part"]}
    for part, flops in wanted.items():
        assert found[part] == pytest.approx(flops, rel=0.005), part
    mfu = [row["MFU"] for row in tables["at a card's limits"] if row["card"] == "H100 80 GB"]
    assert mfu == pytest.approx([eager, compiled, fused], abs=0.01)


# Of a log-normal distribution: half of the pairs are shorter, 5 % longer; the fill on 4 cards is above this.
SPREADS = {"conversations": (1058, 3000, 0.95), "HH-RLHF": (183, 554, 0.92), "short": (52, 120, 0.82)}


@pytest.mark.parametrize("spread", SPREADS)
def test_fill_of_lengths_like_those_of_real_pairs(spread, monkeypatch, capsys):
    """And an epoch of 32 equal pairs of 128 tokens fills the rows of any number of ranks wholly."""
    (median, longer, least), draw = SPREADS[spread], random.Random(0)
    sigma = math.log(longer / median) / 1.645  # of a normal distribution 5 % lie above 1.645 sigma
    sizes = [max(3, min(4451, int(draw.lognormvariate(math.log(median), sigma)))) for _ in range(640)]
    monkeypatch.setattr(bench.data, "load_tokenizer", lambda name: None)
    for lengths, low, high in ((sizes, least, 1), ([128] * 32, 1, 1)):
        pairs = data.Pairs([([5] * (n // 3), [5] * (n // 3), [5] * (n - 2 * (n // 3))) for n in lengths])
        monkeypatch.setattr(bench.data, "load_pairs", lambda *_, pairs=pairs, **__: pairs)
        bench.main(["--fill", "--dataset", "d", "--model", "m", "--ranks", "4"])
        assert "packed" in capsys.readouterr().out
        apart, packed = bench.fill_table(bench.parse_args(["--fill", "--dataset", "d", "--model", "m"]))
        assert list(packed) == ["rows", "ranks: 4", "ranks: 2", "ranks: 1"]
        for ranks in (4, 2, 1):
            assert low <= packed[f"ranks: {ranks}"] <= high
            assert apart[f"ranks: {ranks}"] <= packed[f"ranks: {ranks}"]


@pytest.mark.parametrize("flag, value", [("rounds", "0"), ("shape", "huge")])
def test_wrong_flags_end_in_one_line(flag, value):
    with pytest.raises(runtime.UserError, match=f"--{flag}.* '?{value}"):
        bench.main([f"--{flag}", value])


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--peer trl --methods fpo", r"--methods: --peer takes only --checkpointing, .*--unpacked$"),
        ("--updates --shape wide", r"--shape: --updates takes only --json$"),
        ("--fill --dataset d --model m --rounds 3", "--rounds: --fill takes only .*--ranks$"),
        ("--count --rounds 3", "--rounds: --count takes only"),
        ("--reference_pass --methods fpo", "--methods: --reference_pass takes only"),
        ("--ranks 2", "--ranks: steps take only"),
        ("--fill --count", "--count.* not allowed with .*--fill"),
        ("--dataset d --model m --prompt 8", "--prompt, --response: the pairs"),
        ("--unpacked", "--unpacked: of the pairs of --dataset"),
    ],
)
def test_flags_that_a_mode_has_no_use_for(flags, says):
    with pytest.raises(runtime.UserError, match=says):
        bench.parse_args(flags.split())


@pytest.mark.parametrize("lengths, layout", [((9, 5, 5), "shared"), ((5, 9, 9), "separate")])
def test_pairs_of_a_data_set_lie_as_train_py_lays_them(lengths, layout, monkeypatch):
    """On a CPU the prompt is shared where it is at least as long as a response, whatever the shape's is."""
    pairs = data.Pairs([[[5] * n for n in lengths]] * 8)
    monkeypatch.setattr(bench, "load_dataset", lambda args: pairs)
    monkeypatch.setattr(bench, "methods_table", lambda args: (args.row_options["layout"], args.title))
    monkeypatch.setattr(bench.runtime, "write_json", lambda path, found: written.append(found["figures"]))
    monkeypatch.setattr(bench, "CUDA", False)
    written = []
    bench.main(["--dataset", "d", "--model", "m", "--shape", "tiny", "--json", "figures.json"])
    assert written == [{"tiny": (layout, f"tiny: 8 pairs of d, {layout} rows")}]
