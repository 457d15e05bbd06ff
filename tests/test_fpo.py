"""The path that trains is the maths that is written: Policy, masks, head, pooling, cache, in plain form."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import M, V, make_lm, make_pairs, make_sae, nudge

import chunked
import fpo
import losses
import offline
from data import Pairs, collate

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


def policy_of(lm, saes, reference=None, k=None):
    policy = fpo.Policy(copy.deepcopy(lm), saes, SITES, k)
    if reference is not None:
        policy.hold_reference(copy.deepcopy(reference))
    return policy


LAYOUTS = [
    {"layout": "separate"},
    {"layout": "separate", "row_multiple": 16, "pad_id": 5},
    {"layout": "shared"},
    {"layout": "shared", "row_multiple": 64},
    {"layout": "shared", "pack_to": 90},
    {"layout": "separate", "pack_to": 60},
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
@pytest.mark.parametrize("rows", LAYOUTS[1:4:2] + LAYOUTS[4:5], ids=str)
def test_loss_and_gradient_are_those_of_plain_logits(lm, reference, saes, method, rows):
    """Loss and every weight's gradient, against losses.py on transformers' own logits."""
    pairs, B = make_pairs(4, seed=3), 4
    table = {"beta": 0.3, "alpha": 0.7, "gamma": 0.4}
    policy = policy_of(lm, saes, reference, k=4)
    loss, _ = fpo.method_loss(method, *policy(collate(pairs, range(B), **rows)), **table, k=4)
    loss.mean().backward()

    twin = copy.deepcopy(lm)
    x = plain(twin, reference, saes, pairs)
    w, l = x["logps"].chunk(2)
    ref_w, ref_l = x["ref_logps"].detach().chunk(2)
    n_w, n_l = x["lengths"].chunk(2)
    kl_w, kl_l = x["kl"].chunk(2)
    mse = sum(losses.feature_mse(x[f"features{s}"], x[f"ref_features{s}"], k=4) for s in (0, 1)) / 2
    four, b, a, c = (w, l, ref_w, ref_l), {"beta": 0.3}, {"alpha": 0.7}, {"gamma": 0.4}
    expected = {
        "sft": lambda: losses.sft_loss(w, n_w),
        "dpo": lambda: losses.dpo_loss(*four, **b),
        "simpo": lambda: losses.simpo_loss(w, l, n_w, n_l, **b, **c),
        "simpo_kl": lambda: losses.simpo_kl_loss(w, l, n_w, n_l, kl_w, kl_l, **b, **c, **a),
        "tdpo1": lambda: losses.tdpo1_loss(*four, kl_w, kl_l, **b),
        "tdpo2": lambda: losses.tdpo2_loss(*four, kl_w, kl_l, **b, **a),
        "fpo": lambda: losses.fpo_loss(*four, n_w, n_l, *mse.chunk(2), **b, **a),
    }[method]()
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


# ---- the head over vocabulary slices
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("chunk", [7, 97, 1000])
def test_head_against_plain_logits(softcap, chunk):
    """Values and gradients of log-probability, KL and entropy, float64, against plain log_softmax."""
    torch.manual_seed(0)
    h, W = torch.randn(11, 6, dtype=torch.float64), torch.randn(V, 6, dtype=torch.float64)
    h_ref, W_ref = h + 0.1 * torch.randn_like(h), W + 0.1 * torch.randn_like(W)
    target = torch.randint(0, V, (11,))
    cap = lambda z: z if softcap is None else softcap * (z / softcap).tanh()  # noqa: E731
    results = []
    for plainly in (True, False):
        a, b = h.clone().requires_grad_(), W.clone().requires_grad_()
        if plainly:
            log_p, log_r = cap(a @ b.T).log_softmax(-1), cap(h_ref @ W_ref.T).log_softmax(-1)
            logp, ref = log_p[range(11), target], log_r[range(11), target]
            kl, H = (log_r.exp() * (log_r - log_p)).sum(-1), -(log_p.exp() * log_p).sum(-1)
        else:
            logp, kl, ref, H = chunked._TokenStatistics.apply(
                a, b, target, softcap, h_ref, W_ref, chunk, True
            )
        (logp * torch.linspace(-1, 2, 11) + kl * torch.linspace(0.5, 1, 11)).sum().backward()
        results.append([logp, kl, ref, H, a.grad, b.grad])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-9)


def test_head_gradcheck():
    torch.manual_seed(0)
    h, W = (
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(9, 4, dtype=torch.float64, requires_grad=True),
    )
    h_ref, W_ref, target = torch.randn(3, 4).double(), torch.randn(9, 4).double(), torch.tensor([0, 8, 4])

    def apply(h, W):
        return chunked._TokenStatistics.apply(h, W, target, 3.0, h_ref, W_ref, 4, False)[:2]

    assert torch.autograd.gradcheck(apply, (h, W))


def test_head_stays_finite_far_out():
    """A logit 200 above the rest in float32: log-probability -200, KL finite."""
    h, W = torch.tensor([[1.0]]), torch.tensor([[200.0], [0.0], [0.0]])
    logp, kl, _, H = chunked.token_statistics(
        h, W, torch.tensor([1]), ref_states=h, ref_weight=W.flip(0), entropy=True
    )
    assert logp.item() == -200 and kl.item() == 200 and H.item() == 0


# ---- pooled features
def test_pooled_features_against_the_kept_ones(saes):
    """Value and gradient against encode, then a mean; chunks end within a response; one response is empty."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 0, 7, 1])
    owner = torch.arange(4).repeat_interleave(lengths)
    h = torch.randn(13, saes[0].d, requires_grad=True)
    g = torch.randn(4, M)
    sae = saes[0]
    pooled = chunked._PooledFeatures.apply(h, sae.W_enc, sae.b_enc, sae.threshold, owner, lengths, 4, None)
    (pooled * g).sum().backward()
    grad, h.grad = h.grad, None
    expected = torch.stack(
        [part.mean(0) if len(part) else torch.zeros(M) for part in sae.encode(h).split([5, 0, 7, 1])]
    )
    (expected * g).sum().backward()
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad, h.grad, atol=1e-6, rtol=1e-5)


def test_pooled_backward_of_few_features(saes):
    """A gradient on at most 3 features of each of 4 responses: as in full. On more of them: NaN."""
    torch.manual_seed(0)
    lengths, sae = torch.tensor([5, 2, 7, 1]), saes[0]
    owner = torch.arange(4).repeat_interleave(lengths)
    h = torch.randn(15, sae.d)
    for features in (3, 40):
        g = torch.zeros(4, M)
        for row in g:
            row[torch.randperm(M)[:features]] = torch.randn(features)
        grads = []
        for most in (None, 3):
            x = h.clone().requires_grad_()
            (chunked.pooled_features(x, sae, owner, lengths, most) * g).sum().backward()
            grads.append(x.grad)
        assert grads[0].abs().max() > 0.01
        if features == 3:
            torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-5)
        else:
            assert grads[1].isnan().any()


# ---- the reference cache
def build(policy, pairs, folder, *, cache_top=0, layout="separate", **budget):
    identity = identity_of(policy, pairs, cache_top=cache_top, layout=layout)
    return offline.build_reference(
        policy, pairs, folder, identity, layout=layout, **({"max_pairs": 3} | budget)
    )


def identity_of(policy, pairs, *, cache_top=0, layout="separate"):
    weights = offline.digest(policy.lm.state_dict())
    return offline.reference_identity(
        policy, pairs, weights=weights, arithmetic={"layout": layout}, cache_top=cache_top
    )


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


def test_cache_top_keeps_the_largest(reference, saes, tmp_path, capsys):
    """And says what it drops, of both SAEs: the share of the squares, the largest."""
    pairs = make_pairs(4)
    policy = policy_of(reference, saes)
    full, small = build(policy, pairs, tmp_path), build(policy, pairs, tmp_path, cache_top=12)
    assert full.folder != small.folder
    whole, top = full.lookup(torch.arange(4)).features[0], small.lookup(torch.arange(4)).features[0]
    assert ((top > 0).sum(1) == 12).all() and ((whole > 0).sum(1) > 12).all()
    torch.testing.assert_close(top.topk(12).values, whole.topk(12).values)
    said = re.search(r"([\d.]+)% are dropped, the largest ([\d.]+)", capsys.readouterr().out)
    every = full.lookup(torch.arange(4)).features
    rest = [c.sort(descending=True).values[:, 12:] for c in every]
    assert float(said[2]) == pytest.approx(max(r.max().item() for r in rest), rel=1e-2)
    low, high = (
        f(r.square().sum() / c.square().sum() for r, c in zip(rest, every, strict=True)) for f in (min, max)
    )
    assert 0.8 * low < float(said[1]) / 100 < 1.2 * high


def test_cache_identity(reference, saes, tmp_path):
    """A token, weight, threshold, setting, the dtype or layout changed: another cache. Else: the same."""
    pairs = make_pairs(6)
    policy = policy_of(reference, saes)
    home = build(policy, pairs, tmp_path).folder

    def found(policy, pairs, **options):
        return offline.find_reference(tmp_path, identity_of(policy, pairs, **options))

    assert found(policy_of(reference, saes), make_pairs(6)) == home

    token = make_pairs(6)
    token.tokens[3] += 1
    assert found(policy, token) != home
    moved = policy_of(reference, saes)
    with torch.no_grad():
        moved.lm.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-6
    assert found(moved, pairs) != home
    sae = copy.deepcopy(saes[1])
    sae.threshold[5] += 1e-6
    assert found(policy_of(reference, (saes[0], sae)), pairs) != home
    assert found(policy_of(copy.deepcopy(reference).to(torch.bfloat16), saes), pairs) != home
    assert found(policy, pairs, layout="shared") != home
    for name, value in (("final_logit_softcapping", 29.0), ("sliding_window", 8), ("rms_norm_eps", 1e-5)):
        other = policy_of(reference, saes)
        other.lm.config = copy.deepcopy(other.lm.config)
        setattr(other.lm.config, name, value)
        assert found(other, pairs) != home, name
    # A part of its SAEs, or none (DPO), is served by the same cache.
    assert found(fpo.Policy(copy.deepcopy(reference), saes[1:], SITES[1:]), pairs) == home
    assert found(fpo.Policy(copy.deepcopy(reference)), pairs) == home


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


def test_cache_knows_its_identity_by_content_not_place(reference, saes, tmp_path):
    pairs = make_pairs(3)
    policy = policy_of(reference, saes)
    first = build(policy, pairs, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert offline.find_reference(tmp_path / "b", identity_of(policy, pairs)).name == first.folder.name
    manifest = json.loads((tmp_path / "b" / first.folder.name / "manifest.json").read_text())
    assert manifest["pairs"] == 3 and "lr" not in json.dumps(manifest)


# ---- models that can't be trained this way
def test_models_that_do_not_fit(reference, saes):
    sdpa = copy.deepcopy(reference)
    sdpa.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="eager or flex_attention"):
        fpo.Policy(sdpa)
    with pytest.raises(ValueError, match="reads width 20, the model has 32"):
        fpo.Policy(copy.deepcopy(reference), [make_sae(d=20)], [(1, "res")])
    biased = copy.deepcopy(reference)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    with pytest.raises(ValueError, match="states @ weight"):
        fpo.Policy(biased)


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
