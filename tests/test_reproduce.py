"""Aggregation, tables and figures on hand-made rows; the commands; what counts as finished. No training."""

import json
import math
from argparse import Namespace

import pytest

import eval_diversity
import reproduce
import train


def make_row(name, seed, curve=(), **scores):
    return {"name": name, "method": name, "seed": seed, "scores": scores, "curve": list(curve)}


def make_curve(*points):
    keys = ("step", "kl_chosen", "kl_rejected", "mse_chosen", "mse_rejected", "kl_margin", "mse_margin")
    return [dict(zip(keys, point, strict=True)) for point in points]


def args(tmp_path, *words):
    return reproduce.parse_args(["comparison", "--out", str(tmp_path / "runs"), *words])


# ---------------------------------------------------------------------------- numbers
def test_mean_and_deviation_by_hand():
    mean, deviation = reproduce.mean_deviation([2.0, 4.0, 9.0])
    assert mean == pytest.approx(5.0)
    assert deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))  # n - 1
    assert math.isnan(reproduce.mean_deviation([2.0])[1])


def test_cell_says_what_was_run():
    assert reproduce.cell([0.5, 0.7], 1, 100) == "60.0 ± 14.1"  # 100 · 0.1 · √2
    assert reproduce.cell([1.25], 2) == "1.25"
    assert reproduce.cell([], 2) == "not run"


def test_table_puts_the_papers_row_beside_ours():
    rows = [
        make_row("fpo", 0, accuracy=0.8),
        make_row("fpo", 1, accuracy=0.82),
        make_row("dpo", 0, accuracy=0.1),
    ]
    lines = [("FPO", "fpo", (64.1, 1.68)), ("SFT", "sft", None)]
    head, _, fpo, sft = reproduce.table(rows, lines, ["accuracy"]).splitlines()
    assert head == "|  | accuracy, held out (%) | paper: accuracy (%) | paper: entropy |"
    assert fpo == "| FPO | 81.0 ± 1.4 | 64.1 | 1.68 |"
    assert sft == "| SFT | not run | – | – |"
    alone = reproduce.table(rows[2:], [("DPO", "dpo", None)], ["accuracy"])
    assert alone.splitlines()[::2] == ["|  | accuracy, held out (%) |", "| DPO | 10.0 |"]


def test_collect_reads_training_accuracy_and_the_curve(tmp_path):
    steps = [{"step": i, "accuracy": i / 20} for i in range(1, 21)]
    steps[3]["eval_kl_rejected"] = 7.0
    steps[3]["eval_accuracy"] = 0.6
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    ends = {"before": {"kl_rejected": 0.0}, "after": {"kl_rejected": 9.0}}
    scored = {"entropy": 1.5, "train": {"accuracy": 0.925}}
    for name, value in (("run", {"seconds": 3.0}), ("scored", scored), ("scores", ends)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    run = {
        "name": "fpo",
        "method": "fpo",
        "seed": 2,
        "folder": str(tmp_path),
        "commands": [["python", "train.py"]],
    }
    row = reproduce.collect(run)
    assert row["scores"] == {**scored, "train_accuracy": 0.925}
    assert [(p["step"], p["kl_rejected"]) for p in row["curve"]] == [(0, 0.0), (4, 7.0), (20, 9.0)]
    assert row["curve"][1]["accuracy"] == 0.6
    assert (row["seed"], row["seconds"]) == (2, 3.0)


def test_style_shares_of_known_responses():
    lines = [
        json.dumps({"response": text})
        for text in ("LOOK! THE OWL!", "HA! A JAY!", "try owl.", "none of them")
    ]
    shares = reproduce.style_shares(lines)
    assert (shares["share_shout"], shares["share_terse"], shares["share_polite"]) == (0.5, 0.25, 0.0)


# ---------------------------------------------------------------------------- runs
def test_finished_only_with_the_same_commands_settings_and_start(tmp_path):
    run = reproduce.make_run(args(tmp_path), "fpo", "fpo", 0)
    assert not reproduce.finished(run, "digest")
    folder, words = tmp_path / "runs" / "fpo_seed0", run["commands"][0]
    folder.mkdir(parents=True)
    settings = vars(train.parse_args(words[words.index("train.py") + 1 :]))
    record = {"commands": [reproduce.shown(c) for c in run["commands"]], "start": "digest"}
    for name, value in (("config", settings), ("scores", {}), ("scored", {}), ("run", record)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    assert reproduce.finished(run, "digest")
    assert not reproduce.finished(run, "another SFT model")
    changed = reproduce.make_run(args(tmp_path), "fpo", "fpo", 0, {"alpha": 2.0})
    assert changed["folder"] == run["folder"] and not reproduce.finished(changed, "digest")
    assert not reproduce.finished(
        reproduce.make_run(args(tmp_path, "--samples", "3"), "fpo", "fpo", 0), "digest"
    )
    (folder / "config.json").write_text(json.dumps(settings | {"lr": 1.0}))  # the preset was another
    assert not reproduce.finished(run, "digest")
    (folder / "config.json").write_text(json.dumps(settings))
    assert reproduce.finished(run, "digest")
    (folder / "scored.json").unlink()
    assert not reproduce.finished(run, "digest")


def test_a_finished_run_is_not_repeated_and_a_failed_one_is_told(tmp_path, monkeypatch):
    options, done = args(tmp_path), []
    runs = [reproduce.make_run(options, "dpo", "dpo", seed) for seed in (0, 1)]
    monkeypatch.setattr(reproduce, "finished", lambda run, start: run["seed"] == 0)
    monkeypatch.setattr(reproduce, "do_run", lambda run, start, commit: done.append(run["seed"]))
    monkeypatch.setattr(reproduce, "collect", lambda run: run["seed"])
    assert reproduce.do_runs(options, runs) == [0, 1] and done == [1]
    monkeypatch.undo()
    bad = {
        "folder": str(tmp_path / "bad"),
        "commands": [[reproduce.sys.executable, "-c", "raise SystemExit(3)"]],
    }
    with pytest.raises(RuntimeError, match="status 3"):
        reproduce.do_run(bad, "", "")
    assert not (tmp_path / "bad" / "run.json").exists()


def all_runs(options):
    runs = [reproduce.make_run(options, m, m, 0, watched=True) for m in reproduce.METHODS]
    for lines in reproduce.ablation_plan(options.preset).values():
        runs += [reproduce.make_run(options, name, method, 0, flags) for _, name, method, flags, _ in lines]
    return runs


@pytest.mark.parametrize("preset", ["toy", "gemma-2-2b"])
def test_every_command_is_one_that_the_scripts_take(tmp_path, preset):
    options, named = args(tmp_path, "--preset", preset), {}
    for run in all_runs(options):
        for words in run["commands"]:
            script = next(word for word in words if word.endswith(".py"))
            parser = {"train.py": train, "eval_diversity.py": eval_diversity}[script]
            settings = parser.parse_args(words[words.index(script) + 1 :])
            if script == "train.py":
                seen = {n: v for n, v in vars(settings).items() if n not in ("out", "eval_every", "eval_kl")}
                assert named.setdefault(run["name"], seen) == seen  # a name is one setting, in every table
    assert len(named) == len({json.dumps(settings) for settings in named.values()})  # and a setting one name


def test_ablation_has_the_papers_rows():
    plan = reproduce.ablation_plan("toy")
    assert [len(lines) for lines in plan.values()] == [8, 8, 4, 5]
    rows = {label: (name, flags, paper) for lines in plan.values() for label, name, _, flags, paper in lines}
    assert rows["α = 0.5, with stop-gradient"] == ("fpo", {}, (63.6, 1.680))
    through = {"alpha": 2.0, "no_stop_gradient": True}
    assert rows["α = 2, without stop-gradient"] == ("fpo_alpha2_through", through, (61.9, 1.643))
    mlp = {"sae_layer": [1], "sae_site": "mlp"}
    assert rows["mlp, layer 1 (paper: 13)"] == ("fpo_mlp1", mlp, (61.3, 1.637))
    assert rows["res, layer 0, 1, 3 (paper: 0, 12, 25)"][1]["sae_layer"] == [0, 1, 3]


# ---------------------------------------------------------------------------- figures
@pytest.fixture
def rows():
    """Two seeds of each method: KL chosen 1 and 3, rejected 5 and 11 at the end."""
    made = []
    for name in reproduce.METHODS:
        for seed, (w, l) in enumerate(((1.0, 5.0), (3.0, 11.0))):
            curve = [] if name == "sft" else make_curve((0,) * 7, (10, w, l, w / 10, l / 10, l, l / 10))
            scores = {"accuracy": 0.6 + seed / 5, "entropy": 1 + seed, "activations_policy": [3.0, 2.0, 1.0]}
            made.append(make_row(name, seed, curve, **scores))
    made += [make_row(reproduce.alpha_name(a), 0, accuracy=0.5, entropy=a, kl_rejected=50 - a)
             for a in reproduce.ALPHAS if a != 0.5]  # fmt: skip
    next(row for row in made if row["name"] == "fpo")["scores"]["kl_rejected"] = 49.5
    return made


def test_curves_are_means_over_seeds_and_the_margin_has_beta(rows):
    figure = reproduce.draw_curves(rows, "kl", "KL (nats)")
    assert [ax.get_xlabel() for ax in figure.axes] == ["training step"] * 3
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "KL (nats)",
        "KL (nats)",
        "|β D(y_l) − β D(y_w)| (nats)",
    ]
    fpo = [next(line for line in ax.lines if line.get_label() == "FPO") for ax in figure.axes]
    assert fpo[0].get_color() == reproduce.METHODS["fpo"][1]
    assert [list(line.get_xdata()) for line in fpo] == [[0, 10]] * 3
    ends = [line.get_ydata()[1] for line in fpo]
    assert ends == pytest.approx([2.0, 8.0, 8.0])  # the runs' own margin: a mean over pairs, not of means
    assert len(figure.axes[0].lines) == 5  # all but the start


def test_points_of_methods_and_alphas(rows):
    (ax,) = reproduce.draw_accuracy_entropy(rows).axes
    assert (
        ax.get_xlabel() == "entropy of sampled tokens (nats)" and ax.get_ylabel() == "accuracy, held out (%)"
    )
    points, labels = ax.get_legend_handles_labels()
    assert labels == ["SFT", "DPO", "TDPO-1", "TDPO-2", "SimPO", "FPO"]
    assert [float(v[0]) for v in points[0].lines[0].get_data()] == pytest.approx([1.5, 70.0])
    kl, entropy = reproduce.draw_alpha(rows).axes
    assert kl.get_ylabel() == "KL rejected (nats)" and kl.get_xlabel() == entropy.get_xlabel() == "α"
    assert list(kl.lines[0].get_ydata()) == [50, 49.9, 49.5, 49, 48, 40, 0]
    (ax,) = reproduce.draw_activations(rows).axes
    assert ax.get_xlabel() == "rank of the feature" and list(ax.lines[0].get_xdata()) == [1, 2, 3]


def test_publish_writes_results_table_and_figures(tmp_path, rows):
    options = Namespace(what="comparison", assets=str(tmp_path), began=0.0, todo=1)
    (tmp_path / "results.json").write_text('{"ablation": [1]}')
    for _ in range(2):
        reproduce.publish(
            options, rows, {"Table": "| x |\n"}, {"kl": reproduce.draw_curves(rows, "kl", "KL (nats)")}
        )
        drawn = (tmp_path / "kl.svg").read_bytes()
    assert drawn.startswith(b"<?xml") and drawn == (tmp_path / "kl.svg").read_bytes()
    assert (tmp_path / "comparison.md").read_text() == "**Table**\n\n| x |\n"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ablation"] == [1] and results["comparison"]["rows"] == rows
    assert results["comparison"]["runs"] == len(rows) and results["comparison"]["runs_done_now"] == 1
