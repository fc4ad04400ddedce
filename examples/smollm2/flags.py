"""The command line: flags, their defaults, and what is wrong with bad ones."""

import argparse
import os
from pathlib import Path

import jaxkd

# Each divergence from the one parameter that it takes, or from None for its default.
DIVERGENCES = {
    "forward_kl": lambda _: jaxkd.forward_kl,
    "reverse_kl": lambda _: jaxkd.reverse_kl,
    "jensen_shannon": lambda beta: jaxkd.jensen_shannon(0.5 if beta is None else beta),
    "symmetric_kl": lambda weight: jaxkd.symmetric_kl(0.5 if weight is None else weight),
    "skew_kl": lambda alpha: jaxkd.skew_kl(0.1 if alpha is None else alpha),
    "total_variation": lambda _: jaxkd.total_variation,
    "hellinger": lambda _: jaxkd.hellinger,
    "alpha_divergence": lambda alpha: jaxkd.alpha_divergence(0.5 if alpha is None else alpha),
}
ARMS = ("cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "on_policy")
PARAMETER_FREE = ("forward_kl", "reverse_kl", "total_variation", "hellinger")


def number(kind, *, above=None, at_least=None, at_most=None):
    """An argparse type: a number of ``kind`` within bounds, or an error that names them."""
    bounds = [("above", above, lambda x: x > above), ("at least", at_least, lambda x: x >= at_least)]
    bounds = [bound for bound in [*bounds, ("at most", at_most, lambda x: x <= at_most)] if bound[1] is not None]
    wanted = f"{'a whole number' if kind is int else 'a number'} {' and '.join(f'{word} {x}' for word, x, _ in bounds)}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not all(holds(value) for _, _, holds in bounds) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


count, share = number(int, at_least=1), number(float, at_least=0, at_most=1)


def readable_file(text):
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def default_cache():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxkd"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def adder(parser):
    """``parser.add_argument``, with the default in the help."""

    def add(flag, *, help, default=None, **options):
        shown = help if default is None else f"{help} (default: %(default)s)"
        parser.add_argument(flag, default=default, help=shown, **options)

    return add


def add_common(parser, *, out, **defaults):
    """The flags that every command of SmolLM2 has; ``defaults`` are those in which the commands differ."""
    add = adder(parser)
    add("--teacher", metavar="NAME", help="a hub id or a folder; without it SmolLM2-135M-Instruct is fetched")
    add("--text", metavar="FILE", nargs="+", type=readable_file, help="train on these; default: Python's documentation")
    add("--out", metavar="FOLDER", type=Path, default=Path(out), help="log, curves and checkpoints")
    add(
        "--cache",
        metavar="FOLDER",
        type=Path,
        default=default_cache(),
        help="the fetched teacher and its hidden states",
    )
    parser.add_argument(
        "--live-teacher", action="store_true", help="the teacher reads in every step; its states are not kept on disk"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--temperature", metavar="T", type=number(float, above=0), default=1.0, help="divides the soft loss's logits")
    add("--soft-weight", metavar="W", type=number(float, at_least=0), default=4.0, help="weight of the soft loss")
    add("--hard-weight", metavar="W", type=number(float, at_least=0), default=1.0, help="weight of the cross-entropy")
    add("--steps", metavar="N", type=count, default=80, help="steps of each arm")
    add("--batch-size", metavar="B", type=count, default=2, help="windows a step")
    add("--seq-len", metavar="T", type=number(int, at_least=2), default=128, help="tokens a window")
    add("--train-windows", metavar="N", type=count, default=256, help="at most so many, seen again each epoch")
    add("--held-out-windows", metavar="N", type=count, default=24, help="never trained on; all scores are on these")
    add("--learning-rate", metavar="R", type=number(float, above=0), default=1e-3, help="its peak")
    add("--seed", type=number(int, at_least=0), default=0, help="of the data order")
    add(
        "--chunk-size",
        metavar="C",
        type=count,
        help="rows of logits at a time; default: 64 on a CPU, jaxkd's choice on a GPU",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="both models' products; default: bfloat16 on a GPU")
    add("--device", choices=("cpu", "gpu"), help="default: the GPU where both frameworks have one")
    add("--checkpoint-every", metavar="N", type=count, default=20, help="steps between checkpoints")
    add("--eval-every", metavar="N", type=count, default=40, help="steps between points of the curves")
    parser.set_defaults(**defaults)
    return add


def add_student(add, *, layers=15, divergence="jensen_shannon"):
    """The flags of a command with one student and one divergence."""
    add("--student-layers", metavar="N", type=count, default=layers, help="evenly spaced layers of the teacher to keep")
    add("--divergence", choices=DIVERGENCES, default=divergence, help="the soft loss")
    add("--beta", type=share, help="the parameter of jensen_shannon, symmetric_kl, skew_kl or alpha_divergence")


def add_sampling(add):
    """The flags of a command whose student samples."""
    add("--on-policy", metavar="S", type=share, default=0.5, help="share of batches that the student samples")
    add("--warm-up", metavar="N", type=number(int, at_least=0), help="steps before it samples; default: half of them")
    add("--prompt-len", metavar="P", type=count, default=32, help="tokens of a window that the student goes on from")
    add("--sample-temperature", metavar="T", type=number(float, above=0), default=1.0, help="of the student's sampling")


def checked(parser, argv):
    settings = parser.parse_args(argv)
    if settings.soft_weight == settings.hard_weight == 0:
        parser.error("arguments --soft-weight, --hard-weight: both are 0, so there is nothing to train on")
    return settings


def check_student(parser, settings):
    """What `add_student` asks for."""
    if settings.beta is not None and settings.divergence in PARAMETER_FREE:
        parser.error(f"argument --beta: {settings.divergence} has no parameter")


def parse(argv=None):
    """The checked settings; a bad value ends the program with one line on stderr and status 2."""
    parser = Parser(
        prog="python -m examples.distill_smollm2",
        description="Distil SmolLM2-135M-Instruct into a Flax student with fewer layers, beside cross-entropy alone.",
    )
    add_student(add_common(parser, out="runs/smollm2"))
    settings = checked(parser, argv)
    check_student(parser, settings)
    return settings


def parse_on_policy(argv=None):
    """The same for the command that samples."""
    parser = Parser(
        prog="python -m examples.on_policy",
        description="Distil SmolLM2-135M-Instruct on text that the student samples, beside distillation on given text.",
    )
    add = add_common(
        parser,
        out="runs/on_policy",
        soft_weight=1.0,
        hard_weight=0.0,
        steps=32,
        seq_len=96,
        held_out_windows=8,
        eval_every=16,
    )
    add_student(add, layers=8, divergence="reverse_kl")
    add_sampling(add)
    add(
        "--loss",
        choices=("whole", "sampled"),
        default="whole",
        help="whole: --divergence; sampled: reverse KL estimated",
    )
    settings = checked_sampling(parser, argv)
    check_student(parser, settings)
    if settings.loss == "sampled" and settings.divergence != "reverse_kl":
        parser.error(
            f"argument --loss: sampled is an estimate of reverse_kl, and --divergence is {settings.divergence}"
        )
    if settings.loss == "sampled" and settings.temperature != settings.sample_temperature:
        parser.error("argument --loss: sampled wants --temperature and --sample-temperature to be the same")
    return settings


def checked_sampling(parser, argv):
    settings = checked(parser, argv)
    if settings.prompt_len > settings.seq_len:
        parser.error(f"argument --prompt-len: {settings.prompt_len} is longer than --seq-len {settings.seq_len}")
    if settings.soft_weight == 0:
        parser.error("argument --soft-weight: at 0 there is nothing to learn from samples")
    if settings.warm_up is None:
        settings.warm_up = settings.steps // 2
    return settings


def parse_which_divergence(argv=None):
    """The same for the command that compares divergences."""
    parser = Parser(
        prog="python -m examples.which_divergence",
        description="Distil SmolLM2-135M-Instruct with one divergence after the other, some seeds of each.",
    )
    add = add_common(
        parser,
        out="runs/which_divergence",
        soft_weight=1.0,
        hard_weight=0.0,
        steps=400,
        batch_size=32,
        seq_len=256,
        train_windows=12800,
        held_out_windows=128,
        checkpoint_every=400,
        eval_every=100,
    )
    add(
        "--student-layers",
        metavar="N",
        type=count,
        nargs="+",
        default=[15, 10],
        help="evenly spaced layers of the teacher to keep, of one student after the other",
    )
    add("--arms", metavar="ARM", nargs="+", choices=ARMS, default=list(ARMS), help=f"which of {', '.join(ARMS)}")
    add("--seeds", metavar="N", type=count, default=3, help="runs of each, from --seed on: another order of the data")
    add_sampling(add)
    parser.set_defaults(prompt_len=64)
    return checked_sampling(parser, argv)


def divergence_of(settings):
    return DIVERGENCES[settings.divergence](settings.beta)


def chunk_size_of(settings, device):
    return settings.chunk_size or (64 if device == "cpu" else None)


def lasting(settings):
    """What a run must keep to be resumed: all but where things lie, how often they are saved and what feeds them.

    The teacher and the text count by their contents, which have a fingerprint of their own.
    """
    passing = ("out", "cache", "live_teacher", "resume", "checkpoint_every", "device", "text", "teacher")
    return {key: value for key, value in vars(settings).items() if key not in passing}
