"""experiments/theorem.py: the theorem's chain by hand, by hypothesis, and on a toy run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import exact_sae, lines_of, make_lm, make_pairs, make_sae, nudge, predicting
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

import fpo
from batches import collate
from experiments import theorem
from sae import SAE


def make_head(E, w=0.0, cap=None, eps=0.0):
    """What is behind the last layer, with the output embedding E (V, d) and transformers' own norm."""
    norm, head = Gemma2RMSNorm(E.shape[1], eps=eps), torch.nn.Linear(*E.shape[::-1], bias=False)
    with torch.no_grad():
        norm.weight.fill_(w)
        head.weight.copy_(E)
    config, body = SimpleNamespace(rms_norm_eps=eps, final_logit_softcapping=cap), SimpleNamespace(norm=norm)
    return SimpleNamespace(model=body, config=config, get_output_embeddings=lambda: head)


# ---------------------------------------------------------------------------- the chain, by hand
E_HAND = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
H_REF, H = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])


def test_two_tokens_by_hand():
    """rms = 5/√2, so z = (0.6√2, 0) and (0.8√2, 0): Δz = (0.2√2, 0). Δc = (1, -1, 0, 0); W_dec Eᵀ has the
    column (1, 0, -1, 0) alone: M = √2.
    """
    head = make_head(E_HAND)
    found = theorem.position_bounds(head, head, exact_sae(2), H_REF, H)
    found = {name: value.item() for name, value in found.items()}
    p, q = (1 / (1 + math.exp(-x * math.sqrt(2))) for x in (0.6, 0.8))
    assert found["kl"] == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-5)
    assert found["lemma"] == pytest.approx(0.08 / 2, rel=1e-5)
    assert found["theorem"] == pytest.approx(2 * 2 / 2, rel=1e-6)  # M² ‖Δc‖² / 2
    assert [found[x] for x in ("dc", "dh", "de")] == pytest.approx([math.sqrt(2), math.sqrt(2), 0], abs=1e-6)


def test_where_the_theorem_fails():
    """h a thousand times smaller: the same logits, M's bound a millionth. A blind SAE: Δc = 0, Δe = Δh."""
    sae, head = exact_sae(2), make_head(E_HAND)
    small = theorem.position_bounds(head, head, sae, H_REF / 1000, H / 1000)
    assert small["theorem"].item() == pytest.approx(2e-6, rel=1e-4)
    assert small["theorem"] < small["kl"]
    blind = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, torch.full((4,), 100.0))
    found = theorem.position_bounds(head, head, blind, H_REF, H)
    assert found["theorem"] == 0 < found["kl"] and found["de"] == found["dh"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 3.0]), st.sampled_from([None, 5.0]))
def test_the_lemma_holds(seed, step, cap):
    """KL ≤ ½‖Δz‖² for any head, states far or near."""
    torch.manual_seed(seed)
    E = torch.randn(11, 6)
    reference, policy = (make_head(X, w=0.3, cap=cap, eps=0.1) for X in (E, E + step * torch.randn(11, 6)))
    h_ref = torch.randn(50, 6) * torch.logspace(-2, 2, 50)[:, None]
    h = h_ref + step * torch.randn(50, 6)
    found = theorem.position_bounds(reference, policy, make_sae(seed, 6, 20), h_ref, h)
    assert (found["kl"] <= found["lemma"] + 1e-14).all()


def test_spectral_norm():
    torch.manual_seed(0)
    A, B = torch.randn(9, 4), torch.randn(7, 4)
    wanted = torch.linalg.svdvals(A.double() @ B.double().T)[0].item()
    assert theorem.product_norm(A, B).item() == pytest.approx(wanted, rel=1e-9)


@torch.no_grad()
def test_logits_are_the_models_own():
    """h's logits are those of each sequence by itself, at the position before each response token."""
    lm, pairs, n = nudge(make_lm(), 0.1), make_pairs(), 8  # its final norm's weights are not 0
    batch = collate(pairs, range(n), layout="shared")
    (h,) = fpo.Policy(lm, [make_sae()], [(3, "res")]).read_sites(batch)
    z = theorem.logits_of(lm, h)
    for r in range(2 * n):
        prompt, *responses = pairs[r % n]
        own, _ = predicting(lm, prompt, responses[r // n])
        torch.testing.assert_close(z[batch.owner == r].float(), own, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- figures, and a whole run
def test_summary_by_hand():
    """Four positions, two of each response. ‖Δc‖² = 9, 1 and 4, 4: means 5 and 4. Δc̄ = (2, 0), (1, 1)."""
    table = {"kl": [0.0, 1, 2, 4], "lemma": [1.0, 3, 1, 40], "theorem": [1.0, 3, 1, 40]}
    table |= {"dc": [3.0, 1, 2, 2], "de": [1.0, 1, 1, 3], "dh": [2.0, 2, 2, 1]}
    table, owner = {name: torch.tensor(x).double() for name, x in table.items()}, torch.tensor([0, 0, 1, 1])
    c_ref = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    c = c_ref + torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    row = theorem.summarise(table, owner, c_ref, c, k=1, ceiling=30.0)
    assert row["lemma"] == {"mean": 11.25, "ratio": 3.0, "holds": 0.75, "below": 0.75}  # of 3, ½, 10
    wanted = {"kl": 1.75, "missed": 0.5, "dc": 4.5, "pooled": 3.0, "k_mse": 2.5}  # k = 1: 4 and 1
    assert {name: row[name] for name in wanted} == wanted
    assert theorem.summarise(table, owner, c_ref, c, k=2, ceiling=30.0)["k_mse"] == 3.0


def test_a_run(folder, monkeypatch):
    """KL and D_FPO are those that the runs measured at their ends; the shorter run is the longer's start."""
    monkeypatch.setattr(theorem, "RUN", [*theorem.RUN, *["--warmup_steps", "1", "--batch_size", "16"]])
    monkeypatch.setattr(theorem, "STEPS", (2, 4))
    theorem.main([])
    rows = json.loads(Path("assets/theorem.json").read_text())["rows"]
    runs = [Path(f"runs/toy/theorem/step_{n}") for n in (2, 4)]
    losses = [[line["loss"] for line in lines_of(run)] for run in runs]
    assert losses[0] == losses[1][:2] and 0 < rows[0]["kl"] < rows[1]["kl"]
    vocabulary = json.loads(Path("runs/toy/model/config.json").read_text())["vocab_size"]
    assert rows[0]["ceiling"] == pytest.approx(2 * 30 + math.log(vocabulary))
    for row, run in zip(rows, runs, strict=True):
        after = json.loads((run / "scores.json").read_text())["after"]
        kl = row["kl"] * row["positions"] / row["pairs"]
        assert kl == pytest.approx(after["kl_chosen"] + after["kl_rejected"], rel=1e-3)
        assert row["k_mse"] == pytest.approx(50 * (after["mse_chosen"] + after["mse_rejected"]) / 2, rel=1e-3)
        assert row["lemma"]["holds"] == 1
        assert row["dc"] > row["pooled"] > row["k_mse"] > 0  # Jensen, then fewer features
    assert "Theorem B.1" in Path("assets/theorem.md").read_text()
