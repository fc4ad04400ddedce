"""The scores of many students beside each other: a file, tables of mean and spread, a picture."""

import json
import statistics

from matplotlib.figure import Figure
from rich.table import Table

from examples.smollm2.report import SCORES, shown

UNTRAINED = "untrained"  # the arm of the students before training


def save(path, results):
    """``results``: settings, the scores of the teacher, and those of each student with its layers, arm and seed."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def grouped(results, layers):
    """By arm the scores of a depth, {score: [a number a seed]}, in the order in which they were trained."""
    students = [x for x in results["students"] if x["layers"] == layers]
    return {
        arm: {key: [x[key] for x in students if x["arm"] == arm] for key in SCORES}
        for arm in dict.fromkeys(x["arm"] for x in students)
    }


def depths(results):
    return list(dict.fromkeys(x["layers"] for x in results["students"]))


def tables(results):
    """A rich table a depth."""
    for layers in depths(results):
        table = Table(
            title=f"{layers} layers, on held-out text: mean of the seeds ± their standard deviation",
            caption="; ".join(score.meaning for score in SCORES.values()),
            caption_justify="left",
        )
        table.add_column("arm")
        table.add_column("seeds", justify="right")
        for score in SCORES.values():
            table.add_column(score.header, justify="right")
        table.add_row("teacher", "-", *(shown(results["teacher"], key) for key in SCORES))
        for arm, scores in grouped(results, layers).items():
            table.add_row(arm, str(len(scores["jsd"])), *(mean_and_spread(key, scores[key]) for key in SCORES))
        yield table


def mean_and_spread(key, values):
    mean = SCORES[key].form.format(statistics.mean(values))
    return f"{mean} ± {SCORES[key].form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def picture(results):
    """A panel a score and a row a depth: a dot for each seed of each arm, but for what was not trained."""
    keys = list(SCORES)
    rows = depths(results)
    figure = Figure(figsize=(3.2 * len(keys) + 1, 2.6 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(keys), sharey=True, squeeze=False)
    for line, layers in zip(panels, rows, strict=True):
        groups = {arm: scores for arm, scores in grouped(results, layers).items() if arm != UNTRAINED}
        for axes, key in zip(line, keys, strict=True):
            for height, scores in enumerate(groups.values()):
                axes.plot(scores[key], [height] * len(scores[key]), "o", alpha=0.6)
            axes.set_yticks(range(len(groups)), [arm.replace("_", " ") for arm in groups])
            axes.set_xlabel(SCORES[key].header)
            axes.grid(alpha=0.3)
        line[0].set_title(f"{layers} layers", loc="left")
        if "next_token_loss" in results["teacher"]:
            line[0].axvline(results["teacher"]["next_token_loss"], color="grey", linestyle="--")
    panels[0, 0].invert_yaxis()  # of all: they share it
    return figure
