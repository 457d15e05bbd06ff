"""experiments/control.py: losses with another distance, measures of a model, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import D, exact_sae, lines_of, make_lm, make_pairs, make_sae, nudge, predicting

import data
import fpo
import loading
import runtime
import settings
from experiments import control
from fpo import Statistics
from scale import pooled_features

# ---------------------------------------------------------------------------- losses
SETTINGS = {"beta": 0.1, "alpha": 0.5, "gamma": None, "k": 9, "stop_gradient": True}


def statistics(seed):
    g = torch.Generator().manual_seed(seed)
    logps, features = -9 * torch.rand(4, generator=g), torch.rand(4, 6, generator=g)
    return Statistics(logps, torch.tensor([3, 2, 5, 4]), (features,))


def test_losses_with_another_distance():
    """All features at weight 1 give FPO; no length norm is DPO's with α D; states by hand."""
    policy, reference = statistics(0), statistics(1)
    usual, values = fpo.method_loss("fpo", policy, reference, **SETTINGS)
    weighted, same = control.weighted_loss(list(range(6)), "fpo", policy, reference, **SETTINGS)
    assert torch.equal(weighted, usual) and all(torch.equal(same[n], values[n]) for n in values)
    free, _ = control.weighted_loss([], "fpo", policy, reference, **SETTINGS)
    assert torch.equal(free, fpo.method_loss("fpo", policy, reference, **{**SETTINGS, "alpha": 0.0})[0])
    c, c_ref = policy.features[0][:, 1:3], reference.features[0][:, 1:3]
    _, two = control.weighted_loss([1, 2], "fpo", policy, reference, **SETTINGS, units=(2.0, 5.0))
    assert torch.allclose(two["mse_chosen"], ((c - c_ref) ** 2).sum(1)[:2] / 9 / 2)  # k = 9, the first unit
    sums, _ = control.loss_without_length_norm("fpo", policy, reference, **{**SETTINGS, "alpha": 0.0})
    assert torch.allclose(sums, fpo.method_loss("dpo", policy, reference, **SETTINGS)[0])
    loss, values = control.loss_of_states("fpo", policy, reference, **SETTINGS, units=(2.0,))
    D = ((policy.features[0] - reference.features[0]) ** 2).sum(1) / 6 / 2
    ratio = (policy.logps - reference.logps) / policy.lengths
    u = 0.1 * (ratio[:2] - ratio[2:]) - 0.05 * (D[2:] - D[:2])
    assert torch.allclose(loss, -u.sigmoid().log()) and torch.allclose(values["mse_rejected"], D[2:])


def test_states_of_several_layers_count_alike():
    """D is the mean of each layer's own, in its own unit: of what moved (4 / 2 + 9 / 3) / 2."""
    zeros, moved = torch.zeros(2, 5), torch.tensor([[0.0], [1.0]]) * torch.ones(5)
    policy = Statistics(torch.zeros(2), torch.tensor([1, 1]), (2 * moved, 3 * moved))
    reference = Statistics(torch.zeros(2), torch.tensor([1, 1]), (zeros, zeros))
    _, values = control.loss_of_states("fpo", policy, reference, **SETTINGS, units=(2.0, 3.0))
    assert (values["mse_chosen"].item(), values["mse_rejected"].item()) == (0, 2.5)


def test_the_encoder_of_states_pools_the_states(monkeypatch):
    monkeypatch.setattr(loading, "load_config", lambda name: make_lm().config)
    encoder, h = control.state_encoder(SimpleNamespace(model="")), torch.randn(5, D)
    pooled = pooled_features(h, encoder, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3]))
    assert torch.allclose(pooled, torch.stack([h[:2].mean(0), h[2:].mean(0)]), atol=1e-6)


# ---------------------------------------------------------------------------- measures
def plainly(lm, sae, x, y):
    """log π of y's tokens, and the features of layer 1 at their positions, by the model's own forward."""
    with torch.no_grad():
        logits, (h,) = predicting(lm, x, y, [1])
    return logits.log_softmax(-1).gather(1, y[:, None])[:, 0], sae.encode(h)


def lend(monkeypatch, lms, sae, pairs=None):
    """What train.py's functions then load: models by name, an SAE of layer 1, pairs."""
    monkeypatch.setattr(loading, "load_lm", lambda name, *_, **__: lms[name])
    monkeypatch.setattr(loading, "load_saes", lambda *_: ([sae], [(1, "res")]))
    monkeypatch.setattr(loading, "load_data", lambda *_: pairs)
    monkeypatch.setattr(data, "load_tokenizer", lambda name: SimpleNamespace(pad_token_id=0))
    return SimpleNamespace(model="model", reference="reference", dtype="float32", layout="auto")


@pytest.mark.parametrize("sae", [exact_sae(), make_sae()], ids=["exact", "random"])
def test_measure_against_plain_forwards(monkeypatch, sae):
    pairs, lms = make_pairs(9), {"model": nudge(make_lm()), "reference": make_lm()}
    found = control.measure(lend(monkeypatch, lms, sae, pairs))
    ratios, nll, change = ([], []), [], torch.zeros(sae.m)
    for x, *ys in (pairs[i] for i in range(9)):
        for side, y in enumerate(ys):
            (logps, c), (ref_logps, ref_c) = (plainly(lm, sae, x, y) for lm in lms.values())
            ratios[side].append(logps - ref_logps)
            nll += [-logps] if side == 0 else []
            change += (c.mean(0) - ref_c.mean(0)).abs() / 18
    assert found["cross_entropy"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-4)
    assert found["chosen_largest"] == pytest.approx(torch.cat(ratios[0]).max().item(), abs=1e-3)
    assert found["rejected_smallest"] == pytest.approx(torch.cat(ratios[1]).min().item(), abs=1e-3)
    assert torch.allclose(torch.tensor(found["feature_change"]), change, atol=1e-4)
    exact = sae.m == 2 * D
    assert (found["cross_entropy_spliced"] == pytest.approx(found["cross_entropy"], rel=1e-4)) == exact
    assert (found["fvu"] < 1e-9) == exact and (found["l0"] == D) == exact


def test_features_of_two_sets_of_responses(monkeypatch):
    lm, sae, whole = make_lm(), make_sae(), make_pairs(20, seed=5)
    sets = [[whole[i][:2] for i in indices] for indices in (range(17), range(17, 20))]
    sides = [data.Pairs([(x.tolist(), y.tolist(), []) for x, y in rows]) for rows in sets]
    found = control.feature_statistics(lend(monkeypatch, {"model": lm}, sae), sides)
    for (mean, largest), rows in zip(found, sets, strict=True):
        features = [plainly(lm, sae, x, y)[1] for x, y in rows]
        assert torch.allclose(mean, torch.stack([c.mean(0) for c in features]).mean(0).double(), atol=1e-5)
        assert torch.allclose(largest, torch.cat(features).amax(0), atol=1e-4)


def test_chosen_features_where_the_answer_is_known():
    mean_a, largest_a = torch.tensor([0.0, 5, 4, 0, 1, 3]), torch.tensor([0.0, 9, 5, 1, 8, 7])
    sides = (mean_a, largest_a), (torch.tensor([0.0, 4.5, 1, 2, 0, 3]), None)
    assert control.choose_features(*sides, "difference", n=2) == [2, 4]
    assert control.choose_features(*sides, "difference", n=6) == [2, 4, 1]  # 3, 1, 0.5; none at or below 0
    assert control.choose_features(*sides, "token", n=3) == [1, 4]  # 5's mean is no higher in A
    assert sorted(control.choose_features(*sides, "random", n=9, seed=3)) == [1, 2, 3, 4, 5]
    draws = [control.choose_features(*sides, "random", n=2, seed=seed) for seed in range(20)]
    assert len(set(map(tuple, draws))) > 5


def test_sides_are_told_by_how_a_response_opens(tmp_path, monkeypatch, folder):
    """Also where a record before it was left out; --max_length counts here too."""
    path = folder / "runs/toy/train.jsonl"
    lines = path.read_text().splitlines()[:40]
    records = [json.loads(line) for line in lines]
    path.write_text("\n".join([lines[0], '{"prompt": "no pair"}', *lines[1:]]) + "\n")
    config = settings.parse_args(["--preset", "toy"])
    sides = control.style_sides(config, "shout")
    tokenizer = data.load_tokenizer(config.model)
    said = [[tokenizer.decode(pair[1], skip_special_tokens=True) for pair in side] for side in sides]
    wanted = [[], []]
    for record in records:
        for name in ("chosen", "rejected"):
            wanted[0 if record[f"{name}_style"] == "shout" else 1].append(record[name])
    assert said == wanted and min(map(len, wanted)) > 3
    flags = ["--preset", "toy", "--max_length", "40", "--max_prompt_length", "30"]
    short = control.style_sides(settings.parse_args(flags), "shout")
    assert max(len(pair[1]) for side in short for pair in side) <= 39


# ---------------------------------------------------------------------------- what is refused
REFUSED = {
    "": "--task or --responses is needed",
    "--task no_sae --responses a b": "not both",
    "--task no_sae --criterion token": "--criterion token: --task no_sae has no use",
    "--task random --criterion token": "--criterion token: --task random has no use",
    "--task polite --json x.json": "--json x.json: --task polite has no use",
    "--task measure": "--task measure: --json is needed",
    "--task measure --json x.json --lr 1": "--lr: --task measure trains nothing",
    "--task measure --json x.json --sae_site mlp": "--sae_site mlp: .* `res` alone",
    "--task polite --criterion odd": "odd.*difference.*token",
    "--task polite --sae_layer 0 3": r"--sae_layer \[0, 3\]: --task",
    "--responses a b --sae_layer 0 3": r"--sae_layer \[0, 3\]: --responses",
    "--task no_sae --method dpo": "--method dpo: .* FPO alone",
    "--task shout --preset gemma-2-2b": "--task shout --preset gemma-2-2b: .* toy",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_task_has_no_use_for_is_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = [] if "--preset" in words else ["--preset", "toy"]
    with pytest.raises(runtime.UserError, match=REFUSED[words]):
        control.main([*words.split(), *preset])


def test_fpo_of_the_states_of_two_layers_trains(folder):
    """Each layer has its encoder; D is zero at the first step but for rounding, then grows."""
    words = "--task no_sae --preset toy --steps 2 --batch_size 4 --eval_every 0 --alpha 0.2 --no_eval_kl"
    for layer in (0, 3):  # what these SAEs hold is not read
        shutil.copytree("runs/toy/sae/layer_3", f"saes/layer_{layer}")
    control.main([*words.split(), "--sae", "saes", "--sae_layer", "0", "3", "--out", "out"])
    first, second = lines_of("out")
    assert 1e3 * first["mse_rejected"] < second["mse_rejected"]  # at first rounding alone
