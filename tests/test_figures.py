"""experiments/figures.py: what lines show, by hand; contrast; any runs' curves; the same bytes each time."""

import json
import re

import matplotlib
import numpy as np
import pytest

from experiments import figures
from runtime import UserError


def contrast(one, other):
    """Of two colours as WCAG 2 defines it: (L + 0.05) / (L' + 0.05), L the relative luminance."""

    def luminance(colour):
        parts = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722) + 0.05

    return max(luminance(one) / luminance(other), luminance(other) / luminance(one))


def test_text_and_lines_are_legible_on_white_and_on_black():
    """4.5 to 1 for text, 3 to 1 for lines; and no two lines differ by their colour alone."""
    assert contrast("white", "black") == pytest.approx(21)
    for ground in ("white", "black"):
        assert contrast(figures.GREY, ground) >= 4.5
        assert all(contrast(colour, ground) >= 3 for _, colour, _ in figures.LOOKS.values())
    dashes = [dashes for name, (_, _, dashes) in figures.LOOKS.items() if name not in ("sft", "fpo")]
    assert len(set(dashes)) == len(dashes)  # FPO is solid as DPO is, and wider; SFT is grey, and is no line
    figure = figures.draw([("title", "x", "y", {"dpo": ([0, 1], [[0, 1]]), "fpo": ([0, 1], [[1, 2]])})])
    (ax,) = figure.axes
    dpo, fpo = ax.lines
    assert fpo.get_linewidth() > dpo.get_linewidth()
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *figure.legends[0].get_texts()]
    assert {matplotlib.colors.to_hex(text.get_color()) for text in texts} == {figures.GREY}


def test_curves_of_tables_are_means_over_seeds_and_a_figure_is_the_same_each_time(tmp_path):
    methods, rows = ("dpo", "fpo"), []
    for seed, (w, l) in enumerate([(1.0, 5.0), (3.0, 11.0)]):
        curve = {"step": [0, 10], "kl_chosen": [0, w], "kl_rejected": [0, l], "kl_gap": [0, l / 10]}
        rows += [{"name": name, "seed": seed, "curve": curve, "floor": 0.0} for name in methods]
    drawn = []
    for _ in range(2):
        figure = figures.draw_distance(rows, "kl", "KL (nats)", methods)
        figures.save(figure, tmp_path / "kl.svg")
        drawn.append((tmp_path / "kl.svg").read_bytes())
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"<?xml")
    lines = [next(line for line in ax.lines if line.get_label() == "FPO") for ax in figure.axes]
    assert [line.get_ydata()[1] for line in lines] == pytest.approx([2.0, 8.0, 0.8])
    band = figure.axes[0].collections[0].get_paths()[0].vertices  # at step 10 ± √2, of 1 and 3
    assert set(band[band[:, 0] == 10, 1].round(6)) == {round(2 + 2**0.5, 6), round(2 - 2**0.5, 6)}
    D = json.loads(json.dumps(rows).replace("kl_", "mse_"))
    chosen, _, gap = figures.draw_distance([*D[1:], D[0] | {"floor": 0.25}], "mse", "D_FPO", methods).axes
    (line,) = (line for line in chosen.lines if line.get_label() == "rounding alone")
    assert line.get_ydata().tolist() == [0.25, 0.25] and len(gap.lines) == len(chosen.lines) - 1


def test_crosses_span_their_intervals():
    """A cross is its mean and both intervals, in its method's colour; the scale of x is logarithmic."""
    crosses = {"FPO, α = 9": ("fpo", (2.0, 1.0, 5.0), (60.0, 58.0, 61.0)), "b": ("dpo", (3, 3, 3), (1, 1, 1))}
    figure = figures.draw_crosses([("KL", "accuracy", crosses)] * 2)
    ax = figure.axes[0]
    across, along = (bars.get_segments()[0].tolist() for bars in ax.collections[:2])
    assert across == [[1, 60], [5, 60]] and along == [[2, 58], [2, 61]]
    (point, *_), *_ = ax.containers
    assert point.get_xydata().tolist() == [[2, 60]] and point.get_color() == figures.LOOKS["fpo"][1]
    assert ax.get_xscale() == "log" and [t.get_text() for t in figure.legends[0].get_texts()] == list(crosses)


# ---------------------------------------------------------------------------- any runs
def write_run(folder, steps, *, ended=True, **series):
    """A run's files: `series` are values of metrics.jsonl by step, `eval_accuracy` at every second one."""
    folder.mkdir(parents=True)
    lines = [{"step": i + 1} | {name: values[i] for name, values in series.items()} for i in range(steps)]
    for line in lines[1::2]:
        line["eval_accuracy"] = line["step"] / 10
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    if ended:
        scores = {"before": {"accuracy": 0.0}, "after": {"accuracy": steps / 10, "kl_rejected": 3.0}}
        (folder / "scores.json").write_text(json.dumps(scores))
    return str(folder)


def test_any_runs_are_drawn_side_by_side(tmp_path):
    dpo = write_run(tmp_path / "a/dpo", 4, loss=[4.0, 3.0, 2.0, 1.0], reward_margin=[0.0, 1.0, 2.0, 3.0])
    fpo = write_run(tmp_path / "b/fpo", 3, ended=False, loss=[0.6, 0.5, 0.4], constraint_share=[0.1] * 3)
    figure = figures.draw_curves([dpo, fpo])
    panels = {ax.get_title(): ax for ax in figure.axes}
    # No run logged D; the KL is not scored at every step of the ended run, so it is no curve.
    assert [*panels] == ["loss", "accuracy", "reward margin", "the constraint's share"]
    data = {title: {line.get_label(): line.get_data() for line in ax.lines} for title, ax in panels.items()}
    assert data["loss"]["a/dpo"][1] == pytest.approx([4.0, 3.0, 2.0, 1.0])
    assert data["loss"]["b/fpo"][0].tolist() == [1, 2, 3]
    # Held out: before, at each evaluation, after; of a run that has not ended, what it has scored.
    x, y = data["accuracy"]["a/dpo, held out"]
    assert (list(x), list(y)) == ([0, 2, 4], [0.0, 0.2, 0.4])
    assert list(data["accuracy"]["b/fpo, held out"][0]) == [2]
    assert [*data["reward margin"]] == ["a/dpo"] and [*data["the constraint's share"]] == ["b/fpo"]
    colours = {line.get_label().split(",")[0]: line.get_color() for ax in figure.axes for line in ax.lines}
    assert len(set(colours.values())) == 2
    assert figures.names_of([fpo]) == ["fpo"]


def test_long_runs_are_smoothed_by_hand():
    """Of 100 values: each with two neighbours on both sides; at an end with those that there are."""
    values = [0.0] * 50 + [1.0] * 50
    found = figures.smooth(values)
    assert found[47:53] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and len(found) == 100
    assert figures.smooth([3.0, 1.0, 5.0]) == [3.0, 1.0, 5.0]
    assert figures.smooth([1.0] + [0.0] * 99)[0] == 1 / 3


NO_RUNS = [(None, "no metrics.jsonl"), ("no\n", "no metrics.jsonl"), ("", "no line")]


@pytest.mark.parametrize("text, says", NO_RUNS)
def test_a_folder_that_is_no_run_is_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}.*{says}"):
        figures.draw_curves([tmp_path])
