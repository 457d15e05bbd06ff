"""experiments/reproduce.py and runs.py: which flag reaches which child, runs, tables and the frontier."""

import itertools
import json
from types import SimpleNamespace

import pytest

import eval_diversity
import runtime
import settings
from experiments import control, reproduce, runs


def make_row(name, seed=0, curve=None, **scores):
    return {"name": name, "seed": seed, "scores": scores, "curve": curve or {}, "floor": 0.0}


def parse(tmp_path, words):
    task, *rest = words.split() if isinstance(words, str) else words
    return reproduce.parse_args([task, "--out", str(tmp_path / "runs"), *rest])


# ---------------------------------------------------------------------------- numbers
def test_table_of_means_deviations_shares_and_the_papers_values():
    scores = [{"accuracy": 0.8, "entropy": 2.0, "share_polite": 0.5}, {"accuracy": 0.82, "entropy": 4.0}]
    rows = [make_row("fpo", seed, **here) for seed, here in enumerate([*scores, {"entropy": 9.0}])]
    rows.append(make_row("dpo", mse_chosen=2e-6, accuracy=0.123456))
    lines = [reproduce.LINES[name] for name in ("fpo", "dpo", "sft")]
    columns = ("accuracy", "paper_accuracy", "entropy", "share_polite", "mse_chosen", "paper_seconds")
    head, _, ours, dpo, sft = reproduce.table(rows, lines, columns).splitlines()
    names = "accuracy (%) | paper accuracy (%) | entropy | share polite (%) | mse chosen | paper seconds"
    assert head == f"|  | {names} |"
    # n − 1: 100 · 0.01 · √2, and √((9 + 1 + 16) / 2)
    assert ours == "| FPO | 81 ± 1.4 | 64.1 | 5 ± 3.6 | 50 | – | 8290 |"
    assert dpo == "| DPO | 12.35 | 59.9 | – | – | 2e-06 | 8609 |"
    assert sft == "| SFT | – | – | – | – | – | – |"


def test_collect_reads_scores_time_and_the_curve(tmp_path):
    steps = [{"step": i, "pairs_per_s": 16.0} for i in range(1, 21)]
    steps[3] |= {"eval_kl_rejected": 7.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    files = {"scores": {"before": {"kl_rejected": 0.0, "more": 1.0}, "after": {"kl_rejected": 9.0}}}
    files |= {"scored": {"entropy": 1.5, "train": {"accuracy": 0.925}}}
    files |= {"config": {"batch_size": 32, "units": [3.0, 5.0], "audit": {"floor": 0.2}}}
    files |= {"measured": {"l0": 9.0, "feature_change": [1.0]}, "run": {"name": "fpo", "seed": 3}}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    row = runs.collect(str(tmp_path))
    scores = {"l0": 9.0, "train_accuracy": 0.925, "train_seconds": 40.0}  # 20 · 32 / 16
    assert row["scores"] == files["scored"] | scores and (row["name"], row["seed"]) == ("fpo", 3)
    assert row["curve"] == {"step": [0, 4, 20], "kl_rejected": [0.0, 7.0, 9.0]}
    assert row["feature_change"] == [1.0] and row["floor"] == 0.05  # in the run's units, 4 on average


def test_a_row_keeps_what_tables_and_figures_show(tmp_path, capsys):
    """publish: columns of the tables, keys of the figures, six digits; what other tasks wrote stays."""
    curve = {"step": [0, 10], "accuracy": [0.5, 2 / 3], "kl_rejected": [0.0, 2.0], "mse_rejected": [0, 1e-7]}
    row = make_row("dpo", 2, curve | {"nll_chosen": [1.0, 2.0]}, accuracy=2 / 3, intervals={"accuracy": []})
    plan = {"Table": ([reproduce.LINES["dpo"]], ("accuracy", "entropy", "paper_accuracy"))}
    (tmp_path / "results.json").write_text('{"ablation": [1]}')
    options = SimpleNamespace(task="frontier", assets=str(tmp_path))
    reproduce.publish(options, [row], plan, {"Table": "| x |\n"}, settings={"dpo": ["dpo"]})
    results = json.loads((tmp_path / "results.json").read_text())
    short = {**curve, "accuracy": [0.5, 0.666667]}
    kept = {"name": "dpo", "seed": 2, "floor": 0.0, "scores": {"accuracy": 0.666667}, "curve": short}
    assert results["frontier"]["rows"] == [kept] and results["ablation"] == [1]
    assert (tmp_path / "frontier.md").read_text() == "**Table**\n\n| x |\n"
    assert "| x |" in capsys.readouterr().out
    # The figures can be drawn again from that file alone.
    first = (tmp_path / "frontier.svg").read_bytes()
    (tmp_path / "frontier.svg").unlink()
    reproduce.main(["figures", "--assets", str(tmp_path)])
    assert (tmp_path / "frontier.svg").read_bytes() == first and first.startswith(b"<?xml")


# ---------------------------------------------------------------------------- flags
OWN = "--preset own --model M --dataset F.jsonl --eval_dataset G.jsonl --sae S"


def words_of(options, method, flags=(), seed=0):
    """{child: the words of its command} of a run."""
    commands = runs.make_run(options, method, flags, seed)["commands"]
    names = {"train": "train", "eval_diversity": "score", "experiments.control": "measure"}
    return {names[c[len(c) - c[::-1].index("-m")]]: c for c in commands}


def value_of(words, flag):
    """What stands behind a flag; None where it is not given."""
    return words[words.index(flag) + 1] if flag in words else None


def test_a_flag_goes_to_every_child_that_knows_it(tmp_path):
    flags = "--alpha 2 --gamma 1 --beta 0.2 --lr=1e-5 --max-length 900 --prompts 7 --no_compile --sae_layer 3"
    options = parse(tmp_path, f"comparison {flags}")
    own = {"--lr": "1e-5", "--beta": "0.2", "--max_length": "900", "--prompts": None, "--sae_layer": "3"}
    for method, terms in {
        "dpo": {"--alpha": None, "--gamma": None},
        "tdpo2": {"--alpha": None, "--gamma": None},  # α of a KL: another quantity
        "simpo": {"--alpha": None, "--gamma": "1"},
        "fpo": {"--alpha": "2", "--gamma": None},
    }.items():
        children = words_of(options, method)
        training = children["train"]
        assert {flag: value_of(training, flag) for flag in {**own, **terms}} == {**own, **terms}, method
        assert "--no_compile" in training
        for child, wanted in {"score": "7", "measure": None}.items():
            read = {flag: value_of(children[child], flag) for flag in own}
            expected = {"--max_length": "900", "--sae_layer": "3", "--prompts": wanted}
            assert read == dict.fromkeys(own) | expected, child
    assert options.alpha == 2 and parse(tmp_path, "comparison").alpha == 0.5


def test_the_held_out_pairs_have_another_name_in_eval_diversity(tmp_path):
    children = words_of(parse(tmp_path, f"comparison {OWN}"), "dpo")
    assert value_of(children["train"], "--dataset") == "F.jsonl"
    assert value_of(children["score"], "--dataset") == "G.jsonl"
    assert value_of(children["score"], "--train_pairs") == "F.jsonl"
    assert value_of(children["measure"], "--eval_dataset") == "G.jsonl"
    assert words_of(parse(tmp_path, "comparison"), "dpo")["score"].count("--train_pairs") == 1  # the preset's


def test_sharded_runs_are_started_by_torchrun_and_their_measure_is_not_sharded(tmp_path):
    children = words_of(parse(tmp_path, "comparison --shard fsdp"), "fpo")
    assert "torch.distributed.run" in children["train"] and value_of(children["train"], "--shard") == "fsdp"
    assert "torch.distributed.run" not in children["measure"] and "--shard" not in children["measure"]
    assert "torch.distributed.run" not in words_of(parse(tmp_path, "comparison"), "fpo")["train"]


def test_the_model_that_all_start_from_is_made_with_the_same_flags(tmp_path, monkeypatch, capsys):
    """SFT knows --lr and --max_length, but neither α nor γ; where it fails, one line tells the log's last."""
    monkeypatch.chdir(tmp_path)
    words = ["comparison", "--preset", "gemma-2-2b", "--lr", "3", "--max_length", "1900", "--alpha", "2"]
    started = []

    def run(command, stdout, **_):
        started.append(command)
        stdout.write("a bar\nerror: no licence")
        stdout.flush()
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(runtime.UserError, match=r"sft/log.txt: .* status 2: error: no licence"):
        reproduce.main([*words, "--gamma", "1"])
    ((_, *sft),) = started
    assert sft[:4] == ["-m", "train", "--method", "sft"] and value_of(sft, "--out") == "runs/gemma-2-2b/sft"
    assert (value_of(sft, "--lr"), value_of(sft, "--max_length")) == ("3", "1900")
    assert "--alpha" not in sft and "--gamma" not in sft


REFUSED = {
    "comparison --seed 3": "--seed: not taken here: --seeds",  # every seed would be the same run
    "comparison --no_eval_kl": "--no_eval_kl: not taken here",  # tables and figures show the KL
    "comparison --lrr 3": "--lrr: no run of comparison",
    "comparison more": "more: neither",
    "comparison --samples -1": "--samples -1: must be at least 0",
    "comparison --seeds 0 -1": "--seed -1: must be at least 0",
    "comparison --lr -1": "--lr -1.0: must be at least 0",
    "comparison --sae_site mlp": "--sae_site mlp: .* at `res` alone",
    f"comparison {OWN.replace(' --sae S', '')}": "--sae: FPO needs one",
    "comparison --preset gemma-2-2b --dataset F.jsonl": "--dataset: runs/gemma-2-2b/sft/model is not there",
    "ablation --sae_layer 2": "--sae_layer: not taken here: ablation sets it",
    "ablation --preset gemma-2-9b": "ablation --preset gemma-2-9b: one of toy, gemma-2-2b",
    "frontier --beta 1": "--beta: not taken here: frontier sets it",
    "frontier --samples 3": "--samples 3: frontier samples nothing",
    "frontier --prompts 3": "--prompts: no run of frontier",
    "control --alpha 2": "--alpha: not taken here: control sets it",
    "control --gamma 1": "--gamma: no run of control",
    "control --preset gemma-2-2b": "control --preset gemma-2-2b: one of toy",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_can_not_be_done_is_refused_before_any_run(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runtime.UserError, match=REFUSED[words]):
        parse(tmp_path, words)


def test_without_git_results_are_written_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runtime.made_by()["commit"] == "unknown"


# ---------------------------------------------------------------------------- runs
def test_a_done_run_is_not_repeated_and_a_failed_one_ends_all(tmp_path, monkeypatch):
    """Other commands or other weights at the start are another run; run.json comes only at a success."""
    start = tmp_path / "my start"
    start.mkdir()
    (start / "model.safetensors").write_bytes(b"weights")
    options = parse(tmp_path, ["comparison", "--model", str(start), "--seeds", "0", "--cache_dir", "a  b"])
    done, lines = [], [("FPO", "fpo", (), ()), ("again", "fpo", (), ()), ("DPO", "dpo", (), ())]

    def run(words, **_):
        """A child: a training that ends leaves its scores."""
        done.append(words)
        if "train" in words and whole:
            runtime.write_json(f"{value_of(words, '--out')}/scores.json", {})
        return reply

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(runs, "collect", lambda folder: folder.rsplit("/", 1)[-1])
    reply, whole = SimpleNamespace(returncode=0), False
    with pytest.raises(runtime.UserError, match="seed0: the training was stopped"):  # by a signal: status 0
        runs.do_lines(options, lines[:1])
    whole = True
    done.clear()
    assert runs.do_lines(options, lines) == ["fpo_seed0", "dpo_seed0"]
    assert len(done) == 6  # each: train, score, measure
    # Paths with spaces, even two of them, are words of their own.
    assert all(value_of(words, "--reference") in (str(start), None) for words in done)
    assert [value_of(words, "--cache_dir") for words in done if "train" in words] == ["a  b"] * 2
    runs.do_lines(options, lines)
    assert len(done) == 6
    options.samples = "3"
    runs.do_lines(options, lines[:1])
    assert len(done) == 9
    (start / "model.safetensors").write_bytes(b"others")
    reply.returncode, options.at_once = 3, 1
    with pytest.raises(runtime.UserError, match="status 3"):
        runs.do_lines(options, lines)
    assert len(done) <= 11  # of three commands the first; the next run may have begun, none after it
    assert not (tmp_path / "runs/fpo_seed0/run.json").exists()


TASKS = ("ablation --preset toy", "ablation --preset gemma-2-2b", f"comparison {OWN}", "frontier", "control")
TASKS += ("comparison --preset gemma-2-9b", "frontier --preset gemma-2-9b")


@pytest.mark.parametrize("words", TASKS)
def test_a_name_is_one_setting_and_a_setting_one_name(tmp_path, monkeypatch, words):
    """In every table; what a task's lines set is what it refuses from the user, but for FPO's α."""
    monkeypatch.chdir(tmp_path)
    options, named, set_by_lines = parse(tmp_path, words), {}, set()
    plan = reproduce.PLANS[options.task](options)
    for _, method, flags, _ in reproduce.lines_of(plan):
        run = runs.make_run(options, method, flags, 0)
        set_by_lines |= {runs.field_of(word[2:]) for word in flags if word.startswith("--")}
        for command in run["commands"][:1] if method != "sft" else ():
            at = len(command) - command[::-1].index("-m")
            if command[at] == "train":
                config = settings.parse_args(command[at + 1 :])
            else:
                config = control.parse_args(command[at + 1 :])[1]
            assert config.eval_kl  # which the tables and figures show, whatever the preset says
            variant = method if command[at] != "train" else ""
            seen = {**vars(config), "out": "", "variant": variant}
            assert named.setdefault(run["name"], seen) == seen
        if options.preset == "own":
            scored = words_of(options, method, flags)["score"]
            config = eval_diversity.parse_args(scored[scored.index("eval_diversity") + 1 :]).config
            assert (config.dataset, config.eval_dataset, config.sae) == ("F.jsonl", "G.jsonl", "S")
    assert len(named) == len({json.dumps(settings) for settings in named.values()})
    allowed = {"alpha"} - set(reproduce.SET_BY_LINES[options.task])
    assert set_by_lines - allowed <= set(reproduce.SET_BY_LINES[options.task])


def test_ablation_has_the_papers_rows_and_an_alpha_of_equal_size(tmp_path):
    options = parse(tmp_path, "ablation")
    alphas = reproduce.STATE_ALPHAS  # here D is 1 / α², FPO's that of α = 0.1
    rows = [make_row(f"no_sae_alpha_{alpha:g}", mse_rejected=alpha**-2) for alpha in alphas]
    alpha = reproduce.equal_size_alpha([*rows, make_row("fpo", mse_rejected=0.1**-2)])
    assert alpha == 0.1  # log D is linear in log α, so it is found between 0.05 and 0.15
    plan = reproduce.ablation_plan(options, alpha)
    lines = {label: (" ".join(flags), paper) for label, _, flags, paper in reproduce.lines_of(plan)}
    assert lines["α = 0.5, with stop-gradient"] == ("", (63.6, 1.680))
    assert lines["α = 2, no stop-gradient"] == ("--alpha 2 --no_stop_gradient", (61.9, 1.643))
    assert lines["mlp, layer 1 (paper: 13)"] == ("--sae_site mlp --sae_layer 1", (61.3, 1.637))
    assert lines["res, layer 0 1 3 (paper: 0 12 25)"] == ("--sae_site res --sae_layer 0 1 3", (51.4, 1.66))
    assert lines["no SAE, α = 0.1: FPO's D_FPO"] == ("--alpha 0.1", ())


# ---------------------------------------------------------------------------- the frontier
def test_accuracy_within_a_distance_by_hand():
    """The best evaluation up to there counts, or the point between two; of a method, its best setting."""

    def curve(*points):
        kl, accuracy = zip(*points, strict=True)
        return {"kl": list(kl), "accuracy": list(accuracy)}

    whole = [make_row("a", 0, curve((0.0, 0.5), (2.0, 0.7), (4.0, 0.6), (3.0, 0.9)))]
    found = [reproduce.best_within(whole, ["a"], "kl", level) for level in (0.0, 1.0, 2.5, 3.5, 9.0)]
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.9, 0.9])
    rows = [make_row("a", seed, curve((0, 0.5), (4, 0.7 + seed / 5))) for seed in (0, 1)]
    rows += [make_row("b", 0, curve((0, 0.5), (1, 0.6))), make_row("c", 0, curve((0, 0.5), (2, 0.8)))]
    assert reproduce.best_within(rows, ["a", "b"], "kl", 4.0) == pytest.approx(0.8)
    text = reproduce.compare(rows, {"dpo": ["a", "b"], "fpo": ["c"]}, "kl")
    assert text.splitlines()[2:] == [  # all reach 2: levels 0.06, 0.2, 0.6 and 2
        "| FPO (1 settings) | 50.9 | 53 | 59 | 80 |",
        "| DPO (2 settings) | 50.6 | 52 | 56 | 65 |",
    ]


def test_the_frontier_is_drawn_as_envelopes():
    """One line a method, from a fiftieth of what all reach to what it reaches, that never falls; no dots."""
    curves = {"a": ([0, 1, 4], [0.5, 0.8, 0.7]), "b": ([0, 1, 2], [0.5, 0.6, 0.9])}
    rows = [
        make_row(name, 0, {"kl_rejected": x, "mse_rejected": [v / 10 for v in x], "accuracy": y})
        for name, (x, y) in curves.items()
    ]
    figure = reproduce.draw_frontier(rows, {"dpo": ["a"], "fpo": ["b"]})
    for ax, unit in zip(figure.axes, (1, 10), strict=True):
        assert [line.get_label() for line in ax.lines] == ["DPO", "FPO"] and not ax.collections
        x, y = ax.lines[0].get_data()
        assert [x[0] * unit, x[-1] * unit] == pytest.approx([2 / 50, 4])
        assert [y[0], y[-1]] == pytest.approx([0.5 + 0.3 * 2 / 50, 0.8])
        assert all(after >= before for before, after in itertools.pairwise(y))
