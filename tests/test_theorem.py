"""experiments/theorem.py: the theorem's chain by hand, by hypothesis, and on a toy run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import exact_sae, make_lm, make_pairs, make_sae, nudge
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

import fpo
from data import collate
from experiments import theorem
from sae import JumpReLUSAE


def make_head(E, w=0.0, cap=None, eps=0.0):
    """What is behind the last layer, with the output embedding E (V, d) and transformers' own norm."""
    norm, head = Gemma2RMSNorm(E.shape[1], eps=eps), torch.nn.Linear(*E.shape[::-1], bias=False)
    with torch.no_grad():
        norm.weight.fill_(w)
        head.weight.copy_(E)
    config, body = SimpleNamespace(rms_norm_eps=eps, final_logit_softcapping=cap), SimpleNamespace(norm=norm)
    return SimpleNamespace(model=body, config=config, get_output_embeddings=lambda: head)


def bounds_of(reference, policy, sae, h_ref, h):
    norms = theorem.weight_norms(reference, policy, sae)
    return theorem.position_bounds(reference, policy, sae, h_ref, h, norms)


# ---------------------------------------------------------------------------- the chain, by hand
E_HAND = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
H_REF, H = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])


def test_two_tokens_by_hand():
    """rms = 5/√2, so z = (0.6√2, 0) and (0.8√2, 0): Δz = (0.2√2, 0). Δc = (1, -1, 0, 0); W_dec Eᵀ has the
    column (1, 0, -1, 0) alone: M = √2.
    """
    head = make_head(E_HAND)
    found = {k: v.item() for k, v in bounds_of(head, head, exact_sae(2), H_REF, H).items()}
    p, q = (1 / (1 + math.exp(-x * math.sqrt(2))) for x in (0.6, 0.8))
    assert found["kl"] == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-5)
    assert found["range"] == pytest.approx(0.08 / 8, rel=1e-5)
    assert found["lemma"] == pytest.approx(0.08 / 2, rel=1e-5)
    assert found["theorem"] == pytest.approx(2 * 2 / 2, rel=1e-6)  # M² ‖Δc‖² / 2
    assert found["norm"] == pytest.approx((math.sqrt(2) / 5 * 2) ** 2 / 2, rel=1e-6)  # ‖W_ref‖ = 1
    assert found["whole"] == pytest.approx(found["norm"], rel=1e-6)  # no error, no other head
    assert [found[x] for x in ("dc", "dh", "de")] == pytest.approx([math.sqrt(2), math.sqrt(2), 0], abs=1e-6)


def test_the_heads_own_change_is_counted():
    """W_ref = E · 2, W = 3 E · 2: ‖ΔW‖₂ = 4, and √d ‖ΔW‖₂ = 4√2 on top of 2 · 2√2/5."""
    found = bounds_of(make_head(E_HAND, w=1.0), make_head(3 * E_HAND, w=1.0), exact_sae(2), H_REF, H)
    moved = 4 * math.sqrt(2) / 5 + 4 * math.sqrt(2)
    assert found["whole"].item() == pytest.approx(moved**2 / 2, rel=1e-6)


def test_where_the_theorem_fails():
    """h a thousand times smaller: the same logits, M's bound a millionth. A blind SAE: Δc = 0, e = h."""
    sae, head = exact_sae(2), make_head(E_HAND)
    small = bounds_of(head, head, sae, H_REF / 1000, H / 1000)
    assert small["theorem"].item() == pytest.approx(2e-6, rel=1e-4)
    assert small["theorem"] < small["kl"] < small["norm"]
    blind = JumpReLUSAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, torch.full((4,), 100.0))
    found = bounds_of(head, head, blind, H_REF, H)
    assert found["theorem"] == found["norm"] == 0 < found["kl"] < found["whole"]
    assert found["whole"].item() == pytest.approx((math.sqrt(2) / 5 * math.sqrt(2)) ** 2 / 2, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 3.0]), st.sampled_from([None, 5.0]))
def test_what_is_proved_holds(seed, step, cap):
    """KL ≤ range²/8 ≤ ¼‖Δz‖² for any logits; the whole chain for any head, SAE, and states far or near."""
    torch.manual_seed(seed)
    d, V = 6, 11
    E = torch.randn(V, d)
    heads = E, E + 0.1 * step * torch.randn(V, d)
    reference, policy = (make_head(X, w=0.3, cap=cap, eps=0.1) for X in heads)
    h_ref = torch.randn(50, d) * torch.logspace(-2, 2, 50)[:, None]
    h = h_ref + step * torch.randn(50, d)
    found = bounds_of(reference, policy, make_sae(seed, d, 20), h_ref, h)
    assert (found["kl"] <= found["range"] + 1e-14).all()
    assert (found["range"] <= found["lemma"] / 2 + 1e-14).all()
    assert (found["lemma"] <= found["whole"] + 1e-12).all()
    same = bounds_of(reference, reference, exact_sae(d), h_ref, h)  # the theorem's conditions are met
    assert (same["lemma"] <= same["norm"] * (1 + 1e-5) + 1e-12).all()


def test_spectral_norms():
    reference, policy, sae = nudge(make_lm(), 0.1, seed=2), nudge(make_lm()), make_sae()
    found = theorem.weight_norms(reference, policy, sae)
    E = [lm.model.embed_tokens.weight.detach() for lm in (reference, policy)]
    W = [e * (1 + lm.model.norm.weight.detach()) for e, lm in zip(E, (reference, policy), strict=True)]
    wanted = {"M": sae.W_dec @ E[0].T, "W_dec": sae.W_dec, "W_ref": W[0], "dW": W[1] - W[0]}
    for name, matrix in wanted.items():
        assert found[name].item() == pytest.approx(torch.linalg.svdvals(matrix)[0].item(), rel=1e-4), name


@torch.no_grad()
def test_logits_are_the_models_own():
    """h's logits are those of each sequence by itself, at the position before each response token."""
    lm, pairs, n = nudge(make_lm(), 0.1), make_pairs(), 8  # its final norm's weights are not 0
    batch = collate(pairs, range(n), layout="shared")
    (h,) = fpo.Policy(lm, [make_sae()], [(3, "res")]).read_sites(batch)
    z = theorem.logits_of(lm, h)
    for r in range(2 * n):
        prompt, *responses = pairs[r % n]
        ids = torch.cat([prompt, responses[r // n]])[None]
        own = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(z[batch.owner == r].float(), own, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- figures, and a whole run
def test_summary_by_hand():
    """Four positions, two of each response. ‖Δc‖² = 9, 1 and 4, 4: means 5 and 4. Δc̄ = (2, 0), (1, 1)."""
    table = {name: [1.0, 3, 1, 40] for name in theorem.BOUNDS} | {"kl": [0.0, 1, 2, 4], "dc": [3.0, 1, 2, 2]}
    table |= {"lemma": [1.0, 1, 1, 1], "theorem": [4.0, 9, 16, 4], "de": [1.0, 1, 1, 3], "dh": [2.0, 2, 2, 1]}
    table, owner = {name: torch.tensor(x).double() for name, x in table.items()}, torch.tensor([0, 0, 1, 1])
    c_ref = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    c = c_ref + torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    row = theorem.summarise(table, owner, c_ref, c, k=1, ceiling=30.0)
    assert row["range"] == {"mean": 11.25, "ratio": 3.0, "holds": 0.75, "below": 0.75}  # of 3, ½, 10
    wanted = {"kl": 1.75, "missed": 0.5, "dc": 4.5, "pooled": 3.0, "k_mse": 2.5}  # k = 1: 4 and 1
    wanted["middle"] = 2.0  # of 2, 3, 4, 2: torch's median is the lower one
    assert {name: row[name] for name in wanted} == wanted
    assert theorem.summarise(table, owner, c_ref, c, k=2, ceiling=30.0)["k_mse"] == 3.0


def test_a_run(folder, monkeypatch):
    """KL and D_FPO are those that the run measured at its end; every state is there; other records stay."""
    out, short = Path("run"), "--steps 4 --warmup_steps 1 --save_every 2 --batch_size 16 --out run"
    monkeypatch.setattr(theorem, "RUN", [*theorem.RUN, *short.split()])
    Path("assets").mkdir()
    Path("assets/theorem.json").write_text('{"before": 1}')
    Path("assets/theorem.md").write_text("`python a`\n\n| old |\n\n`python b`\n\n| kept |\n")
    theorem.main([])
    found = json.loads(Path("assets/theorem.json").read_text())
    after, bounds = json.loads((out / "scores.json").read_text())["after"], found["bounds"]
    first, last = bounds["rows"]
    assert found["before"] == 1 and (first["step"], last["step"]) == (2, 4) and 0 < first["kl"] < last["kl"]
    vocabulary = json.loads(Path("runs/toy/model/config.json").read_text())["vocab_size"]
    assert bounds["ceiling"] == pytest.approx(2 * 30 + math.log(vocabulary))
    kl = last["kl"] * bounds["positions"] / bounds["pairs"]
    assert kl == pytest.approx(after["kl_chosen"] + after["kl_rejected"], rel=1e-3)
    assert last["k_mse"] == pytest.approx(50 * (after["mse_chosen"] + after["mse_rejected"]) / 2, rel=1e-3)
    for row in (first, last):
        assert all(row[name]["holds"] == 1 for name in ("range", "lemma", "whole"))
        assert row["dc"] > row["pooled"] > row["k_mse"] > 0  # Jensen, then fewer features
    text = Path("assets/theorem.md").read_text()
    assert "| old |" not in text and text.endswith(" |\n\n`python b`\n\n| kept |\n")
    assert "Theorem B.1" in text and "Theorem B.1" in Path("assets/theorem.svg").read_text()
