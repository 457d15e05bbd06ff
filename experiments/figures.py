"""Figures as SVG, legible on white and on black: those of the tables' runs, and the curves of any runs.

A method has one colour and one pattern of dashes in all figures. A line is the mean over seeds, shaded by the
sample's deviation (n − 1). Nothing is computed here but means: figures show what train.py wrote.
"""

import json
import math
import os
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from runtime import UserError, writing

GREY = "#767676"  # text and axes: the contrast is 4.5 to 1 on white, and on black
# Of each method its name, a colour (at least 3 to 1 on white and on black) and dashes, in points on and off.
LOOKS = {
    "sft": ("SFT", GREY, ()),
    "dpo": ("DPO", "#4c7fd9", ()),
    "tdpo1": ("TDPO-1", "#1c8a99", (1, 1.2)),
    "tdpo2": ("TDPO-2", "#2f8f45", (6, 2)),
    "simpo": ("SimPO", "#c0701a", (3, 1.5)),
    "fpo": ("FPO", "#d6336c", ()),
    "simpo_kl": ("SimPO + KL", "#9a6cd0", (6, 2, 1, 2)),
    "free": ("FPO, α = 0", "#a9764a", (8, 2, 1, 2, 1, 2)),
}
STYLE = dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "axes.edgecolor", "legend.labelcolor"), GREY)
STYLE |= {"xtick.color": GREY, "ytick.color": GREY, "axes.titlesize": 11, "axes.labelsize": 11}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
# Of `curves`: a panel's title, the label of y, the key in metrics.jsonl, and that among held-out scores.
PANELS = (
    ("loss", "−log σ(u)", "loss", None),
    ("accuracy", "share of pairs", "accuracy", "accuracy"),
    ("reward margin", "reward(y_w) − reward(y_l)", "reward_margin", None),
    ("the constraint's share", "|δ| / (|δ| + |reward margin|)", "constraint_share", None),
    ("D_FPO, chosen", "D_FPO", None, "mse_chosen"),
    ("D_FPO, rejected", "D_FPO", None, "mse_rejected"),
    ("KL, chosen", "KL(ref‖policy) (nats)", None, "kl_chosen"),
    ("KL, rejected", "KL(ref‖policy) (nats)", None, "kl_rejected"),
)


# ---------------------------------------------------------------------------- the form of all figures
def new_figure(panels: int, columns: int):
    """A transparent figure, at most 900 pixels wide, and its `panels` axes. To be called within STYLE."""
    rows = math.ceil(panels / columns)
    # inches: 9.4 at 96 pixels each are 900
    figure = Figure(figsize=(min(9.4, 1 + 4 * columns), 0.6 + 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.patch.set_alpha(0)
    for ax in axes:
        ax.patch.set_alpha(0)
    for ax in axes[panels:]:  # in the last row
        ax.remove()
    return figure, axes[:panels]


def add_legend(figure, axes):
    """One legend below for all panels: what is in any of them, once."""
    handles = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    options = {"loc": "outside lower center", "ncols": min(len(handles), 7), "handlelength": 3.2}
    figure.legend(handles.values(), handles, **options)


def draw(panels, log_x=False):
    """A row of panels over one legend.

    panels: (title, label of x, label of y, {method, or any label: (x, y of each seed)}). Returns the figure.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels), len(panels))
        for ax, (title, xlabel, ylabel, lines) in zip(axes, panels, strict=True):
            ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
            for name, (x, seeds) in lines.items():
                label, colour, dashes = LOOKS.get(name, (name, GREY, (1, 3)))
                y = np.mean(seeds, 0)
                ax.plot(x, y, color=colour, label=label, dashes=dashes, lw=2.2 if name == "fpo" else 1.5)
                if len(seeds) > 1:
                    d = np.std(seeds, 0, ddof=1)
                    ax.fill_between(x, y - d, y + d, color=colour, alpha=0.15, linewidth=0)
        add_legend(figure, axes)
    return figure


def draw_crosses(panels):
    """Panels of crosses over one legend, x on a logarithmic scale. Returns the figure.

    panels: (label of x, label of y, {label: (a method of LOOKS, (x, low, high), (y, low, high))}).
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(panels), 2)
        for ax, (xlabel, ylabel, crosses) in zip(axes, panels, strict=True):
            ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
            for marker, (label, (method, *ends)) in zip(
                cycle("os^vDPX*<>dpH"), crosses.items(), strict=False
            ):
                x, y = (mean for mean, *_ in ends)
                xerr, yerr = ([[mean - low], [high - mean]] for mean, low, high in ends)
                look = {"color": LOOKS[method][1], "marker": marker, "ms": 6, "lw": 1, "ls": "none"}
                ax.errorbar(x, y, yerr=yerr, xerr=xerr, label=label, **look)
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2)
    return figure


def save(figure, path):
    """A figure as SVG: the same bytes for the same figure. Written aside and renamed."""
    aside = Path(f"{path}.tmp")
    # The salt of a figure's ids is its name, so they are the same at every drawing.
    with writing(aside), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": Path(path).stem}):
        aside.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(aside, format="svg", metadata={"Date": None})
    aside.replace(path)


# ---------------------------------------------------------------------------- of the tables' runs
def draw_distance(rows, key: str, what: str, methods):
    """Fig. 3 (key "kl") or Fig. 4 right ("mse"): D of chosen, of rejected, and the gap between them.

    Each is a mean over held-out pairs, then over seeds; the gap is |β D(y_l) − β D(y_w)|, β 0.1 for all
    methods. rows: of results.json, whose `curve` has a list for each key.
    """
    panels, curves = [], {name: [row["curve"] for row in rows if row["name"] == name] for name in methods}
    for side in ("chosen", "rejected", "gap"):
        lines = {}
        for name, seeds in curves.items():
            lines[name] = seeds[0]["step"], [curve[f"{key}_{side}"] for curve in seeds]
        floor = max(row.get("floor", 0) for row in rows)
        if key == "mse" and side != "gap" and floor > 0:
            lines["rounding alone"] = [0, max(seeds[0]["step"])], [[floor, floor]]
        panels.append((side, "training step", "|β D(y_l) − β D(y_w)|" if side == "gap" else what, lines))
    return draw(panels)


def draw_features(features: dict):
    """Fig. 2 left, and what it leaves open: which features move.

    features: {"largest": {method: mean pooled activations by rank, of the first seed}, "moved": {method: mean
    |c̄_θ − c̄_ref| of the features that DPO moves most, in DPO's order, mean over seeds}}.
    """
    largest, moved = (
        {name: (range(1, len(values) + 1), [values]) for name, values in features[what].items()}
        for what in ("largest", "moved")
    )
    left = ("largest activations", "feature, by its rank", "mean c̄", largest)
    right = ("moved by training", "feature, by its rank under DPO", "mean |c̄_θ − c̄_ref|", moved)
    return draw([left, right])


# ---------------------------------------------------------------------------- of any runs
def read_metrics(folder) -> tuple[list[dict], dict]:
    """A run's whole lines of metrics.jsonl, and its held-out scores over training: {key: one value a step}.

    The held-out scores are those of scores.json, where the run has ended, and the lines' `eval_…`; keys that
    are not scored at every one of these steps are left out. A line that is being written is not read.
    """
    path = Path(folder, "metrics.jsonl")
    try:
        text = path.read_text()
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        ends = Path(folder, "scores.json")
        ends = json.loads(ends.read_text()) if ends.exists() else None
        # {step: its scores}: before training, along the way, after it
        scored = {0: ends["before"]} if ends else {}
        for line in lines:
            found = {name[5:]: value for name, value in line.items() if name.startswith("eval_")}
            scored |= {line["step"]: found} if found else {}
        scored |= {lines[-1]["step"]: ends["after"]} if ends else {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}: no metrics.jsonl and scores.json of train.py: {error!r}") from None
    if not lines:
        raise UserError(f"{path}: it has no line yet")
    keys = [key for key in next(iter(scored.values()), {}) if all(key in point for point in scored.values())]
    curve = {key: [point[key] for point in scored.values()] for key in keys}
    return lines, {"step": list(scored), **curve}


def smooth(values):
    """The mean of each value and its neighbours: 1/25 of all, fewer at the ends. Training batches are few."""
    half = len(values) // 50
    return [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def names_of(folders) -> list[str]:
    """What tells runs apart: their paths below the folder that they share; of a run alone its own name."""
    places = [os.path.abspath(folder) for folder in folders]
    shared = os.path.commonpath(places) if len(places) > 1 else os.path.dirname(places[0])
    return [os.path.relpath(place, shared) for place in places]


def draw_curves(folders):
    """Any runs side by side: a panel for each of PANELS that one of them logged.

    Training batches are smoothed lines, held-out scores are dots, joined by a thin line.
    """
    runs = [read_metrics(folder) for folder in folders]
    there = [
        panel
        for panel in PANELS
        if any(panel[2] in line for lines, _ in runs for line in lines[:1])
        or any(panel[3] in curve for _, curve in runs)
    ]
    looks = list(LOOKS.values())[1:]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(there), min(3, len(there)))
        for ax, (title, ylabel, logged, held_out) in zip(axes, there, strict=True):
            ax.set(title=title, xlabel="training step", ylabel=ylabel)
            for i, (name, (lines, curve)) in enumerate(zip(names_of(folders), runs, strict=True)):
                _, colour, dashes = looks[i % len(looks)]
                shown = [line for line in lines if logged in line]
                if shown:
                    y = smooth([line[logged] for line in shown])
                    ax.plot([line["step"] for line in shown], y, color=colour, dashes=dashes, label=name)
                if held_out in curve:
                    style = {"color": colour, "dashes": dashes, "lw": 0.8 if logged else 1.5, "marker": "o"}
                    label = f"{name}, held out" if logged else name
                    ax.plot(curve["step"], curve[held_out], ms=4, label=label, **style)
        add_legend(figure, axes)
    return figure
