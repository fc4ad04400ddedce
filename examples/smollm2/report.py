"""What the run shows: a live progress bar, the final table, the curves."""

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SCORES = {
    "next_token_loss": ("next-token loss", "{:.3f}"),
    "jsd": ("JSD", "{:.4f}"),
    "agreement": ("agreement", "{:.1%}"),
}
CAPTION = (
    "next-token loss in nats; JSD to the teacher at beta 0.5, temperature 1; agreement: share of tokens where "
    "student and teacher have the same likeliest next token"
)


def progress_bar(console):
    """A bar for each arm: steps, a note (loss and speed), time left."""
    arm, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    return Progress(arm, BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn(), console=console)


def one_line(scores):
    return ", ".join(f"{header} {form.format(scores[key])}" for key, (header, form) in SCORES.items())


def score_table(rows):
    """A rich table of held-out scores; ``rows`` maps a model's name to them."""
    table = Table(title="On held-out text", caption=CAPTION, caption_justify="left")
    table.add_column("model")
    for header, _ in SCORES.values():
        table.add_column(header, justify="right")
    for name, scores in rows.items():
        table.add_row(name, *(form.format(scores[key]) for key, (_, form) in SCORES.items()))
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
    """A PNG with a panel a score: the curve of each arm over its steps, from the scores that both start with."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (key, (header, _)) in zip(figure.subplots(1, len(SCORES)), SCORES.items(), strict=True):
        for arm in arms:
            points = [(record["step"], record[key]) for record in [*log.held_out(start), *log.held_out(arm)]]
            axes.plot(*zip(*points, strict=True), "o-", label=arm)
        axes.set(title=header, xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].axhline(log.held_out(teacher)[-1]["next_token_loss"], color="grey", linestyle="--", label=teacher)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
