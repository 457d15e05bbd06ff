"""The path that trains is the written maths: Policy, masks, losses, audit, scores, cache, in plain form."""

import copy
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import V, build, identity_of, make_lm, make_pairs, make_sae, nudge, plain, predicting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
)

import audit
import fpo
import losses
import metrics
import offline
from batches import collate
from data import Pairs, load_pairs, load_tokenizer
from loading import load_lm
from runtime import UserError
from sae import load_sae

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def reference():
    return make_lm()


@pytest.fixture(scope="module")
def lm(reference):
    return nudge(reference)


@pytest.fixture(scope="module")
def saes():
    return make_sae(0), make_sae(1, k=20)  # JumpReLU, TopK


def policy_of(lm, saes, reference=None):
    policy = fpo.Policy(copy.deepcopy(lm), saes, [(layer, "res") for layer in LAYERS])
    if reference is not None:
        policy.hold_reference(policy_of(reference, saes))
    return policy


LAYOUTS = [
    {"layout": "separate"},
    {"layout": "separate", "row_multiple": 16, "pad_id": 5},
    {"layout": "shared"},
    {"layout": "shared", "row_multiple": 64},
    {"layout": "separate", "row_tokens": 0},  # several documents to a row
    {"layout": "shared", "row_tokens": 1000, "row_multiple": 64},  # all in one
]


@pytest.mark.parametrize("method", losses.METHODS)
@pytest.mark.parametrize("rows", LAYOUTS[1::2], ids=str)
def test_loss_and_gradient_are_those_of_plain_logits(lm, reference, saes, method, rows):
    """Loss and every weight's gradient, against losses.py on transformers' own logits."""
    pairs, B = make_pairs(4, seed=3), 4
    table = {"beta": 0.3, "alpha": 0.7, "gamma": 0.4}
    policy = policy_of(lm, saes, reference)
    loss, values = fpo.method_loss(method, *policy(collate(pairs, range(B), **rows)), **table, k=4)
    loss.mean().backward()

    twin = copy.deepcopy(lm)
    x = plain(twin, reference, saes, LAYERS, pairs)
    w, l = x["logps"].chunk(2)
    ref_w, ref_l = x["ref_logps"].detach().chunk(2)
    n_w, n_l = x["lengths"].chunk(2)
    kl_w, kl_l = x["kl"].chunk(2)
    mse = sum(losses.feature_mse(x[f"features{s}"], x[f"ref_features{s}"], k=4) for s in (0, 1)) / 2
    there = {"logps": w, "lengths": n_w, "policy_chosen_logps": w, "policy_rejected_logps": l, **table}
    there |= {"reference_chosen_logps": ref_w, "reference_rejected_logps": ref_l}
    there |= {"chosen_lengths": n_w, "rejected_lengths": n_l, "chosen_kl": kl_w, "rejected_kl": kl_l}
    there |= dict(zip(("chosen_mse", "rejected_mse"), mse.chunk(2), strict=True))
    loss_of = getattr(losses, f"{method}_loss")
    taken = inspect.signature(loss_of).parameters
    expected = loss_of(**{name: value for name, value in there.items() if name in taken})
    expected.mean().backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for (name, p), q in zip(policy.lm.named_parameters(), twin.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / q.grad.norm().clamp(min=1e-6)
        assert error < 1e-5, (name, error)
    if method != "sft":  # rewards and constraint are logged as the loss has them
        u = values["reward_chosen"] - values["reward_rejected"] - values.get("constraint", 0)
        gamma = table["gamma"] if "simpo" in method else 0
        torch.testing.assert_close(loss, -F.logsigmoid(u - gamma))
        assert ("constraint" in values) == (method in ("fpo", "tdpo1", "tdpo2", "simpo_kl"))
        assert values.get("constraint", torch.ones(1)).abs().max() > 1e-4


def test_step_zero_is_the_reference(reference, saes, tmp_path):
    """An untrained policy: rewards, KL and D_FPO 0, the loss ln 2 for DPO, TDPO, FPO; from the cache too.

    Ties up to rounding count half: it is right half of the time.
    """
    pairs = make_pairs(8)
    policy = policy_of(reference, saes, reference)
    cache = build(policy_of(reference, saes), pairs, tmp_path)
    batch = collate(pairs, range(8), layout="separate")
    mine, held = policy(batch)
    cached = cache.lookup(batch.index)
    assert (mine.logps - cached.logps).abs().max() < 1e-5
    for method in ("dpo", "tdpo1", "tdpo2", "fpo"):
        for ref in (held, cached):
            loss, values = fpo.method_loss(method, mine, ref, beta=0.1)
            torch.testing.assert_close(loss, torch.full((8,), 2.0).log(), atol=1e-5, rtol=0)
            for name, side in itertools.product(("reward", "mse", "kl"), ("chosen", "rejected")):
                assert values[f"{name}_{side}"].abs().max() < 1e-5, name
        for beside in (reference, None):  # in rows of the other layout, so that rounding differs
            policy.hold_reference(beside and policy_of(beside, saes))
            table = metrics.score_pairs(policy, pairs, lookup=cache.lookup, layout="shared")
            for name in REWARDS:
                assert metrics.pair_columns(table, method=method)[name][0].tolist() == [0.5] * 8, name


REWARDS = ("reward_accuracy", "reward_accuracy_sum", "reward_accuracy_mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_pi_of_step_zero_are_the_cache_s_bits(reference, saes, tmp_path, monkeypatch, dtype):
    """By the micro-batches of Phase 1, in any dtype: each pair is a tie. A policy that moved has none."""
    monkeypatch.setattr(offline, "SHARD", 8)
    pairs, rows = make_pairs(21, seed=5), {"layout": "shared", "max_tokens": 90}
    lm = copy.deepcopy(reference).to(dtype)
    policy = policy_of(lm, saes)
    cache = offline.build_reference(policy, pairs, tmp_path, identity_of(policy, pairs), **rows)
    table = metrics.score_pairs(policy, pairs, lookup=cache.lookup, **rows)
    assert not table["ratio_chosen"].any() and not table["ratio_rejected"].any()
    for name in REWARDS:
        assert metrics.pair_columns(table, method="fpo")[name][0].tolist() == [0.5] * 21, name
    moved = policy_of(nudge(lm, scale=1e-3), saes)
    table = metrics.score_pairs(moved, pairs, lookup=cache.lookup, **rows)
    per_token = [table[f"ratio_{side}"] / table[f"lengths_{side}"] for side in ("chosen", "rejected")]
    shares = metrics.pair_columns(table, method="fpo")["reward_accuracy"][0]
    assert shares.tolist() == (per_token[0] > per_token[1]).double().tolist() and 0 < shares.sum() < 21


def test_attention_on_the_cpu(tmp_path):
    """sdpa where a model can have it; not Gemma-2, whose scores have a softcap."""
    for name, kind, expected in (("g", Gemma2ForCausalLM, "eager"), ("l", LlamaForCausalLM, "sdpa")):
        make_lm(kind=kind).save_pretrained(tmp_path / name)
        assert load_lm(str(tmp_path / name), "cpu").config._attn_implementation == expected


SDPA = [Gemma3ForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM]


@pytest.mark.parametrize("kind", SDPA, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rows", LAYOUTS[4:], ids=str)
def test_sdpa_in_packed_rows(kind, rows):
    """log π and gradients are those of each response alone by the model's eager attention; Gemma-3's window
    is shorter than the pairs."""
    more = {"sliding_window": 9, "query_pre_attn_scalar": 8} if kind is Gemma3ForCausalLM else {}
    pairs, lm, alone = make_pairs(5, longest=20), *(make_lm(kind=kind, **more) for _ in range(2))
    lm.set_attn_implementation("sdpa")
    logps = fpo.Policy(lm)(collate(pairs, range(5), **rows))[0].logps
    expected = plain(alone, make_lm(kind=kind, **more), [], [], pairs)["logps"]
    torch.testing.assert_close(logps, expected, atol=2e-5, rtol=1e-5)
    for value in (logps, expected):
        (value * torch.linspace(-1, 1, 10)).sum().backward()
    for p, q in zip(lm.parameters(), alone.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm()


@given(
    seed=st.integers(0, 99), n=st.integers(2, 5), longest=st.integers(4, 30), window=st.integers(1, 20),
    layout=st.sampled_from(["shared", "separate"]), row_tokens=st.integers(0, 200),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_packed_rows_are_single_pairs(seed, n, longest, window, layout, row_tokens):
    """Values and D of pairs of any lengths in shared rows are those of each response alone, unpadded."""
    pairs, saes = make_pairs(n, seed, longest), [make_sae(0)]
    reference = make_lm(sliding_window=window)
    lm = nudge(reference)
    batch = collate(pairs, range(n), layout=layout, row_tokens=row_tokens)
    with torch.no_grad():
        expected = plain(lm, reference, saes, LAYERS[:1], pairs)
        policy = fpo.Policy(lm, saes, [(LAYERS[0], "res")])
        policy.hold_reference(fpo.Policy(reference, saes, [(LAYERS[0], "res")]))
        got, ref = policy(batch, entropy=True)
    far = losses.feature_mse(got.features[0], ref.features[0], k=5)
    plain_far = losses.feature_mse(expected["features0"], expected["ref_features0"], k=5)
    torch.testing.assert_close(far, plain_far, atol=1e-5, rtol=1e-4)
    for name in ("logps", "kl", "entropy", "lengths"):
        torch.testing.assert_close(getattr(got, name), expected[name], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [9, 255, 256, 2000])  # at 255 and 256 one key decides about blocks
@pytest.mark.parametrize("row_tokens", [None, 16384])
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_flex_mask_is_the_eager_mask(lm, layout, row_tokens, window):
    """The BlockMask shows what the additive mask shows, and lists the blocks that torch itself finds."""
    pairs = make_pairs(4, longest=400)
    batch = collate(pairs, range(4), layout=layout, row_multiple=128, row_tokens=row_tokens)
    config, (R, L) = copy.deepcopy(lm.config), batch.tokens.shape
    config.sliding_window = window
    eager = fpo.attention_mask(batch, config, torch.float32)
    config._attn_implementation = "flex_attention"
    flex = fpo.attention_mask(batch, config, torch.float32)
    assert (eager["full_attention"] != eager["sliding_attention"]).any() == (window < batch.reach)
    r, q, k = torch.meshgrid(torch.arange(R), torch.arange(L), torch.arange(L), indexing="ij")
    for kind, block in flex.items():
        assert torch.equal(block.mask_mod(r, 0, q, k), eager[kind][:, 0] == 0), kind
        searched = create_block_mask(block.mask_mod, R, None, L, L, device="cpu")
        assert block.shape == searched.shape and block.BLOCK_SIZE == searched.BLOCK_SIZE
        for mine, theirs in zip(block.as_tuple()[2:10], searched.as_tuple()[2:10], strict=True):
            assert torch.equal(mine, theirs), kind


def test_a_step_leaves_no_states_behind(lm, saes):
    """Blocks that run again in the backward capture nothing: a kept state would hold their activations."""
    policy = fpo.Policy(copy.deepcopy(lm), saes[:1], [(3, "att")]).train()
    policy.lm.activation_checkpointing_enable({"use_reentrant": False})
    statistics, _ = policy(collate(make_pairs(2), range(2), layout="separate"))
    assert not any(norms.requires_grad for norms in statistics.norms)
    (statistics.logps.sum() + statistics.features[0].sum()).backward()
    assert [hook.value for hook in policy._hooks] == [None]


@pytest.mark.slow
@torch.no_grad()  # flex_attention has no backward on the CPU
def test_no_length_of_a_row_compiles_anew():
    """Layers are compiled for the first length, then once for any: both with a window and without."""
    lm, compiled, counts = make_lm(sliding_window=50), CompileCounter(), []
    lm.set_attn_implementation("flex_attention")
    for layer in lm.model.layers:
        layer.compile(backend=compiled)
    policy, lengths = fpo.Policy(lm), []
    for n in (2, 5, 4, 8, 3):
        pairs = make_pairs(n, longest=120)
        batch = collate(pairs, range(n), layout="shared", row_tokens=16384, row_multiple=128)
        policy(batch)
        lengths.append(batch.tokens.shape)
        counts.append(compiled.frame_count)
    assert len(set(lengths)) >= 4 and {rows for rows, _ in lengths} == {1}
    assert counts[0] == 2 and counts[1:] == [4] * 4


# ---- the cache
def test_cache_gives_back_what_the_forward_said(reference, saes, tmp_path, monkeypatch):
    """Exactly, pair by pair, in any order, over several shards."""
    monkeypatch.setattr(offline, "SHARD", 4)
    pairs = make_pairs(10)
    policy = policy_of(reference, saes)
    cache = build(policy, pairs, tmp_path)
    assert len(list(cache.folder.glob("shard_*.safetensors"))) == 3
    with torch.no_grad():
        for index in ([7, 0, 9], [3], [8, 8]):
            got = cache.lookup(torch.tensor(index))
            expected, _ = policy(collate(pairs, index, layout="separate"))
            torch.testing.assert_close(got.logps, expected.logps, atol=1e-5, rtol=1e-6)
            for mine, theirs in zip(got.features, expected.features, strict=True):
                assert (mine > 0).any()
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_cache_identity(reference, saes):
    """A token, weight, threshold, setting, the dtype or layout changed: another cache. Else: the same."""
    pairs, policy = make_pairs(6), policy_of(reference, saes)
    home = identity_of(policy, pairs)
    assert identity_of(policy_of(reference, saes), make_pairs(6)) == home
    assert not {"lr", "alpha", "beta", "k", "method"} & set(home)

    rows = [[part.tolist() for part in pairs[i]] for i in range(6)]
    rows[3][1][0] += 1
    moved, other = policy_of(reference, saes), copy.deepcopy(saes[1])
    moved.lm.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-6
    other.threshold[5] += 1e-6
    others = {"a token": identity_of(policy, Pairs(rows)), "a weight": identity_of(moved, pairs)}
    others["a threshold"] = identity_of(policy_of(reference, (saes[0], other)), pairs)
    topk = copy.deepcopy(saes[1])
    for topk.k in (8, 9):
        others[f"k {topk.k}"] = identity_of(policy_of(reference, (saes[0], topk)), pairs)
    for sites in ([(1, "res"), (2, "res")], [(1, "res"), (3, "mlp")]):  # the same SAE, read elsewhere
        others[f"{sites}"] = identity_of(fpo.Policy(copy.deepcopy(reference), saes, sites), pairs)
    others["dtype"] = identity_of(policy_of(copy.deepcopy(reference).to(torch.bfloat16), saes), pairs)
    others["layout"] = identity_of(policy, pairs, layout="shared")
    for name, value in (("final_logit_softcapping", 29.0), ("sliding_window", 8), ("rms_norm_eps", 1e-5)):
        changed = policy_of(reference, saes)
        changed.lm.config = copy.deepcopy(changed.lm.config)
        setattr(changed.lm.config, name, value)
        others[name] = identity_of(changed, pairs)
    assert not [name for name, identity in others.items() if identity == home]
    assert others["k 8"] != others["k 9"]


def test_digest_tells_names_shapes_and_types_apart():
    x, y = torch.arange(4), torch.ones(4).long()
    home = offline.digest({"a": x, "b": y})
    assert home == offline.digest({"b": y, "a": x})
    for other in ({"a": y, "b": x}, {"a": x.view(2, 2), "b": y}, {"a": x.double(), "b": y}):
        assert home != offline.digest(other)
    assert offline.digest({"a": y}) != offline.digest({"a": y.view(torch.float64)})  # the same bytes


# ---- models that can't be trained this way
def test_models_that_do_not_fit(reference):
    """One line each: attention's kind, a head's bias, another name for the body, layers of another kind."""
    flash = copy.deepcopy(reference)
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="eager, sdpa or flex_attention"):
        fpo.Policy(flash)
    biased = copy.deepcopy(reference)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    with pytest.raises(UserError, match="a head without bias"):
        fpo.Policy(biased)
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=V, attn_implementation="eager")
    with pytest.raises(UserError, match="GPT2LMHeadModel: a decoder with `model`"):
        fpo.Policy(GPT2LMHeadModel(gpt2))
    hybrid = make_lm()
    hybrid.config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(UserError, match=r"layers of .'linear_attention'"):
        fpo.Policy(hybrid)


# ---- the audit: a forward that is wrong, or not the same twice, is refused before anything is trained


def test_bf16_weights_have_a_float32_residual_stream(world):
    """Its states are no bf16 numbers; rounding the products alone makes half the D_FPO of rounding it too."""
    sae = load_sae(world / "sae", layer=3, width="512")
    pairs = load_pairs(str(world / "test.jsonl"), load_tokenizer(str(world / "model")))
    exact = Gemma2ForCausalLM.from_pretrained(world / "model", attn_implementation="eager").bfloat16()
    batch, both = collate(pairs, range(100), layout="shared"), (exact, copy.deepcopy(exact).float())
    policy, truth = (fpo.Policy(lm, [sae], [(3, "res")]) for lm in both)  # the same weights
    with torch.no_grad():
        (h,), truth, ours = policy.read_sites(batch), truth(batch)[0], policy(batch)[0]
        policy.dtype = torch.float32  # the same forward without autocast: everything is bf16
        rounded = policy(batch)[0]
    assert (h == h.bfloat16()).float().mean() < 0.2  # a tenth, on any processor
    far, near = (fpo.feature_distance(x.features, truth.features, k=50).mean() for x in (rounded, ours))
    assert 0 < near < 0.8 * far  # 0.53 to 0.54 with AVX-512, AVX2, SSE4.1
    policy.dtype = torch.bfloat16  # the floor that the audit prints, of 8 pairs, agrees: 1.5 to 1.9 times it
    assert near / 3 < audit.noise_floor(policy, pairs, layout="shared") < 4 * near


# ---- scores
def test_rewards_and_ties_by_hand():
    """Three pairs: chosen better per token but not in sum; a tie; worse in both."""
    assert 3.0e-5 < metrics.ROUNDING < 3.1e-5
    table = {
        "logps_chosen": [-4.0, -5.0, -9.0], "logps_rejected": [-3.0, -5.0, -8.0],
        "lengths_chosen": [4, 5, 3], "lengths_rejected": [2, 5, 4],
        "ratio_chosen": [1.0, 0.3, -1.0], "ratio_rejected": [2.0, 0.3 + 9e-5, 1.0],
        "entropy_chosen": [4.0, 5.0, 3.0], "entropy_rejected": [1.0, 2.0, 3.0],
        "kl_chosen": [1.0, 2.0, 3.0], "kl_rejected": [2.0, 1.0, 5.0],
    }  # fmt: skip
    table = {name: torch.tensor(column, dtype=torch.float64) for name, column in table.items()}

    def score(**options):
        columns = metrics.pair_columns(table, **options).items()
        return {name: (above.sum() / below.sum()).item() for name, (above, below) in columns}

    found = score()
    assert "reward_accuracy" not in found
    assert found["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)  # -1 > -1.5; tie; -3 < -2
    assert found["accuracy_sum"] == pytest.approx(0.5 / 3)
    assert found["reward_accuracy_mean"] == pytest.approx(0.5 / 3)  # 0.25 < 1; tie; -1/3 < 1/4
    assert found["reward_accuracy_sum"] == pytest.approx(0.5 / 3)
    assert found["teacher_forced_entropy"] == pytest.approx(18 / 23)
    assert found["kl_gap"] == pytest.approx(0.1 * (1 + 1 + 2) / 3)
    assert score(method="dpo")["reward_accuracy"] == found["reward_accuracy_sum"]
    assert score(method="fpo")["reward_accuracy"] == found["reward_accuracy_mean"]
    assert score(method="simpo")["reward_accuracy"] == found["accuracy"]
    # Of 5 tokens each the sums are off by √10 · 3e-5 = 9.5e-5, the means by a fifth of that: no tie any more.
    table["ratio_rejected"][1] = 0.3 + 1e-4
    assert score()["reward_accuracy_sum"] == score()["reward_accuracy_mean"] == 0


def test_units_are_the_mean_squared_norm_of_the_states(reference, saes, tmp_path):
    """s² of the cache against the states of each response alone; D_FPO is divided by it."""
    pairs, policy = make_pairs(7), policy_of(reference, saes)
    cache = build(policy, pairs, tmp_path)
    total, count = torch.zeros(2, dtype=torch.float64), 0
    for i in range(7):
        for side in (1, 2):
            _, states = predicting(reference, pairs[i][0], pairs[i][side], LAYERS)
            total += torch.stack([h.double().square().sum() for h in states])
            count += len(pairs[i][side])
    units = cache.units(pairs.sizes[:, 1:])
    assert units == pytest.approx((total / count).tolist(), rel=1e-5)
    features = [torch.rand(4, s.m) for s in saes], [torch.rand(4, s.m) for s in saes]
    with_units = fpo.feature_distance(*features, k=3, units=units)
    each = [losses.feature_mse(a, b, k=3) / u for a, b, u in zip(*features, units, strict=True)]
    torch.testing.assert_close(with_units, sum(each) / 2)
