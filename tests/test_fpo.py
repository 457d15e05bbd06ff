"""The path that trains is the written maths: Policy, masks, losses, audit, scores, cache, in plain form."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import V, make_lm, make_pairs, make_sae, nudge
from transformers import Gemma2ForCausalLM

import fpo
import losses
import offline
from data import Pairs, UserError, collate, load_pairs, load_tokenizer
from sae import load_sae

SITES = ((1, "res"), (3, "res"))


@pytest.fixture(scope="module")
def reference():
    return make_lm()


@pytest.fixture(scope="module")
def lm(reference):
    return nudge(reference)


@pytest.fixture(scope="module")
def saes():
    return make_sae(0), make_sae(1)


def plain(lm, reference, saes, pairs):
    """One unpadded response at a time: transformers' logits, the block's own output, losses.py."""
    rows = []
    for side in (1, 2):
        for i in range(len(pairs)):
            prompt, response = pairs[i][0].long(), pairs[i][side].long()
            ids, n = torch.cat([prompt, response])[None], len(response)
            labels = torch.cat([torch.full_like(prompt, -100), response])[None]
            logits, ref_logits = lm(ids).logits, reference(ids).logits
            row = {
                "logps": losses.sequence_logps(logits, labels)[0],
                "ref_logps": losses.sequence_logps(ref_logits, labels)[0],
                "kl": losses.sequential_kl(logits, ref_logits, labels),
                "lengths": torch.tensor([n]),
            }
            log_p = logits[0, -n - 1 : -1].log_softmax(-1)
            row["entropy"] = -(log_p.exp() * log_p).sum()[None]
            where = (labels != -100).roll(-1, 1)  # the positions before
            for name, model in (("features", lm), ("ref_features", reference)):
                for s, (sae, (layer, _)) in enumerate(zip(saes, SITES, strict=True)):
                    kept = []
                    handle = model.model.layers[layer].register_forward_hook(
                        lambda m, a, out, kept=kept: kept.append(out)
                    )
                    model(ids)
                    handle.remove()
                    row[f"{name}{s}"] = losses.pool_features(sae.encode(kept[0]), where)
            rows.append(row)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def policy_of(lm, saes, reference=None):
    policy = fpo.Policy(copy.deepcopy(lm), saes, SITES)
    if reference is not None:
        policy.hold_reference(policy_of(reference, saes))
    return policy


LAYOUTS = [
    {"layout": "separate"},
    {"layout": "separate", "row_multiple": 16, "pad_id": 5},
    {"layout": "shared"},
    {"layout": "shared", "row_multiple": 64},
]


@pytest.mark.parametrize("rows", LAYOUTS, ids=str)
def test_forward_is_the_written_maths(lm, reference, saes, rows):
    pairs = make_pairs(6)
    with torch.no_grad():
        expected = plain(lm, reference, saes, pairs)
        got, ref = policy_of(lm, saes, reference)(collate(pairs, range(6), **rows), entropy=True)
    assert expected["kl"].min() > 0.01, "the policy must differ from the reference"
    for s in range(2):
        assert (expected[f"features{s}"] > 0).sum() > 100
        torch.testing.assert_close(got.features[s], expected[f"features{s}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ref.features[s], expected[f"ref_features{s}"], atol=1e-5, rtol=1e-5)
    for name in ("logps", "kl", "entropy", "lengths"):
        torch.testing.assert_close(getattr(got, name), expected[name], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ref.logps, expected["ref_logps"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", fpo.METHODS)
@pytest.mark.parametrize("rows", LAYOUTS[1:4:2], ids=str)
def test_loss_and_gradient_are_those_of_plain_logits(lm, reference, saes, method, rows):
    """Loss and every weight's gradient, against losses.py on transformers' own logits."""
    pairs, B = make_pairs(4, seed=3), 4
    table = {"beta": 0.3, "alpha": 0.7, "gamma": 0.4}
    policy = policy_of(lm, saes, reference)
    loss, _ = fpo.method_loss(method, *policy(collate(pairs, range(B), **rows)), **table, k=4)
    loss.mean().backward()

    twin = copy.deepcopy(lm)
    x = plain(twin, reference, saes, pairs)
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
    expected = loss_of(
        **{name: there[name] for name in inspect.signature(loss_of).parameters if name in there}
    )
    expected.mean().backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for (name, p), q in zip(policy.lm.named_parameters(), twin.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / q.grad.norm().clamp(min=1e-6)
        assert error < 1e-5, (name, error)


def test_step_zero_is_the_reference(reference, saes, tmp_path):
    """An untrained policy: rewards, KL and D_FPO 0, the loss ln 2 for DPO, TDPO, FPO; from the cache too."""
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
            for name in (
                "reward_chosen",
                "reward_rejected",
                "mse_chosen",
                "mse_rejected",
                "kl_chosen",
                "kl_rejected",
            ):
                assert values[name].abs().max() < 1e-5, name


def test_micro_batches_do_not_change_the_gradient(lm, reference, saes):
    """4 pairs at once, or 3 + 1 of other padding, weighted by the global batch."""
    pairs = make_pairs(4, seed=5)
    grads = []
    for groups in ([[0, 1, 2, 3]], [[2, 0, 3], [1]], [[3], [2], [1], [0]]):
        policy = policy_of(lm, saes, reference)
        for group in groups:
            loss, _ = fpo.method_loss("fpo", *policy(collate(pairs, group, layout="shared")), beta=0.5, k=20)
            (loss.sum() / 4).backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    for other in grads[1:]:
        assert (other - grads[0]).norm() / grads[0].norm() < 1e-5


def test_padding_pair_has_no_gradient(lm, saes):
    policy = policy_of(lm, saes)
    batch = collate(make_pairs(3), [1], layout="separate", padding_pair=True)
    loss, _ = fpo.method_loss("simpo", *policy(batch), beta=2.0)
    (loss * batch.weight).sum().backward()
    assert all(p.grad.abs().max() == 0 for p in policy.parameters())


# ---- the traps of the mask: each of these silently changes the values
def test_boolean_mask_is_not_what_eager_takes(lm):
    """Why the mask is additive: eager adds a boolean one as 0 and 1."""
    batch = collate(make_pairs(4), range(4), layout="shared")
    right = fpo.attention_mask(batch, lm.config, torch.float32)
    wrong = {kind: mask == 0 for kind, mask in right.items()}
    out = [
        lm.model(batch.tokens, position_ids=batch.positions, attention_mask=m).last_hidden_state.flatten(
            0, 1
        )[batch.state]
        for m in (right, wrong)
    ]
    assert (out[0] - out[1]).abs().max() > 0.1
    assert all(mask.dtype == torch.float32 for mask in right.values())


def test_positions_without_mask_are_not_enough(lm):
    """Why a mask is passed at all: transformers takes the jump of positions for a new document."""
    batch = collate(make_pairs(4), range(4), layout="shared")
    mask = fpo.attention_mask(batch, lm.config, torch.float32)
    out = [
        lm.model(batch.tokens, position_ids=batch.positions, attention_mask=m).last_hidden_state.flatten(
            0, 1
        )[batch.state]
        for m in (mask, None)
    ]
    assert (out[0] - out[1]).abs().max() > 0.1


def test_window_counts_positions_not_places(lm, reference):
    """In a shared row the rejected response stands far behind its prompt, but its positions follow it."""
    pairs = Pairs([([2, 5, 6], list(range(10, 40)), [41, 42, 43])])
    with torch.no_grad():
        shared, _ = fpo.Policy(copy.deepcopy(lm))(collate(pairs, [0], layout="shared"))
        separate, _ = fpo.Policy(copy.deepcopy(lm))(collate(pairs, [0], layout="separate"))
    torch.testing.assert_close(shared.logps, separate.logps, atol=1e-5, rtol=1e-5)


def test_flex_mask_is_the_eager_mask(lm):
    """The BlockMask of flex_attention, made dense, shows what the additive mask shows."""
    batch = collate(make_pairs(3), range(3), layout="shared", row_multiple=128)
    eager = fpo.attention_mask(batch, lm.config, torch.float32)
    config = copy.deepcopy(lm.config)
    config._attn_implementation = "flex_attention"
    flex = fpo.attention_mask(batch, config, torch.float32)
    R, L = batch.tokens.shape
    for kind, block in flex.items():
        r, q, k = torch.meshgrid(torch.arange(R), torch.arange(L), torch.arange(L), indexing="ij")
        assert torch.equal(block.mask_mod(r, 0, q, k), eager[kind][:, 0] == 0), kind


# ---- the cache
def identity_of(policy, pairs, layout="separate"):
    weights = offline.digest(policy.lm.state_dict())
    return offline.reference_identity(policy, pairs, weights=weights, arithmetic={"layout": layout})


def build(policy, pairs, folder, layout="separate"):
    return offline.build_reference(policy, pairs, folder, identity_of(policy, pairs, layout), layout=layout)


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
    assert identity_of(policy, Pairs(rows)) != home
    moved = policy_of(reference, saes)
    with torch.no_grad():
        moved.lm.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-6
    assert identity_of(moved, pairs) != home
    sae = copy.deepcopy(saes[1])
    sae.threshold[5] += 1e-6
    assert identity_of(policy_of(reference, (saes[0], sae)), pairs) != home
    assert identity_of(policy_of(copy.deepcopy(reference).to(torch.bfloat16), saes), pairs) != home
    assert identity_of(policy, pairs, layout="shared") != home
    for name, value in (("final_logit_softcapping", 29.0), ("sliding_window", 8), ("rms_norm_eps", 1e-5)):
        other = policy_of(reference, saes)
        other.lm.config = copy.deepcopy(other.lm.config)
        setattr(other.lm.config, name, value)
        assert identity_of(other, pairs) != home, name


def test_cache_goes_on_after_an_interruption(reference, saes, tmp_path, monkeypatch):
    """Killed in the third shard: the first two are kept as they are, the rest is made."""
    monkeypatch.setattr(offline, "SHARD", 3)
    pairs = make_pairs(11)
    policy = policy_of(reference, saes)
    whole = build(policy, pairs, tmp_path / "whole").lookup(torch.arange(11))
    write, written = offline._write_shard, []

    def dies(path, parts):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, parts)
        written.append(path)

    monkeypatch.setattr(offline, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        build(policy, pairs, tmp_path / "cut")
    times = {path: path.stat().st_mtime_ns for path in written}
    written[1].write_bytes(written[1].read_bytes()[:-5])  # and one of them was truncated
    monkeypatch.setattr(offline, "_write_shard", write)
    cache = build(policy, pairs, tmp_path / "cut")
    assert (
        written[0].stat().st_mtime_ns == times[written[0]]
        and written[1].stat().st_mtime_ns != times[written[1]]
    )
    again = cache.lookup(torch.arange(11))
    assert torch.equal(again.logps, whole.logps) and torch.equal(again.features[0], whole.features[0])
    assert not list(cache.folder.glob("*.tmp"))


# ---- models that can't be trained this way
def test_models_that_do_not_fit(reference, saes):
    sdpa = copy.deepcopy(reference)
    sdpa.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match="eager or flex_attention"):
        fpo.Policy(sdpa)
    with pytest.raises(UserError, match="reads width 20, the model has 32"):
        fpo.Policy(copy.deepcopy(reference), [make_sae(d=20)], [(1, "res")])
    biased = copy.deepcopy(reference)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    with pytest.raises(UserError, match="a head without bias"):
        fpo.Policy(biased)


def test_architectures_that_are_refused():
    """One line each: another name for the body, layers that are no attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=V, attn_implementation="eager")
    with pytest.raises(UserError, match="GPT2LMHeadModel: a decoder with `model`"):
        fpo.Policy(GPT2LMHeadModel(gpt2))
    hybrid = make_lm()
    hybrid.config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(UserError, match=r"layers of .'linear_attention'"):
        fpo.Policy(hybrid)


def test_other_decoders(saes):
    """Llama and Qwen2 (one mask for all layers, no softcap): log-probabilities of plain logits."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}  # fmt: skip
    pairs = make_pairs(3)
    for config, kind in ((LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)):
        torch.manual_seed(0)
        lm = kind(config(**shape)).eval()
        with torch.no_grad():
            got, _ = fpo.Policy(lm, saes[:1], ((1, "res"),))(collate(pairs, range(3), layout="shared"))
            for i in range(3):
                ids = torch.cat(pairs[i][:2]).long()
                logp = F.log_softmax(lm(ids[None]).logits[0], -1)
                n = len(pairs[i][1])
                expected = logp[-n - 1 : -1].gather(1, ids[-n:, None]).sum()
                torch.testing.assert_close(got.logps[i], expected, atol=1e-5, rtol=1e-5)


# ---- the audit: a forward that is wrong, or not the same twice, is refused before anything is trained
def test_audit_measures_the_difference(lm, saes):
    """Our forward and transformers' own agree to rounding, in both layouts; the window of 9 is tested."""
    for rows in LAYOUTS:
        found = fpo.audit(policy_of(lm, saes), make_pairs(6), k=4, **rows)
        assert found["difference"] < 1e-5 and found["floor"] < 1e-9 and found["window"] == 9


@pytest.mark.parametrize("fault", ["softcap", "window", "dropout", "multiplier"])
def test_audit_refuses(lm, saes, fault, monkeypatch):
    """What our forward gets wrong is named with its size; dropout shows as two runs that differ."""
    policy, says = policy_of(lm, saes), "differs from the model's own forward by"
    if fault == "softcap":  # our softcap is read from the config, the model's own from its module
        statistics = fpo.token_statistics

        def wrong(*args, **options):
            return statistics(*args, **{**options, "softcap": None})

        monkeypatch.setattr(fpo, "token_statistics", wrong)
    elif fault == "window":
        whole = fpo.attention_mask

        def same(*args):
            return dict.fromkeys(whole(*args), whole(*args)["full_attention"])

        monkeypatch.setattr(fpo, "attention_mask", same)
    elif fault == "dropout":
        says = "two runs of one batch differ"
        norm = policy.lm.model.norm
        norm.register_forward_hook(lambda m, a, out: F.dropout(out, 0.1, training=m.training))
    else:  # a head that scales its input, as some families do
        head = policy.lm.lm_head
        head.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
    with pytest.raises(UserError, match=says):
        fpo.audit(policy, make_pairs(6), layout="shared")


def test_bf16_weights_have_a_float32_residual_stream(world):
    """Rounding the products alone leaves less than 0.7 of the D_FPO that rounding the stream too makes."""
    sae = load_sae(world / "sae", layer=3, width="512")
    pairs = load_pairs(str(world / "test.jsonl"), load_tokenizer(str(world / "model")))
    exact = Gemma2ForCausalLM.from_pretrained(world / "model", attn_implementation="eager").bfloat16()
    batch, policy = collate(pairs, range(24), layout="shared"), fpo.Policy(exact, [sae], [(3, "res")])
    truth = fpo.Policy(copy.deepcopy(exact).float(), [sae], [(3, "res")])  # the same weights
    with torch.no_grad():
        truth, states, ours = truth(batch)[0], policy.read_sites(batch)[0], policy(batch)[0]
        policy.dtype = torch.float32  # the same forward without autocast: everything is bf16
        rounded = policy(batch)[0]
    assert states.dtype == torch.float32 and not torch.equal(states, states.bfloat16().float())
    far, near = (fpo.feature_distance(x.features, truth.features, k=50).mean() for x in (rounded, ours))
    assert 0 < near < 0.7 * far


def test_noise_floor_is_the_distance_of_two_roundings(lm, saes):
    """An independent count, of a layer whose output depends on the number of rows: 8 shared ones, or 16."""
    pairs = make_pairs(8)
    policy = policy_of(lm, saes)
    policy.lm.model.layers[0].register_forward_hook(lambda m, a, out: out * (1 + 1e-3 * len(out)))
    floor = fpo.noise_floor(policy, pairs, k=4, layout="separate")
    with torch.no_grad():
        x, y = (policy(collate(pairs, range(8), layout=how))[0].features for how in ("shared", "separate"))
    D = [losses.feature_mse(a, b, k=4).mean().item() for a, b in zip(x, y, strict=True)]
    assert floor > 1e-6 and floor == pytest.approx(sum(D) / 2, rel=1e-5)


# ---- scores
def test_rewards_and_ties_by_hand():
    """Three pairs: chosen better per token but not in sum; a tie; worse in both."""
    table = {
        "logps_chosen": [-4.0, -5.0, -9.0], "logps_rejected": [-3.0, -5.0, -8.0],
        "lengths_chosen": [4, 5, 3], "lengths_rejected": [2, 5, 4],
        "ratio_chosen": [1.0, 0.3, -1.0], "ratio_rejected": [2.0, 0.3 + 2e-6, 1.0],
        "entropy_chosen": [4.0, 5.0, 3.0], "entropy_rejected": [1.0, 2.0, 3.0],
        "kl_chosen": [1.0, 2.0, 3.0], "kl_rejected": [2.0, 1.0, 5.0],
    }  # fmt: skip
    table = {name: torch.tensor(column, dtype=torch.float64) for name, column in table.items()}

    def score(**options):
        columns = fpo.pair_columns(table, **options).items()
        return {name: (above.sum() / below.sum()).item() for name, (above, below) in columns}

    found = score()
    assert "reward_accuracy" not in found
    assert found["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)  # -1 > -1.5; tie; -3 < -2
    assert found["accuracy_sum"] == pytest.approx(0.5 / 3)
    assert found["reward_accuracy_mean"] == pytest.approx(0.5 / 3)  # 0.25 < 1; tie: 4e-7 a token; -1/3 < 1/4
    assert found["reward_accuracy_sum"] == pytest.approx(0.5 / 3)
    assert found["teacher_forced_entropy"] == pytest.approx(18 / 23)
    assert found["kl_margin"] == pytest.approx(0.1 * (1 + 1 + 2) / 3)
    assert score(method="dpo")["reward_accuracy"] == found["reward_accuracy_sum"]
    assert score(method="fpo")["reward_accuracy"] == found["reward_accuracy_mean"]
    assert score(method="simpo")["reward_accuracy"] == found["accuracy"]


@pytest.mark.parametrize("method", ["dpo", "tdpo2", "fpo"])
def test_an_untrained_model_is_right_half_of_the_time(reference, saes, tmp_path, method):
    """Its rewards are 0 up to rounding, and ties count half: 0.5, from the cache and beside the reference."""
    pairs, policy = make_pairs(10), policy_of(reference, saes)
    cache = build(policy, pairs, tmp_path)
    if method == "tdpo2":
        policy.hold_reference(policy_of(reference, saes))
    table = fpo.score_pairs(policy, pairs, lookup=cache.lookup, layout="shared")
    for name in ("reward_accuracy", "reward_accuracy_sum", "reward_accuracy_mean"):
        above, below = fpo.pair_columns(table, method=method)[name]
        assert (above.sum() / below.sum()).item() == 0.5, name


def test_units_are_the_mean_squared_norm_of_the_states(reference, saes, tmp_path):
    """s² of the cache against the states of each response alone; D_FPO is divided by it."""
    pairs, policy = make_pairs(7), policy_of(reference, saes)
    cache = build(policy, pairs, tmp_path)
    total, count = torch.zeros(2, dtype=torch.float64), 0
    for i in range(7):
        for side in (1, 2):
            ids, n = torch.cat([pairs[i][0], pairs[i][side]]).long()[None], len(pairs[i][side])
            states = reference(ids, output_hidden_states=True).hidden_states
            # SITES: layer 1's output is hidden_states[2]; the last layer's is before the final norm.
            kept = []
            handle = reference.model.layers[3].register_forward_hook(lambda m, a, out: kept.append(out))  # noqa: B023
            reference(ids)
            handle.remove()
            for s, h in enumerate((states[2], kept[0])):
                total[s] += h[0, -n - 1 : -1].double().square().sum()
            count += n
    units = cache.units(pairs.sizes[:, 1:])
    assert units == pytest.approx((total / count).tolist(), rel=1e-5)
    features = [torch.rand(4, s.m) for s in saes], [torch.rand(4, s.m) for s in saes]
    with_units = fpo.feature_distance(*features, k=3, units=units)
    each = [losses.feature_mse(a, b, k=3) / u for a, b, u in zip(*features, units, strict=True)]
    torch.testing.assert_close(with_units, sum(each) / 2)


def test_constraint_is_logged_as_the_loss_has_it(lm, reference, saes):
    """-log σ(u) with u = LPD - γ_ref - constraint, all from the logged values."""
    policy = policy_of(lm, saes, reference)
    for method in ("fpo", "tdpo1", "tdpo2"):
        loss, v = fpo.method_loss(method, *policy(collate(make_pairs(5), range(5))), beta=0.3, alpha=0.7, k=4)
        u = v["reward_chosen"] - v["reward_rejected"] - v["constraint"]
        torch.testing.assert_close(loss, -F.logsigmoid(u))
        assert v["constraint"].abs().max() > 1e-4 and u.isfinite().all()
