"""What the run shows: a live progress bar, the final table, the curves."""

import time
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table


class Score(NamedTuple):
    """How a number of the log is shown."""

    header: str
    form: str
    meaning: str


SCORES = {
    "next_token_loss": Score("next-token loss", "{:.3f}", "next-token loss in nats"),
    "jsd": Score("JSD", "{:.4f}", "JSD to the teacher at beta 0.5, temperature 1"),
    "agreement": Score(
        "agreement",
        "{:.1%}",
        "agreement: share of tokens where student and teacher have the same likeliest next token",
    ),
    "sampled_kl": Score(
        "KL on its samples",
        "{:.3f}",
        "KL on its samples: KL(student || teacher) a token, in nats, where the student goes on by itself",
    ),
}


def progress_bar(console):
    """A bar for each arm: steps, a note (loss and speed), time left."""
    arm, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    return Progress(arm, BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn(), console=console)


def busy(console, what):
    """A spinner while something takes its time, or a line where no terminal shows one."""
    if not console.is_terminal:
        console.print(what)
    return console.status(what)


class LinesNowAndThen:
    """What a bar shows, as a line every ``seconds`` where the output is a file or a pipe, in which no bar is drawn."""

    def __init__(self, console, seconds=20):
        self.console, self.seconds, self.last = console, seconds, time.monotonic()

    def say(self, line, at_once=False):
        if not self.console.is_terminal and (at_once or time.monotonic() - self.last >= self.seconds):
            self.console.print(line)
            self.last = time.monotonic()


def tracked(items, description, console):
    """``items``, a bar beside them, or a line now and then."""
    items = list(items)
    lines = LinesNowAndThen(console)
    for index, item in enumerate(track(items, description=description, console=console, transient=True)):
        yield item
        lines.say(f"{description}: {index + 1} of {len(items)} batches")


def shown(scores, key):
    """A score as it is printed, and a dash for one that the model does not have."""
    return SCORES[key].form.format(scores[key]) if key in scores else "-"


def one_line(scores):
    return ", ".join(f"{score.header} {shown(scores, key)}" for key, score in SCORES.items() if key in scores)


def score_table(rows):
    """A rich table of held-out scores; ``rows`` maps a model's name to them."""
    keys = [key for key in SCORES if any(key in scores for scores in rows.values())]
    caption = "; ".join(SCORES[key].meaning for key in keys)
    table = Table(title="On held-out text", caption=caption, caption_justify="left")
    table.add_column("model")
    for key in keys:
        table.add_column(SCORES[key].header, justify="right")
    for name, scores in rows.items():
        table.add_row(name, *(shown(scores, key) for key in keys))
    return table


def memory_table(records):
    """A rich table of the loss's temporary memory at some numbers of tokens."""
    table = Table(title="Loss and gradients as compiled: temporary memory, MiB")
    for header in ("tokens x vocabulary", "jaxkd", "dense formula"):
        table.add_column(header, justify="right")
    for record in records:
        sizes = (f"{record[name] / 2**20:.1f}" for name in ("fused", "dense"))
        table.add_row(f"{record['num_rows']} x {record['vocabulary']}", *sizes)
    return table


def save_curves(path, log, arms, *, start, teacher):
    """A PNG with a panel a score: the curve of each arm over its steps.

    What all start with, ``start``, is far from what they reach: it stands below the title and takes no room of theirs.
    """
    keys = [key for key in SCORES if key in log.held_out(start)[-1]]
    figure = Figure(figsize=(1 + 4 * len(keys), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        for arm in arms:
            points = [(record["step"], record[key]) for record in log.held_out(arm)]
            axes.plot(*zip(*points, strict=True), "o-", label=arm)
        before = shown(log.held_out(start)[-1], key)
        axes.set(title=f"{SCORES[key].header}\n{start}: {before}", xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].axhline(log.held_out(teacher)[-1]["next_token_loss"], color="grey", linestyle="--", label=teacher)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
