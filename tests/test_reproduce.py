"""Runs, tables, figures and the frontier on hand-made rows; the losses and measures of the experiments."""

import json
import math
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import D, make_lm, make_pairs, make_sae, nudge

import data
import eval_diversity
import fpo
import train
from experiments import ablations, control, reproduce
from fpo import Policy, Statistics
from sae import JumpReLUSAE
from scale import pooled_features


def make_row(name, seed=0, curve=(), **scores):
    return {"name": name, "method": name, "seed": seed, "folder": "", "scores": scores, "curve": list(curve)}


def args(tmp_path, *words, task="comparison"):
    return reproduce.parse_args([task, "--out", str(tmp_path / "runs"), *words])


# ---------------------------------------------------------------------------- numbers
def test_cells_and_heads_of_columns():
    assert reproduce.cell([0.5, 0.7], "accuracy") == "60 ± 14"  # n − 1: 100 · 0.1 · √2
    assert reproduce.cell([2.0, 4.0, 9.0], "entropy") == "5 ± 3.6"  # √((9 + 1 + 16) / 2)
    assert (
        reproduce.cell([12.3456], "kl_rejected") == "12.35"
        and reproduce.cell([2e-6], "mse_chosen") == "2e-06"
    )
    assert reproduce.cell([], "entropy") == "–" and reproduce.title("share_polite") == "share polite (%)"


def test_table_puts_the_papers_values_beside_ours():
    rows = [make_row("fpo", accuracy=0.8, entropy=1.5), make_row("fpo", 1, accuracy=0.82, entropy=1.5)]
    lines = [reproduce.method_line("fpo"), ("SFT", "sft", "", ())]
    columns = ("accuracy", "paper_accuracy", "entropy", "paper_entropy", "paper_seconds")
    head, _, ours, sft = reproduce.table(rows, lines, columns).splitlines()
    assert head == "|  | accuracy (%) | paper accuracy (%) | entropy | paper entropy | paper seconds |"
    assert ours == "| FPO | 81 ± 1.4 | 64.1 | 1.5 ± 0 | 1.68 | 8290 |"
    assert sft == "| SFT | – | – | – | – | – |"


def test_collect_reads_scores_time_and_the_curve(tmp_path):
    steps = [{"step": i, "pairs_per_s": 16.0} for i in range(1, 21)]
    steps[3] |= {"eval_kl_rejected": 7.0, "eval_accuracy": 0.6}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    ends = {"before": {"kl_rejected": 0.0}, "after": {"kl_rejected": 9.0}}
    files = {"scores": ends, "scored": {"entropy": 1.5, "train": {"accuracy": 0.925}}}
    files |= {"measured": {"l0": 9.0, "feature_change": [1.0]}, "config": {"batch_size": 32}}
    for name, value in (files | {"run": {"name": "fpo", "method": "fpo", "seconds": 3.0}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    row = reproduce.collect(str(tmp_path))
    scores = {"entropy": 1.5, "l0": 9.0, "train_accuracy": 0.925, "train_seconds": 40.0}  # 20 · 32 / 16
    assert row["scores"] == files["scored"] | scores and (row["name"], row["seconds"]) == ("fpo", 3.0)
    assert [(p["step"], p["kl_rejected"]) for p in row["curve"]] == [(0, 0.0), (4, 7.0), (20, 9.0)]


# ---------------------------------------------------------------------------- runs
def test_a_done_run_is_not_repeated_and_a_failed_one_is_told(tmp_path, monkeypatch):
    """Other commands or other weights at the start are another run; run.json comes only at a success."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start/model.safetensors").write_bytes(b"weights")
    options = args(tmp_path, "--model", str(tmp_path / "start"), "--seeds", "0", "--at_once", "1")
    done, lines = [], [("FPO", "fpo", "", ()), ("again", "fpo", "", ()), ("DPO", "dpo", "", ())]
    fake = SimpleNamespace(run=lambda words, **_: done.append(words) or reply)
    monkeypatch.setattr(reproduce, "subprocess", fake)
    monkeypatch.setattr(reproduce, "collect", lambda folder: folder.rsplit("/", 1)[-1])
    reply = SimpleNamespace(returncode=0)
    assert reproduce.do_lines(options, lines) == ["fpo_seed0", "dpo_seed0"]
    assert len(done) == 6 and options.done == 2  # each: train, score, measure
    reproduce.do_lines(options, lines)
    assert len(done) == 6
    options.samples = 3
    reproduce.do_lines(options, lines[:1])
    assert len(done) == 9
    (tmp_path / "start/model.safetensors").write_bytes(b"others")
    reply.returncode = 3
    with pytest.raises(data.UserError, match="status 3"):
        reproduce.do_lines(options, lines[:1])
    assert not (tmp_path / "runs/fpo_seed0/run.json").exists()


OWN = "--preset own --model M -- --dataset F.jsonl --eval_dataset G.jsonl --sae S --sae_layer 3 4 --lr 1"


@pytest.mark.parametrize("words", ["--preset toy", "--preset gemma-2-2b", OWN])
def test_every_command_is_one_that_the_scripts_take(tmp_path, words):
    """A name is one setting, in every table, and a setting one name."""
    options, named = args(tmp_path, *words.split()), {}
    lines = [*map(reproduce.method_line, reproduce.METHODS), ("", "no_sae", "--alpha 2", ())]
    for plan in reproduce.ablation_plan(options.preset).values() if words != OWN else []:
        lines += plan
    for _, method, flags, _ in lines:
        run = reproduce.make_run(options, method, flags, 0)
        for text in run["commands"]:
            script, _, rest = text.partition(" --preset ")
            rest = ["--preset", *shlex.split(rest)]
            if "eval_diversity.py" in script:
                config = eval_diversity.parse_args(rest).config
            elif "measure" in script:
                config = train.parse_args(rest[: rest.index("--json")])
            else:
                config = train.parse_args([*rest, *shlex.split(script.partition("train.py")[2])])
                seen = {**vars(config), "out": "", "script": script}
                assert named.setdefault(run["name"], seen) == seen
            if words == OWN:
                assert (config.dataset, config.eval_dataset, config.sae) == ("F.jsonl", "G.jsonl", "S")
                assert config.sae_layer == [3, 4]
    assert len(named) == len({json.dumps(settings) for settings in named.values()})


def test_ablation_has_the_papers_rows():
    plan = reproduce.ablation_plan("toy")
    assert [len(lines) for lines in plan.values()] == [8, 8, 4, 5]
    rows = {label: (flags.strip(), paper) for lines in plan.values() for label, _, flags, paper in lines}
    assert rows["α = 0.5, with stop-gradient"] == ("", (63.6, 1.680))
    assert rows["α = 2, no stop-gradient"] == ("--alpha 2 --no_stop_gradient", (61.9, 1.643))
    assert rows["mlp, layer 1 (paper: 13)"] == ("--sae_site mlp --sae_layer 1", (61.3, 1.637))
    assert rows["res, layer 0 1 3 (paper: 0 12 25)"] == ("--sae_site res --sae_layer 0 1 3", (51.4, 1.66))


def test_alpha_of_equal_size_is_found_in_logarithms():
    """Here D is 1 / α²."""
    alphas = reproduce.STATE_ALPHAS
    rows = [make_row(f"no_sae_alpha_{alpha:g}", mse_rejected=alpha**-2) for alpha in alphas]
    between = float(f"{math.sqrt(alphas[0] * alphas[1]):.2g}")
    for wanted, mse in ((between, between**-2), (alphas[-1], 1e-9)):
        assert reproduce.equal_size_alpha([*rows, make_row("fpo", mse_rejected=mse)]) == wanted


# ---------------------------------------------------------------------------- the frontier
def test_accuracy_within_a_distance_by_hand():
    """The best evaluation up to there counts, or the point between two; of a method, its best setting."""

    def curve(*points):
        return [{"kl": kl, "accuracy": accuracy} for kl, accuracy in points]

    whole = curve((0.0, 0.5), (2.0, 0.7), (4.0, 0.6), (3.0, 0.9))
    found = [reproduce.accuracy_within(whole, "kl", level) for level in (0.0, 1.0, 2.5, 3.5, 9.0)]
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.9, 0.9])
    rows = [make_row("a", seed, curve((0, 0.5), (4, 0.7 + seed / 5))) for seed in (0, 1)]
    rows += [make_row("b", 0, curve((0, 0.5), (1, 0.6))), make_row("c", 0, curve((0, 0.5), (2, 0.8)))]
    assert reproduce.best_within(rows, ["a", "b"], "kl", 4.0) == pytest.approx(0.8)
    text, lines = reproduce.compare(rows, {"dpo": ["a", "b"], "fpo": ["c"]}, "kl")
    assert text.splitlines()[2:] == [  # all reach 2: levels 0.06, 0.2, 0.6 and 2
        "| FPO (1 settings) | 50.9 | 53 | 59 | 80 |",
        "| DPO (2 settings) | 50.6 | 52 | 56 | 65 |",
    ]
    assert [x[-1] for x in lines["dpo"][:2]] == pytest.approx([4.0, 0.8])


# ---------------------------------------------------------------------------- figures
def test_curves_are_means_over_seeds_and_a_figure_is_the_same_each_time(tmp_path):
    rows = []
    for name in reproduce.METHODS[1:]:
        for seed, (w, l) in enumerate(((1.0, 5.0), (3.0, 11.0))):
            curve = [{"step": 0, "kl_chosen": 0, "kl_rejected": 0, "kl_margin": 0}]
            curve.append({"step": 10, "kl_chosen": w, "kl_rejected": l, "kl_margin": l / 10})
            rows.append(make_row(name, seed, curve))
    options = SimpleNamespace(task="comparison", assets=str(tmp_path), began=0.0, done=1)
    (tmp_path / "results.json").write_text('{"ablation": [1]}')
    drawn = []
    for _ in range(2):
        figure = reproduce.draw_curves(rows, "kl", "KL (nats)")
        reproduce.publish(options, rows, {"Table": "| x |\n"}, {"kl": figure})
        drawn.append((tmp_path / "kl.svg").read_bytes())
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"<?xml")
    labels = ["KL (nats)", "KL (nats)", "|β D(y_l) − β D(y_w)|"]
    assert [ax.get_ylabel() for ax in figure.axes] == labels
    lines = [next(line for line in ax.lines if line.get_label() == "FPO") for ax in figure.axes]
    assert [line.get_ydata()[1] for line in lines] == pytest.approx([2.0, 8.0, 0.8])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ablation"] == [1] and results["comparison"]["rows"] == rows
    assert (tmp_path / "comparison.md").read_text() == "**Table**\n\n| x |\n"


# ---------------------------------------------------------------------------- losses and measures
SETTINGS = {"beta": 0.1, "alpha": 0.5, "gamma": None, "k": 9, "stop_gradient": True}


def statistics(seed):
    g = torch.Generator().manual_seed(seed)
    logps, features = -9 * torch.rand(4, generator=g), torch.rand(4, 6, generator=g)
    return Statistics(logps, torch.tensor([3, 2, 5, 4]), (features,))


def test_losses_with_another_distance():
    """All features at weight 1 give FPO; no length norm is DPO's with α D; states by hand."""
    policy, reference = statistics(0), statistics(1)
    usual, values = fpo.method_loss("fpo", policy, reference, **SETTINGS)
    weighted, same = control.weighted_loss(list(range(6)))("fpo", policy, reference, **SETTINGS)
    assert torch.allclose(weighted, usual) and all(torch.allclose(same[n], values[n]) for n in same)
    free, _ = control.weighted_loss([])("fpo", policy, reference, **SETTINGS)
    assert torch.allclose(free, fpo.method_loss("fpo", policy, reference, **{**SETTINGS, "alpha": 0.0})[0])
    sums, _ = ablations.loss_without_length_norm("fpo", policy, reference, **{**SETTINGS, "alpha": 0.0})
    assert torch.allclose(sums, fpo.method_loss("dpo", policy, reference, **SETTINGS)[0])
    loss, values = ablations.loss_of_states("fpo", policy, reference, **SETTINGS, units=(2.0,))
    D = ((policy.features[0] - reference.features[0]) ** 2).sum(1) / 6 / 2
    ratio = (policy.logps - reference.logps) / policy.lengths
    u = 0.1 * (ratio[:2] - ratio[2:]) - 0.05 * (D[2:] - D[:2])
    assert torch.allclose(loss, -u.sigmoid().log()) and torch.allclose(values["mse_rejected"], D[2:])


def test_the_encoder_of_states_pools_the_states(monkeypatch):
    monkeypatch.setattr(train, "load_config", lambda name: make_lm().config)
    encoder, h = ablations.state_encoder(SimpleNamespace(model="")), torch.randn(5, D)
    pooled = pooled_features(h, encoder, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3]))
    assert torch.allclose(pooled, torch.stack([h[:2].mean(0), h[2:].mean(0)]), atol=1e-6)


def exact_sae():
    """An SAE that gives its input back: c = (h⁺, h⁻), d features active at each state."""
    both = torch.cat([torch.eye(D), -torch.eye(D)], 1)
    return JumpReLUSAE(both, torch.zeros(2 * D), both.T.clone(), torch.zeros(D), torch.zeros(2 * D))


def plainly(lm, sae, x, y):
    """log π of y's tokens, and the features of layer 1 at their positions, by the model's own forward."""
    with torch.no_grad():
        out = lm(torch.cat([x, y])[None], output_hidden_states=True)
    logps = out.logits[0, len(x) - 1 : -1].log_softmax(-1).gather(1, y[:, None])[:, 0]
    return logps, sae.encode(out.hidden_states[2][0, len(x) - 1 : -1])


@pytest.mark.parametrize("sae", [exact_sae(), make_sae()], ids=["exact", "random"])
def test_measure_against_plain_forwards(monkeypatch, sae):
    lm, pairs = make_lm(), make_pairs(9)
    lms = {"model": nudge(lm), "reference": lm}
    monkeypatch.setattr(train, "load_lm", lambda name, *_, **__: lms[name])
    monkeypatch.setattr(train, "load_saes", lambda *_: ([sae], [(1, "res")]))
    monkeypatch.setattr(train, "load_data", lambda *_: pairs)
    monkeypatch.setattr(data, "load_tokenizer", lambda name: SimpleNamespace(pad_token_id=0))
    config = SimpleNamespace(model="model", reference="reference", dtype="float32", layout="auto")
    found = ablations.measure(config)
    ratios, nll, change = ([], []), [], torch.zeros(sae.m)
    for x, *ys in (pairs[i] for i in range(9)):
        for side, y in enumerate(ys):
            (logps, c), (ref_logps, ref_c) = (plainly(one, sae, x, y) for one in lms.values())
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


def test_features_that_tell_responses_apart():
    lm, sae, whole = make_lm(), make_sae(), make_pairs(20, seed=5)
    rows = [whole[i][:2] for i in range(20)]
    features = [plainly(lm, sae, x, y)[1] for x, y in rows]
    pairs = data.Pairs([(x.tolist(), y.tolist(), []) for x, y in rows])
    mean, top = control.feature_statistics(Policy(lm, [sae], [(1, "res")]), pairs, layout="separate")
    assert torch.allclose(mean, torch.stack([c.mean(0) for c in features]).mean(0).double(), atol=1e-5)
    assert torch.allclose(top, torch.cat(features).amax(0), atol=1e-4)


def test_chosen_features_where_the_answer_is_known():
    means = {"mean_a": torch.tensor([0.0, 5, 4, 0, 1, 3]), "mean_b": torch.tensor([0.0, 4.5, 1, 2, 0, 3])}
    means["largest_a"] = torch.tensor([0.0, 9, 5, 1, 8, 7])
    assert control.choose_features(**means, n=2) == [2, 4]
    assert control.choose_features(**means, n=6) == [2, 4, 1]  # differences 3, 1, 0.5; none at or below 0
    assert control.choose_features(**means, n=3, criterion="token") == [1, 4]  # 5's mean is no higher in A
    assert sorted(control.choose_features(**means, n=9, criterion="random", seed=3)) == [1, 2, 3, 4, 5]
    draws = [control.choose_features(**means, n=2, criterion="random", seed=seed) for seed in range(20)]
    assert len(set(map(tuple, draws))) > 5
