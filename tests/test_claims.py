"""claims.py: the theorem's chain by hand, by hypothesis, and on the toy world's model; the departures."""

import json
import math
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_lm, make_pairs, make_sae, nudge
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

import claims
import fpo
import losses
import precision
import presets
import resume
import train
from data import load_pairs
from sae import JumpReLUSAE, load_sae

ROWS = {"layout": "separate", "pad_id": 0}


def make_head(E, w=0.0, cap=None, eps=0.0):
    """What is behind the last layer, with the output embedding E (V, d) and transformers' own norm."""
    norm, head = Gemma2RMSNorm(E.shape[1], eps=eps), torch.nn.Linear(*E.shape[::-1], bias=False)
    with torch.no_grad():
        norm.weight.fill_(w)
        head.weight.copy_(E)
    config, body = SimpleNamespace(rms_norm_eps=eps, final_logit_softcapping=cap), SimpleNamespace(norm=norm)
    return SimpleNamespace(model=body, config=config, get_output_embeddings=lambda: head)


def exact_sae(d):
    """An SAE without error: c = (ReLU(h), ReLU(-h)), ĥ = h."""
    one, zero = torch.eye(d), torch.zeros(2 * d)
    return JumpReLUSAE(torch.cat([one, -one], 1), zero, torch.cat([one, -one]), torch.zeros(d), zero)


def bounds_of(reference, policy, sae, h_ref, h):
    norms = claims.weight_norms(reference, policy, sae)
    return claims.position_bounds(reference, policy, sae, h_ref, h, norms)


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


def test_states_of_different_size_by_hand():
    """rms² = 25/2 + ε and 100/2 + ε, ε = 12.5; Δc = (5, 2, 0, 0): ½ · 2 · 29 / √(25 · 62.5)."""
    head = make_head(E_HAND, eps=12.5)
    found = bounds_of(head, head, exact_sae(2), H_REF, 2 * H)
    assert found["norm"].item() == pytest.approx(29 / math.sqrt(25 * 62.5), rel=1e-6)


def test_the_heads_own_change_is_counted():
    """W_ref = E · 2, W = 3 E · 2: ‖ΔW‖₂ = 4, and √d ‖ΔW‖₂ = 4√2 on top of 2 · 2√2/5."""
    found = bounds_of(make_head(E_HAND, w=1.0), make_head(3 * E_HAND, w=1.0), exact_sae(2), H_REF, H)
    moved = 4 * math.sqrt(2) / 5 + 4 * math.sqrt(2)
    assert found["whole"].item() == pytest.approx(moved**2 / 2, rel=1e-6)


def test_m_alone_bounds_nothing():
    """h a thousand times smaller gives the same logits: M says a millionth of before, less than the KL."""
    head = make_head(E_HAND)
    found = bounds_of(head, head, exact_sae(2), H_REF / 1000, H / 1000)
    assert found["theorem"].item() == pytest.approx(2e-6, rel=1e-4)
    assert found["theorem"] < found["kl"] < found["norm"]


def test_without_accurate_reconstruction_features_bound_nothing():
    """An SAE with nothing active: Δc = 0 and e = h. Only the bound that counts Δe holds."""
    sae, head = exact_sae(2), make_head(E_HAND)
    blind = JumpReLUSAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, torch.full((4,), 100.0))
    found = bounds_of(head, head, blind, H_REF, H)
    assert found["theorem"] == found["norm"] == 0 < found["kl"] < found["whole"]
    assert found["de"].item() == pytest.approx(math.sqrt(2))
    assert found["whole"].item() == pytest.approx((math.sqrt(2) / 5 * math.sqrt(2)) ** 2 / 2, rel=1e-6)


def test_the_lemmas_constants_are_the_best():
    """From p = (½, ½) by a small (s, -s): KL = s²/2 to first order, which is range²/8 and ¼‖Δz‖²."""
    head = make_head(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    found = bounds_of(head, head, exact_sae(2), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.01, 1.0]]))
    assert 0.999 * found["range"] < found["kl"] <= found["range"]
    assert 0.999 * found["lemma"] / 2 < found["kl"] <= found["lemma"] / 2


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


def test_slope_is_the_norms_jacobian():
    """Near h_ref the bound on ‖Δu‖ / ‖Δh‖ is the Jacobian's norm: by autograd, of transformers' norm."""
    h, sae, norm = torch.randn(1, 5), exact_sae(5), Gemma2RMSNorm(5, eps=1e-6)
    jacobian = torch.autograd.functional.jacobian(norm, h).reshape(5, 5)
    head = make_head(torch.eye(5), eps=1e-6)
    found = bounds_of(head, head, sae, h, h + 1e-3)
    slope = (2 * found["norm"]).sqrt() / (found["dc"] * math.sqrt(2))  # ‖W_ref‖ = 1, ‖W_dec‖ = √2
    assert slope.item() == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-2)


def test_spectral_norms():
    A, B = torch.tensor([[3.0, 0], [0, 1], [0, 0]]), torch.tensor([[0.0, 2], [1, 0]])
    assert claims.spectral_norm(A, B).item() == pytest.approx(3.0)  # A Bᵀ = [[0, 3], [2, 0], [0, 0]]
    A, B = torch.randn(40, 7), torch.randn(3, 7)  # long, and wider than high
    largest = lambda X: pytest.approx(torch.linalg.svdvals(X)[0].item(), rel=1e-4)  # noqa: E731
    assert claims.spectral_norm(A, B).item() == largest(A @ B.T)
    reference, policy, sae = nudge(make_lm(), 0.1, seed=2), nudge(make_lm()), make_sae()
    found = claims.weight_norms(reference, policy, sae)
    E = [lm.model.embed_tokens.weight.detach() for lm in (reference, policy)]
    W = [e * (1 + lm.model.norm.weight.detach()) for e, lm in zip(E, (reference, policy), strict=True)]
    wanted = {"M": sae.W_dec @ E[0].T, "W_dec": sae.W_dec, "W_ref": W[0], "dW": W[1] - W[0]}
    for name, matrix in wanted.items():
        assert found[name].item() == largest(matrix), name


# ---------------------------------------------------------------------------- real models
def check_states(lm, pairs, n):
    """h's logits are the model's own at the positions before each response token, each sequence by itself."""
    h, owner = claims.read_states(lm, pairs, n, **ROWS)
    z = claims.logits_of(lm, h)
    for r in range(2 * n):
        prompt, *responses = pairs[r % n]
        ids = torch.cat([prompt, responses[r // n]]).long()[None]
        with torch.no_grad():
            own = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(z[owner == r].float(), own, rtol=1e-4, atol=1e-4)
    return h, owner


def test_states_and_logits_of_a_tiny_model():
    check_states(nudge(make_lm(), 0.1), make_pairs(), 8)  # its final norm's weights are not 0


def test_the_toy_models_own_logits(world):
    """KL against fpo.Policy's, made in slices; the lemma and the whole chain at every position."""
    lm = presets.load_lm(str(world / "model"), "cpu")
    other = nudge(lm, 0.01)
    pairs = load_pairs(str(world / "test.jsonl"), presets.load_tokenizer(str(world / "model")))
    (h_ref, owner), (h, _) = check_states(lm, pairs, 12), check_states(other, pairs, 12)
    found = bounds_of(lm, other, load_sae(world / "sae", layer=3, width="512"), h_ref, h)
    policy = fpo.Policy(other)
    policy.hold_reference(lm)
    with torch.no_grad():
        says, _ = policy(claims.collate(pairs, range(12), **ROWS))
    mine = torch.zeros(24, dtype=torch.float64).index_add(0, owner, found["kl"])
    torch.testing.assert_close(mine.float(), says.kl, rtol=1e-3, atol=1e-5)
    assert found["kl"].mean() > 1e-3
    for name in ("range", "lemma", "whole"):
        assert (found["kl"] <= found[name]).all(), name


# ---------------------------------------------------------------------------- numbers of the tables
def test_summary_by_hand():
    kl = torch.tensor([0.0, 1.0, 2.0, 4.0])
    table = {name: torch.tensor([1.0, 3.0, 1.0, 40.0]) for name in claims.BOUNDS} | {"kl": kl}
    table |= {"lemma": torch.tensor([1.0, 1, 1, 1]), "theorem": torch.tensor([4.0, 9, 16, 4])}
    table |= {"de": torch.tensor([1.0, 1, 1, 3]), "dh": torch.tensor([2.0, 2, 2, 1])}
    row = claims.summarise({name: x.double() for name, x in table.items()}, ceiling=30.0)
    assert row["kl"] == 1.75
    assert row["range"] == {"mean": 11.25, "ratio": 3.0, "holds": 0.75, "below": 0.75}  # of 3, ½, 10
    assert row["middle"] == 2.0  # of 2, 3, 4, 2: torch's median is the lower one
    assert row["missed"] == 0.5


def test_pooling_by_hand():
    """Two responses of 2 and 1 positions, ‖Δc‖ = 3, 1 and 2: means 5 and 4. Pooled, Δc̄ = (2, 0), (1, 1)."""
    table, owner = {"dc": torch.tensor([3.0, 1.0, 2.0]).double()}, torch.tensor([0, 0, 1])
    c_ref = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    c = c_ref + torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert list(claims.pooling(table, owner, c_ref, c, 1).values()) == [4.5, 3.0, 2.5]  # k = 1: 4 and 1
    assert list(claims.pooling(table, owner, c_ref, c, 2).values()) == [4.5, 3.0, 3.0]


def test_sae_fit_by_hand():
    """W_enc = W_dec = 1, θ = 1.5: of the states 1, 2, 3 the first is read as 0. Variance 2, error 1."""
    one = torch.ones(1, 1)
    sae = JumpReLUSAE(one, torch.zeros(1), one, torch.zeros(1), torch.full((1,), 1.5))
    found = claims.sae_fit(sae, torch.tensor([[1.0], [2.0], [3.0]]))
    assert found == {"FVU": pytest.approx(0.5), "L0": pytest.approx(2 / 3)}


# ---------------------------------------------------------------------------- departures
def test_padded_is_a_mean_over_the_padded_rows():
    """Against pool_features of whole rows, zero off the response. Two pairs: rows of 3, 5 and 4, 6 tokens."""
    sizes, responses = [3, 5, 4, 6], [2, 3, 1, 4]  # chosen of both pairs, then rejected
    features = torch.rand(4, 6, 7)
    ends = zip(sizes, responses, strict=True)
    mask = torch.tensor([[s - y - 1 <= t < s - 1 for t in range(6)] for s, y in ends])
    c, zeros_off = losses.pool_features(features, mask), features * mask[..., None]
    for batch, longest in ((1, (4, 6, 4, 6)), (2, (6, 6, 6, 6))):
        found = claims.padded(c, torch.tensor(responses), torch.tensor(sizes), batch)
        rows = zip(zeros_off, longest, strict=True)
        wanted = [losses.pool_features(row[None, :L], torch.ones(1, L)) for row, L in rows]
        torch.testing.assert_close(found, torch.cat(wanted))


def test_policys_top_k_and_small_caches_by_hand():
    c, c_ref = torch.tensor([[5.0, 4.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 7.0, 2.0]])
    assert losses.feature_mse(c, c_ref, k=2).item() == 37.5  # features 0, 1 and 1, 2: (25 + 1 + 49) / 2
    assert claims.policy_top_mse(c, c_ref, 2).item() == 13.0  # 0 and 1: (25 + 1) / 2
    assert claims.policy_top_mse(c, c_ref, 4).item() == 6.75  # feature 2 is 0: (25 + 1 + 1) / 4
    assert claims.keep_top(c_ref, 2).tolist() == [[0.0, 3.0, 7.0, 0.0]]
    assert claims.keep_top(c_ref, 9).tolist() == c_ref.tolist()


def test_departure_by_hand():
    here, there = torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([4.0, 1.0, 0.0, 4.0])
    line = claims.departure("what", "D_FPO", here, there)
    assert (line["here"], line["there"], line["change"]) == (1.75, 2.25, pytest.approx(2 / 7))
    assert line["by_response"] == pytest.approx([1.0, 0.55, 3.7])  # of 4, ½ and 1
    assert claims.departure("what", "L0", 20.0, 5.0)["change"] == -0.75


# ---------------------------------------------------------------------------- whole runs
def tiny_run(tmp_path, scales=(0.003, 0.01, 0.03)):
    """A run whose saved states are ever further from the reference."""
    reference, policy = make_lm(), make_lm()
    for step, scale in enumerate(scales, 1):
        moved = fpo.Policy(nudge(reference, scale))
        optimizer = precision.make_optimizer("adam", list(moved.parameters()), 1e-3, shard=False)
        resume.save_state(tmp_path, step, moved, optimizer, {}, keep=9)
    return Namespace(
        reference=reference, policy=policy, sae=make_sae(), pairs=make_pairs(), n=6, rows=ROWS,
        states=resume.saved_states(tmp_path), settings=Namespace(k=5),
    )  # fmt: skip


def test_theorem_on_a_tiny_model(tmp_path):
    run = tiny_run(tmp_path)
    found = claims.theorem(run)
    assert found["positions"] == sum(len(y) for i in range(6) for y in run.pairs[i][1:])
    assert found["ceiling"] == pytest.approx(60 + math.log(97))
    rows = found["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert 0 < rows[0]["kl"] < rows[1]["kl"] < rows[2]["kl"]
    assert all(row[name]["holds"] == 1 for row in rows for name in ("range", "lemma", "whole"))
    for row in rows:
        positions, pooled, kD = row["pooled"].values()
        assert positions > pooled > kD > 0  # Jensen, then fewer features
    table = claims.theorem_table(found)
    assert table.splitlines()[0].endswith("is below 64.6) | step 1 | step 2 | step 3 |")
    kls = [float(cell) for cell in table.splitlines()[2].split("|")[2:5]]
    assert kls == pytest.approx([row["kl"] for row in rows], rel=0.06)


def test_states_that_are_not_whole_are_refused(tmp_path):
    lm = make_lm()
    half = {f"weight/lm.{name}": p.detach()[: len(p) // 2].clone() for name, p in lm.named_parameters()}
    save_file(half, tmp_path / "rank_0.safetensors")
    with pytest.raises(ValueError, match=r"no whole model\.embed_tokens\.weight"):
        claims.load_weights(lm, tmp_path)


def test_a_run_of_train_py(folder, capsys):
    """KL and D_FPO are those that the run itself measured at its end; both tables stand in one file."""
    words = "--preset toy --method fpo --steps 4 --warmup_steps 1 --save_every 2 --keep 9 --eval_every 0"
    train.main([*words.split(), "--eval_samples", "0", "--batch_size", "16", "--out", "runs/toy/claims"])
    claims.main(["theorem", "--json", "out/claims.json"])
    claims.main(["departures", "--json", "out/claims.json"])
    read = lambda name: json.loads((folder / name).read_text())  # noqa: E731
    scores, found = read("runs/toy/claims/scores.json")["after"], read("out/claims.json")
    theorem, lines = found["theorem"], found["departures"]["lines"]
    assert [row["step"] for row in theorem["rows"]] == [2, 4]
    kl = theorem["rows"][-1]["kl"] * theorem["positions"] / theorem["pairs"]
    assert kl == pytest.approx(scores["kl_chosen"] + scores["kl_rejected"], rel=1e-3)
    mse = (scores["mse_chosen"] + scores["mse_rejected"]) / 2
    here = [line["here"] for line in lines if line["quantity"] == "D_FPO"]
    assert here == pytest.approx([mse] * 7, rel=1e-3)
    assert theorem["rows"][-1]["pooled"]["k D_FPO"] == pytest.approx(50 * mse, rel=1e-3)
    assert theorem["settings"]["lr"] == 3e-4
    text = (folder / "out/claims.md").read_text()
    assert text.count("`python ") == 2 and "Theorem B.1" in text and "final norm | FVU" in text
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["claims.json", "claims.md", "theorem.svg"]  # nothing is left aside
    check_refused(folder, capsys, {"sae_site": "mlp"}, "the last layer")
    check_refused(folder, capsys, {"reference": "runs/toy/base"}, "not what it was trained against")


def check_refused(folder, capsys, change, message):
    """The run with another setting ends in one line, status 2."""
    run = folder / f"with_{next(iter(change))}"
    shutil.copytree(folder / "runs/toy/claims", run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        claims.main(["theorem", "--run", str(run)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --run {run}") and message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["theorem", "--preset", "gemma-2-2b"],
            "no finished run; to make it: python train.py",
        ),
        (["theorem", "--pairs", "-1"], "--pairs -1"),
        (["departures", "--json", "a.txt"], "must end in .json"),
    ],
)
def test_wrong_values_end_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        claims.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
