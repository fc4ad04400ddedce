"""The pictures of the documentation, drawn again: from the results in `torch_bridge/measured`, or computed here.

    python -m examples.pictures

Without arguments all of them, else those that are named. No GPU is needed: what a GPU measured is read from a file.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import jaxkd
from examples.smollm2 import spread
from examples.smollm2.memory import loss_memory

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "torch_bridge" / "measured"
FOLDER = ROOT / "docs" / "pictures"
GIB = 2**30

# The colours of Okabe and Ito, told apart by colour-blind eyes; a contender has the same in every picture.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
CONTENDERS = {
    "jaxkd mosaic": ("jaxkd", BLUE, "o"),
    "JAX dense, exact logits": ("JAX, dense, float32 logits", RED, "s"),
    "JAX dense, rounded logits": ("JAX, dense, bfloat16 logits", ORANGE, "D"),
    "torch.compile": ("torch.compile, dense, bfloat16 logits", PURPLE, "v"),
    "TRL chunked": ("TRL, chunked", SKY, "^"),
    "Liger fused": ("Liger, fused", GREEN, "P"),
}
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 120,
}


def read(name: str) -> dict[str, Any]:
    return json.loads((MEASURED / name).read_text())


def captioned(width: float, height: float, caption: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.supxlabel(caption, fontsize=9, color="0.35")
    return figure


def training_step() -> Figure:
    """What a loss adds to a whole step of training, in memory and in time."""
    step = read("h100_s1_s4.json")["training_step"]
    tasks = list(dict.fromkeys(result["task"] for result in step["results"]))
    names = {"no loss": ("the step without a loss", "0.6", ""), **CONTENDERS, "jaxkd": CONTENDERS["jaxkd mosaic"]}
    figure = captioned(
        9,
        4.6,
        f"AdamW, Jensen-Shannon loss, {step['model']['layers']} layers, hidden size {step['model']['width']} (teacher "
        f"{step['model']['teacher_width']}), vocabulary {step['model']['vocabulary']:,}, bfloat16, on one "
        f"{step['device'].removeprefix('NVIDIA ')}",
    )
    memory, time = figure.subplots(1, 2)
    contenders = list(dict.fromkeys(result["contender"] for result in step["results"]))
    width = 0.8 / len(contenders)
    for result in step["results"]:
        label, color, _ = names[result["contender"]]
        x = tasks.index(result["task"]) + width * contenders.index(result["contender"])
        gib, fits = result["temporary"] / GIB, not result["failure"]
        first = label if result["task"] == tasks[0] else None
        outline = {"color": color} if fits else {"facecolor": "none", "edgecolor": color, "linestyle": "--"}
        memory.bar(x, gib, width * 0.9, label=first, **outline)
        memory.annotate(f"{gib:.1f}" if gib < 50 else f"{gib:.0f}", (x, gib), (0, 3), **ABOVE)
        if fits:
            time.bar(x, result["median"] * 1e3, width * 0.9, color=color)
            time.annotate(f"{result['median'] * 1e3:.1f}", (x, result["median"] * 1e3), (0, 3), **ABOVE)
        else:
            time.annotate("out of memory", (x, 0), (0, 5), rotation=90, color=color, **ABOVE)
    for axes in (memory, time):
        axes.margins(y=0.1)
        axes.set_xlim(-0.75 * width, 1 + width * (len(contenders) - 0.25))
        axes.set_xticks([i + width * (len(contenders) - 1) / 2 for i in range(len(tasks))], tasks)
        axes.grid(axis="x", visible=False)
    memory.set(title="temporary memory, as XLA plans it", ylabel="GiB (dashed: out of memory)")
    time.set(title="time", ylabel="milliseconds a step")
    figure.legend(*memory.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


ABOVE: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 10}


def memory_against_rows() -> Figure:
    """Temporaries of a loss with its gradients, as XLA plans them: compiled here, and not run."""
    rows = [4**i for i in range(4, 9)]
    figure = captioned(
        9,
        4.2,
        f"forward KL + cross-entropy with all gradients, bfloat16, planned by XLA for a CPU (jax {jax.__version__})",
    )
    for axes, (hidden, vocabulary) in zip(
        figure.subplots(1, 2, sharey=True), ((576, 49152), (4096, 128256)), strict=True
    ):
        head = jax.ShapeDtypeStruct((vocabulary, hidden), jnp.bfloat16)
        sizes = [
            loss_memory(
                n, head, head, dtype=jnp.bfloat16, divergence=jaxkd.forward_kl, temperature=1.0, chunk_size=None
            )
            for n in rows
        ]
        for name, (label, color, marker) in (
            ("dense", CONTENDERS["JAX dense, exact logits"]),
            ("fused", CONTENDERS["jaxkd mosaic"]),
        ):
            axes.loglog(rows, [size[name] / GIB for size in sizes], marker=marker, color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, [f"{n:,}" for n in rows])
        axes.set(title=f"hidden size {hidden}, vocabulary {vocabulary:,}", xlabel="rows (token positions)")
        axes.yaxis.set_major_formatter("{x:g}")
    figure.axes[0].set_ylabel("temporary memory, GiB")
    figure.axes[0].legend()
    return figure


def time_against_vocabulary() -> Figure:
    """Each contender's time as a multiple of the bare matrix products, at four shapes."""
    runs = [read(name) for name in ("h100_s1_s4.json", "h100_s2_s3.json")]
    shapes = [shape for run in runs for shape in run["shapes"].values()]
    shapes.sort(key=lambda shape: (shape["vocabulary"], -shape["hidden"]))
    figure = captioned(
        9,
        5,
        f"8192 rows, bfloat16, loss and gradients, on one {runs[0]['device'].removeprefix('NVIDIA ')}; "
        "1 is the time of the loss's bare matrix products",
    )
    for axes, (task, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("JSD", "Jensen-Shannon, two heads"), ("cross-entropy", "cross-entropy, one head")),
        strict=True,
    ):
        for i, (name, (label, color, marker)) in enumerate(CONTENDERS.items()):
            aside = 0.13 * (i - 2.5)
            found = [[r for r in s["results"] if (r["task"], r["contender"]) == (task, name)] for s in shapes]
            place = {j: result for j, (result,) in enumerate(found)}
            there = {j: r["of_products"] for j, r in place.items() if not r["failure"]}
            axes.plot([j + aside for j in there], list(there.values()), marker, color=color, markersize=9, label=label)
            failed = [j for j, r in place.items() if r["failure"]]
            axes.plot(
                [j + aside for j in failed], [16] * len(failed), marker, color=color, markersize=9, fillstyle="none"
            )
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(0.9, 20)
        axes.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"], minor=False)
        axes.minorticks_off()
        axes.set_xticks(range(len(shapes)), [f"{s['vocabulary']:,}\nD {s['hidden']}" for s in shapes], fontsize=10)
        axes.set_xlim(-0.5, len(shapes) - 0.5)
        axes.set(title=title, xlabel="vocabulary, and the student's hidden size D")
    figure.axes[0].set_ylabel("time, multiple of the products")
    figure.axes[0].annotate("hollow: out of memory", (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


# Gradient error against the gap ---------------------------------------------------------------------------------------

TEMPERATURE, GAP_SHAPE = 2.0, (64, 96, 1024)  # those of `python -m torch_bridge.parity`, so that its points compare


def gap_batch(gap: float) -> tuple[jax.Array, ...]:
    """bfloat16 states and head of student and teacher; every fourth row peaked, the teacher's head moved by the gap."""
    rows, hidden, vocabulary = GAP_SHAPE
    states, weight, move = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate(((rows, hidden), (vocabulary, hidden), (vocabulary, hidden)))
    )
    states *= jnp.where(jnp.arange(rows) % 4 == 0, 6.0, 1.0)[:, None]
    arrays = states, weight / hidden**0.5, states, (weight + gap * move) / hidden**0.5
    return tuple(x.astype(jnp.bfloat16) for x in arrays)


def dense_jsd(logits: Callable, states: jax.Array, weight: jax.Array, *teacher: jax.Array) -> jax.Array:
    """The mean over rows, as one writes it."""
    log_p, log_q = (jax.nn.log_softmax(logits(*head) / TEMPERATURE) for head in (teacher, (states, weight)))
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2).astype(log_p.dtype)
    return 0.5 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m), axis=-1))


def rounded_logits(states: jax.Array, weight: jax.Array) -> jax.Array:
    """What a product in bfloat16 gives, forward and backward, said so that XLA keeps no further digits."""
    logits = jnp.matmul(states, weight.T, preferred_element_type=jnp.float32)
    return jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=7)


def jaxkd_jsd(*arrays: jax.Array) -> jax.Array:
    return jaxkd.fused_linear_jsd(*arrays, temperature=TEMPERATURE)[0]


@partial(jax.jit, static_argnames="loss")
def gradients(loss: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return jax.grad(loss, argnums=(0, 1))(*arrays)


def gradient_error() -> Figure:
    """The worse of two gradients' relative errors, as the student comes near its teacher."""
    gaps = [float(x) for x in np.geomspace(1, 0.005, 13)]
    losses = {"JAX dense, rounded logits": partial(dense_jsd, rounded_logits), "jaxkd mosaic": jaxkd_jsd}
    true_loss = partial(dense_jsd, lambda states, weight: states @ weight.T)
    errors: dict[str, list[float]] = {name: [] for name in losses}
    for gap in gaps:
        arrays = gap_batch(gap)
        with jax.enable_x64(True):
            truth = [np.asarray(x) for x in gradients(true_loss, *(x.astype(jnp.float64) for x in arrays))]
        for name, loss in losses.items():
            found = [np.asarray(x, np.float64) for x in gradients(loss, *arrays)]
            worst = max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, truth, strict=True))
            errors[name].append(float(worst))

    figure = captioned(
        7.5,
        4.8,
        f"Jensen-Shannon loss, bfloat16, {GAP_SHAPE[0]} rows, D {GAP_SHAPE[1]}, vocabulary {GAP_SHAPE[2]}, temperature "
        f"{TEMPERATURE:g}; float64 is the truth.\nLines: computed on a CPU, where float32 logits are rounded. "
        "Points: of one H200, measured by\n"
        "python -m torch_bridge.parity",
    )
    axes = figure.subplots()
    for name, values in errors.items():
        label, color, _ = CONTENDERS[name]
        label = "logits rounded to bfloat16" if name != "jaxkd mosaic" else label
        axes.loglog(gaps, values, color=color, label=label)
    rows = [r for r in read("h200_parity.json")["rows"] if r["gap"] and r["divergence"] == "jensen_shannon(0.5)"]
    measured = {
        "jaxkd": ([max(r["errors"]["hidden"], r["errors"]["weight"]) for r in rows], BLUE, "o"),
        "dense PyTorch": ([r["peers"]["dense torch"] for r in rows], ORANGE, "D"),
        "Liger, chunked": ([r["peers"]["Liger chunked"] for r in rows], PURPLE, "X"),
        "Liger, fused": ([r["peers"]["Liger fused"] for r in rows], GREEN, "P"),
    }
    for name, (values, color, marker) in measured.items():
        axes.plot([r["gap"] for r in rows], values, marker, color=color, markersize=9, label=f"{name}, on a GPU")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="gap between the heads of teacher and student (0.01 is 1 %)",
        ylabel="relative error of the gradient (L2)",
        ylim=(1e-3, 5),
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=10)
    return figure


# ----------------------------------------------------------------------------------------------------------------------

DIVERGENCES: dict[str, Any] = {
    "forward_kl": jaxkd.forward_kl,
    "reverse_kl": jaxkd.reverse_kl,
    "jensen_shannon(0.5)": jaxkd.jensen_shannon(0.5),
    "symmetric_kl(0.5)": jaxkd.symmetric_kl(0.5),
    "skew_kl(0.1)": jaxkd.skew_kl(0.1),
    "total_variation": jaxkd.total_variation,
    "hellinger": jaxkd.hellinger,
    "alpha_divergence(0.5)": jaxkd.alpha_divergence(0.5),
    "alpha_beta(0.3, 0.6)": jaxkd.alpha_beta(0.3, 0.6),
    "renyi(0.5)": jaxkd.renyi(0.5),
    "overlap_nll": jaxkd.overlap_nll,
    "earth_mover": jaxkd.earth_mover,
}


def divergences() -> Figure:
    """Over a vocabulary of two tokens: a row's loss, and its slope in the logit of the first token."""
    teacher, student = 0.8, jnp.linspace(0.002, 0.998, 499)
    target = jnp.broadcast_to(jnp.log(jnp.array([teacher, 1 - teacher])), (len(student), 2))
    logits = jnp.log(jnp.stack([student, 1 - student], axis=-1))
    figure = captioned(
        10, 7.2, f"Two tokens, of which the teacher gives the first {teacher:g} (dotted); computed by jaxkd"
    )
    panels = figure.subplots(3, 4, sharex=True, sharey=True)
    for axes, (name, divergence) in zip(panels.flat, DIVERGENCES.items(), strict=True):

        def rows(logits: jax.Array, divergence: Any = divergence) -> jax.Array:
            return jaxkd.token_divergences(jaxkd.Logits(logits), jaxkd.Logits(target), divergence=divergence)

        values, pull_back = jax.vjp(rows, logits)
        (slopes,) = pull_back(jnp.ones_like(values))
        axes.axvline(teacher, color="black", linestyle=":", linewidth=1)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.plot(student, values, color=BLUE, label="a row's loss")
        axes.plot(student, slopes[:, 0], color=RED, linestyle="--", label="its slope in the first token's logit")
        axes.set_title(name)
    panels[0, 0].set(xlim=(0, 1), ylim=(-1, 1.6), xticks=(0, 0.5, 1))
    figure.supylabel("nats, or the divergence's own unit", fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("student's probability")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def scaling() -> Figure:
    """Time and memory of one device and of four, by layout."""
    run = read("h100_four_layouts.json")
    sizes, results = run["sizes"], run["results"]
    names = [f"{r['layout']}\n({r['devices']} GPU{'s' * (r['devices'] > 1)})" for r in results]
    figure = captioned(
        9,
        4,
        f"Jensen-Shannon loss with both gradients, {sizes['rows']} rows in all, hidden sizes {sizes['hidden']}, "
        f"vocabulary {sizes['vocabulary']:,}, {sizes['dtype']}\n{run['device'].replace('NVIDIA ', '')}",
    )
    for axes, (key, title) in zip(
        figure.subplots(1, 2), (("ms", "time, milliseconds"), ("all GiB", "memory of a device, GiB")), strict=True
    ):
        values = [r[key] for r in results]
        bars = axes.bar(names, values, 0.65, color=["0.6", ORANGE, BLUE, GREEN])
        times = [f" ({values[0] / x:.1f}x)" if key == "ms" and x != values[0] else "" for x in values]
        axes.bar_label(bars, [f"{x:.1f}{note}" for x, note in zip(values, times, strict=True)], padding=2)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.1)
        axes.set_title(title)
    return figure


def which_divergence() -> Figure:
    """Scores of SmolLM2's students."""
    return spread.picture(json.loads((ROOT / "examples" / "measured" / "which_divergence_h100.json").read_text()))


PICTURES: dict[str, Callable[[], Figure]] = {
    function.__name__: function
    for function in (
        training_step,
        memory_against_rows,
        time_against_vocabulary,
        gradient_error,
        divergences,
        scaling,
        which_divergence,
    )
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PICTURES)}; all, where none is named")
    parser.add_argument("--out", type=Path, default=FOLDER, help="their folder")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - PICTURES.keys():
        parser.error(f"no picture is named {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        with matplotlib.rc_context(STYLE):
            PICTURES[name]().savefig(options.out / f"{name}.png", pil_kwargs={"optimize": True})
        print(options.out / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
