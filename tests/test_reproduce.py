"""Runs, tables, figures and the frontier on hand-made rows; the losses and measures of the experiments."""

import json
import shlex
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import D, exact_sae, make_lm, make_pairs, make_sae, nudge

import data
import eval_diversity
import fpo
import loading
import runtime
import settings
from experiments import control, reproduce
from fpo import Statistics
from scale import pooled_features


def make_row(name, seed=0, curve=(), **scores):
    return {"name": name, "method": name, "seed": seed, "folder": "", "scores": scores, "curve": list(curve)}


def args(tmp_path, words):
    task, *rest = words.split()
    return reproduce.parse_args([task, "--out", str(tmp_path / "runs"), *rest])


# ---------------------------------------------------------------------------- numbers
def test_table_of_means_deviations_shares_and_the_papers_values():
    scores = [{"accuracy": 0.8, "entropy": 2.0, "share_polite": 0.5}, {"accuracy": 0.82, "entropy": 4.0}]
    rows = [make_row("fpo", seed, **here) for seed, here in enumerate([*scores, {"entropy": 9.0}])]
    rows.append(make_row("dpo", mse_chosen=2e-6, accuracy=0.123456))
    lines = [reproduce.LINES[name] for name in ("fpo", "dpo", "sft")]
    columns = ("accuracy", "paper_accuracy", "entropy", "share_polite", "mse_chosen", "paper_seconds")
    head, _, ours, dpo, sft = reproduce.table(rows, lines, columns).splitlines()
    assert head == (
        "|  | accuracy (%) | paper accuracy (%) | entropy | share polite (%) | mse chosen | paper seconds |"
    )
    # n − 1: 100 · 0.01 · √2, and √((9 + 1 + 16) / 2)
    assert ours == "| FPO | 81 ± 1.4 | 64.1 | 5 ± 3.6 | 50 | – | 8290 |"
    assert dpo == "| DPO | 12.35 | 59.9 | – | – | 2e-06 | 8609 |"
    assert sft == "| SFT | – | – | – | – | – | – |"


def test_collect_reads_scores_time_and_the_curve(tmp_path):
    steps = [{"step": i, "pairs_per_s": 16.0} for i in range(1, 21)]
    steps[3] |= {"eval_kl_rejected": 7.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    files = {"scores": {"before": {"kl_rejected": 0.0}, "after": {"kl_rejected": 9.0}}}
    files |= {"scored": {"entropy": 1.5, "train": {"accuracy": 0.925}}}
    files |= {"config": {"batch_size": 32, "units": [3.0, 5.0], "audit": {"floor": 0.2}}}
    files |= {"measured": {"l0": 9.0, "feature_change": [1.0]}, "run": {"name": "fpo", "seconds": 3.0}}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    row = reproduce.collect(str(tmp_path))
    scores = {"l0": 9.0, "train_accuracy": 0.925, "train_seconds": 40.0}  # 20 · 32 / 16
    assert row["scores"] == files["scored"] | scores and (row["name"], row["seconds"]) == ("fpo", 3.0)
    assert [(p["step"], p["kl_rejected"]) for p in row["curve"]] == [(0, 0.0), (4, 7.0), (20, 9.0)]
    assert row["floor"] == 0.05  # in the run's units, 4 on average


# ---------------------------------------------------------------------------- runs
def test_a_done_run_is_not_repeated_and_a_failed_one_is_told(tmp_path, monkeypatch):
    """Other commands or other weights at the start are another run; run.json comes only at a success."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start/model.safetensors").write_bytes(b"weights")
    options = args(tmp_path, f"comparison --model {tmp_path / 'start'} --seeds 0")
    done, lines = [], [("FPO", "fpo", "", ()), ("again", "fpo", "", ()), ("DPO", "dpo", "", ())]
    fake = SimpleNamespace(run=lambda words, **_: done.append(words) or reply)
    monkeypatch.setattr(reproduce, "subprocess", fake)
    monkeypatch.setattr(reproduce, "collect", lambda folder: folder.rsplit("/", 1)[-1])
    reply = SimpleNamespace(returncode=0)
    assert reproduce.do_lines(options, lines) == ["fpo_seed0", "dpo_seed0"]
    assert len(done) == 6  # each: train, score, measure
    reproduce.do_lines(options, lines)
    assert len(done) == 6
    options.samples = 3
    reproduce.do_lines(options, lines[:1])
    assert len(done) == 9
    (tmp_path / "start/model.safetensors").write_bytes(b"others")
    reply.returncode = 3
    with pytest.raises(runtime.UserError, match="status 3"):
        reproduce.do_lines(options, lines[:1])
    assert not (tmp_path / "runs/fpo_seed0/run.json").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ("comparison --seed 3", "--seed: not taken here"),  # every seed would be the same run
        ("comparison --k=20", "--k=20: not taken here"),  # the scoring would not see it
        ("comparison --max-length 900", "--max-length: not taken here"),
        ("ablation --preset gemma-2-9b", "ablation --preset gemma-2-9b: one of toy, gemma-2-2b"),
        ("control --preset gemma-2-2b", "control --preset gemma-2-2b: one of toy"),
    ],
)
def test_what_can_not_be_done_is_refused_before_any_run(tmp_path, words, says):
    with pytest.raises(runtime.UserError, match=says):
        args(tmp_path, words)


def test_without_git_results_are_written_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runtime.made_by()["commit"] == "unknown"


def planned(monkeypatch, options):
    """The lines of every run that a task does. Here D is 1 / α², FPO's that of α = 0.1."""
    lines, figure = [], SimpleNamespace(axes=[Mock(), Mock()])

    def do_lines(_, some):
        lines.extend(some)
        alphas = [flags.split()[-1] for _, method, flags, _ in some if method == "no_sae"]
        rows = [make_row(f"no_sae_alpha_{alpha}", mse_rejected=float(alpha) ** -2) for alpha in alphas]
        return [*rows, make_row("fpo", mse_rejected=0.1**-2)]

    monkeypatch.setattr(reproduce, "do_lines", do_lines)
    monkeypatch.setattr(reproduce, "compare", lambda *_: ("", {}))
    for name in ("publish", "draw", "draw_curves", "draw_features"):
        monkeypatch.setattr(reproduce, name, lambda *_: figure)
    getattr(reproduce, options.task)(options)
    return lines


OWN = "--preset own --model M --dataset F.jsonl --eval_dataset G.jsonl --sae S --sae_layer 3 4 --lr 1"
TASKS = ("ablation --preset toy", "ablation --preset gemma-2-2b", f"comparison {OWN}", "frontier", "control")
TASKS += ("comparison --preset gemma-2-9b", "frontier --preset gemma-2-9b")


@pytest.mark.parametrize("words", TASKS)
def test_every_command_is_one_that_the_scripts_take(tmp_path, monkeypatch, words):
    """A name is one setting, in every table, and a setting one name."""
    options, named = args(tmp_path, words), {}
    for _, method, flags, _ in planned(monkeypatch, options):
        run = reproduce.make_run(options, method, flags, 0)
        for text in run["commands"]:
            script, _, rest = text.partition(" --preset ")
            words = ["--preset", *shlex.split(rest)]
            if "eval_diversity.py" in script:
                config = eval_diversity.parse_args(words).config
            elif "--json" in words:  # a measure
                config = settings.parse_args(words[: words.index("--json")])
            else:
                config = settings.parse_args([*words, *shlex.split(script.partition("train.py")[2])])
                assert config.eval_kl  # which the tables and figures show, whatever the preset says
                seen = {**vars(config), "out": "", "script": script}
                assert named.setdefault(run["name"], seen) == seen
            if options.preset == "own":
                read = (config.dataset, config.eval_dataset, config.sae, config.sae_layer)
                assert read == ("F.jsonl", "G.jsonl", "S", [3, 4])
    assert len(named) == len({json.dumps(settings) for settings in named.values()})


def test_ablation_has_the_papers_rows_and_an_alpha_of_equal_size(tmp_path, monkeypatch):
    lines = planned(monkeypatch, args(tmp_path, "ablation"))
    rows = {label: (flags.strip(), paper) for label, _, flags, paper in lines}
    assert rows["α = 0.5, with stop-gradient"] == ("", (63.6, 1.680))
    assert rows["α = 2, no stop-gradient"] == ("--alpha 2 --no_stop_gradient", (61.9, 1.643))
    assert rows["mlp, layer 1 (paper: 13)"] == ("--sae_site mlp --sae_layer 1", (61.3, 1.637))
    assert rows["res, layer 0 1 3 (paper: 0 12 25)"] == ("--sae_site res --sae_layer 0 1 3", (51.4, 1.66))
    # log D is linear in log α, so 0.1 is found between 0.05 and 0.15.
    assert rows["no SAE, α = 0.1: FPO's D_FPO"] == ("--alpha 0.1", ())


# ---------------------------------------------------------------------------- the frontier
def test_accuracy_within_a_distance_by_hand():
    """The best evaluation up to there counts, or the point between two; of a method, its best setting."""

    def curve(*points):
        return [{"kl": kl, "accuracy": accuracy} for kl, accuracy in points]

    whole = [make_row("a", 0, curve((0.0, 0.5), (2.0, 0.7), (4.0, 0.6), (3.0, 0.9)))]
    found = [reproduce.best_within(whole, ["a"], "kl", level) for level in (0.0, 1.0, 2.5, 3.5, 9.0)]
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.9, 0.9])
    rows = [make_row("a", seed, curve((0, 0.5), (4, 0.7 + seed / 5))) for seed in (0, 1)]
    rows += [make_row("b", 0, curve((0, 0.5), (1, 0.6))), make_row("c", 0, curve((0, 0.5), (2, 0.8)))]
    assert reproduce.best_within(rows, ["a", "b"], "kl", 4.0) == pytest.approx(0.8)
    text, lines = reproduce.compare(rows, {"dpo": ["a", "b"], "fpo": ["c"]}, "kl")
    assert text.splitlines()[2:] == [  # all reach 2: levels 0.06, 0.2, 0.6 and 2
        "| FPO (1 settings) | 50.9 | 53 | 59 | 80 |",
        "| DPO (2 settings) | 50.6 | 52 | 56 | 65 |",
    ]
    x, (y,) = lines["dpo"]
    assert (x[-1], y[-1]) == (pytest.approx(4.0), pytest.approx(0.8))


# ---------------------------------------------------------------------------- figures
def test_curves_are_means_over_seeds_and_a_figure_is_the_same_each_time(tmp_path):
    def curve(w, l):
        names = ("step", "kl_chosen", "kl_rejected", "kl_margin")
        return [dict(zip(names, point, strict=True)) for point in ((0, 0, 0, 0), (10, w, l, l / 10))]

    curves = (curve(1.0, 5.0), curve(3.0, 11.0))
    rows = [make_row(name, seed, curves[seed]) for name in reproduce.METHODS[1:] for seed in (0, 1)]
    options = SimpleNamespace(task="comparison", assets=str(tmp_path))
    (tmp_path / "results.json").write_text('{"ablation": [1]}')
    drawn = []
    for _ in range(2):
        figure = reproduce.draw_curves(rows, "kl", "KL (nats)")
        reproduce.publish(options, rows, {"Table": "| x |\n"}, {"kl": figure})
        drawn.append((tmp_path / "kl.svg").read_bytes())
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"<?xml")
    lines = [next(line for line in ax.lines if line.get_label() == "FPO") for ax in figure.axes]
    assert [line.get_ydata()[1] for line in lines] == pytest.approx([2.0, 8.0, 0.8])
    D = json.loads(json.dumps(rows).replace("kl_", "mse_"))
    chosen, _, margin = reproduce.draw_curves([*D[1:], D[0] | {"floor": 0.25}], "mse", "D_FPO").axes
    (line,) = (line for line in chosen.lines if line.get_label() == "rounding alone")
    assert line.get_ydata().tolist() == [0.25, 0.25] and len(margin.lines) == len(chosen.lines) - 1
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


def test_the_encoder_of_states_pools_the_states(monkeypatch):
    monkeypatch.setattr(loading, "load_config", lambda name: make_lm().config)
    encoder, h = control.state_encoder(SimpleNamespace(model="")), torch.randn(5, D)
    pooled = pooled_features(h, encoder, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 3]))
    assert torch.allclose(pooled, torch.stack([h[:2].mean(0), h[2:].mean(0)]), atol=1e-6)


def plainly(lm, sae, x, y):
    """log π of y's tokens, and the features of layer 1 at their positions, by the model's own forward."""
    with torch.no_grad():
        out = lm(torch.cat([x, y])[None], output_hidden_states=True)
    logps = out.logits[0, len(x) - 1 : -1].log_softmax(-1).gather(1, y[:, None])[:, 0]
    return logps, sae.encode(out.hidden_states[2][0, len(x) - 1 : -1])


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
