"""A teacher's last hidden states on disk: written once, resumable, and fed to a JAX loop by a thread that reads ahead.

A cache is a folder. Each array is a file of its bare bytes; ``header.json`` says their types and shapes, and what they
were made from. The hidden states are appended to, so the length of their file says how far the writer came.
``sha256.json`` comes last and seals the cache.
"""

import contextlib
import hashlib
import json
import math
import os
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from filelock import FileLock

import jaxkd
from torch_bridge.teachers.fingerprints import check_tokenizer, model_fingerprint, text_hashes, tokenizer_fingerprint
from torch_bridge.teachers.live_teacher import LiveTeacher

FORMAT = 1
DTYPES = ("bfloat16", "float32", "float16")
HEADER, SEAL = "header.json", "sha256.json"


class CacheError(ValueError):
    """The cache is incomplete, damaged or of something else; the message says what differs and what to do."""


class TeacherBatch(NamedTuple):
    """What a training step needs of a teacher. Every batch of a cache has one T, so a step is compiled once."""

    tokens: jax.Array  # (B, T) int32, padded with 0
    labels: jax.Array  # (B, T) int32: the next tokens, padded with -100
    teacher: jaxkd.LinearLogits  # hidden (B, T, D), padded with 0


def cache_teacher(
    model: Any,
    texts: Sequence[Any],
    out: str | os.PathLike,
    *,
    tokenizer: Any,
    dtype: str = "bfloat16",
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> "TeacherCache":
    """Writes the last hidden states of a PyTorch teacher over some texts into a folder, for distillation without it.

        cache = cache_teacher(model, texts, "teacher-cache", tokenizer=tokenizer)

    A token position takes D numbers where its logits would take V: with D=576, V=49152 (SmolLM2), 1152 bytes in
    bfloat16 instead of 196608 in float32, 171 times less. The head is written once, in the model's own type, so the
    logits lose only what `dtype` loses: nothing for a model that runs in it.

    Killed at any moment and called again, it goes on after the last whole batch, to the same bytes. Called where all is
    done, it opens the cache. Two writers of one cache wait for each other.

    Args:
      model: a causal language model as in `LiveTeacher`.
      texts: strings, or sequences of token ids such as the rows of an (N, T) array. At each position but the last of a
        text the teacher predicts the next token.
      out: the folder, made if need be.
      tokenizer: a `transformers` tokenizer, called on strings; its fingerprint is kept. None for token ids without one.
      dtype: "bfloat16", "float32" or "float16": how hidden states are kept.
      batch_size: texts that the teacher reads at a time, padded to the longest of them.
      max_length: tokens of a text that are read; the rest is cut off.
      progress: called with the numbers of the batches still to do, to iterate over: ``tqdm``, for one.

    Returns:
      The open cache.

    Raises:
      TypeError, ValueError: bad arguments, named, before any work; those of `LiveTeacher`.
      CacheError: the folder holds a cache of another model, tokenizer, texts or settings; it says which.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}; give one of {', '.join(DTYPES)}")
    for name, size, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if (size is not None or name == "batch_size") and (
            isinstance(size, bool) or not isinstance(size, int) or size < least
        ):
            raise ValueError(f"`{name}` is {size!r}; give an integer of at least {least}")
    hashes = _check_texts(texts)
    if tokenizer is None and isinstance(texts[0], str):
        raise TypeError("`tokenizer` is None, but `texts` are strings; give the teacher's")
    if tokenizer is not None:
        check_tokenizer("tokenizer", tokenizer)
    teacher = LiveTeacher(model)
    sequences = _tokenize(texts, tokenizer, max_length, model)

    lengths = np.array([len(tokens) - 1 for tokens in sequences], np.int64)
    head = {name: teacher.head[name] for name in ("weight", "bias") if teacher.head[name] is not None}
    arrays = {
        "tokens": np.concatenate(sequences),
        "lengths": lengths,
        "text_hashes": hashes,
        **{name: np.asarray(array) for name, array in head.items()},
    }
    specs = {name: [array.dtype.name, list(array.shape)] for name, array in arrays.items()}
    header = {
        "format": FORMAT,
        "model": model_fingerprint(model),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "texts": hashlib.sha256(hashes.tobytes()).hexdigest(),
        "dtype": dtype,
        "batch_size": batch_size,
        "max_length": max_length,
        "scale": teacher.head["scale"],
        "softcap": teacher.head["softcap"],
        "arrays": {**specs, "hidden": [dtype, [int(lengths.sum()), teacher.head["weight"].shape[1]]]},
    }

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if (folder / HEADER).exists():
            _refuse_other(folder, _read_json(folder / HEADER), header, hashes)
        else:
            for name, array in arrays.items():
                array.tofile(folder / name)
            (folder / "hidden").write_bytes(b"")
            _write_json(folder / HEADER, header)
        if not (folder / SEAL).exists():
            _append_hidden_states(folder / "hidden", teacher, sequences, header, progress)
            _write_json(folder / SEAL, {name: _sha256(folder / name) for name in header["arrays"]})
    return open_teacher_cache(folder, tokenizer)


def open_teacher_cache(
    folder: str | os.PathLike, tokenizer: Any = None, *, model: Any = None, texts: Any = None, verify: bool = False
) -> "TeacherCache":
    """Opens what `cache_teacher` wrote.

        cache = open_teacher_cache("teacher-cache", tokenizer)
        order = np.random.default_rng(0).permutation(len(cache))
        for batch in cache.batches(np.split(order[: steps * 8], steps)):
            state, metrics = train_step(state, batch)  # batch.tokens, batch.labels, batch.teacher

    Args:
      folder: the cache.
      tokenizer: the student's; model: the teacher; texts: what was read. Each that is given must be the cache's own.
      verify: also compare the SHA-256 of the hidden states, which reads them all. That of the other files, and the
        length of each, are always compared.

    Raises:
      CacheError: the cache is unfinished, damaged or of another tokenizer, model or texts; it says which.
    """
    folder = Path(folder)
    if not (folder / HEADER).exists():
        raise CacheError(f"there is no teacher cache in {folder}: write one with cache_teacher")
    header = _read_json(folder / HEADER)
    given: dict[str, Any] = {"format": FORMAT}
    hashes = None
    if tokenizer is not None:
        check_tokenizer("tokenizer", tokenizer)
        given["tokenizer"] = tokenizer_fingerprint(tokenizer)
    if model is not None:
        given["model"] = model_fingerprint(model)
    if texts is not None:
        hashes = _check_texts(texts)
        given["texts"] = hashlib.sha256(hashes.tobytes()).hexdigest()
    _refuse_other(folder, header, given, hashes)

    for name, (dtype, shape) in header["arrays"].items():
        expected = math.prod(shape) * jnp.dtype(dtype).itemsize
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found < expected and not (folder / SEAL).exists():
            raise CacheError(
                f"{folder} is unfinished: `{name}` has {found} of {expected} bytes. Call cache_teacher again to go on"
            )
        if found != expected:
            raise CacheError(
                f"{folder} is damaged: `{name}` has {found} bytes, but its header says {expected}, for {dtype} of shape"
                f" {tuple(shape)}. Copy the folder again, or delete it and call cache_teacher"
            )
    if not (folder / SEAL).exists():
        raise CacheError(f"{folder} is unfinished: its seal {SEAL} is missing. Call cache_teacher again to go on")
    for name, expected in _read_json(folder / SEAL).items():
        if (name != "hidden" or verify) and (found := _sha256(folder / name)) != expected:
            raise CacheError(
                f"{folder} is damaged: `{name}` has SHA-256 {found}, not {expected} as when it was written. Copy"
                " the folder again, or delete it and call cache_teacher"
            )
    return TeacherCache(folder, header)


class TeacherCache:
    """An open cache: ``len(cache)`` texts, read with `batch` and `batches`. Hidden states stay on disk until then."""

    def __init__(self, folder: Path, header: dict[str, Any]):
        self.folder, self.header = folder, header
        lengths = np.asarray(self._map("lengths"))
        self._starts = np.concatenate([[0], np.cumsum(lengths)])  # of each text's hidden states
        self._tokens = self._map("tokens")
        # As whole numbers: NumPy copies those without holding the interpreter's lock, bfloat16 it does not.
        hidden = self._map("hidden")
        self._hidden, self._dtype = hidden.view(f"u{hidden.dtype.itemsize}"), hidden.dtype
        self.length = int(lengths.max())  # T of the batches
        # What LinearLogits takes beside hidden states, on JAX's default device.
        self.head: dict[str, Any] = {name: header[name] for name in ("scale", "softcap")}
        self.head |= {name: jnp.array(self._map(name)) for name in ("weight", "bias") if name in header["arrays"]}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def batch(self, indices: Any) -> TeacherBatch:
        """The texts numbered ``indices`` (B,), as arrays on JAX's default device."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
            raise TypeError(f"`indices` is {indices.dtype.name} of shape {indices.shape}; give integers of shape (B,)")
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"`indices` has {indices.min()} to {indices.max()}, but the cache has {len(self)} texts")
        shape = (len(indices), self.length)
        tokens, labels = np.zeros(shape, np.int32), np.full(shape, -100, np.int32)
        hidden = np.zeros((*shape, self._hidden.shape[1]), self._hidden.dtype)
        for row, text in enumerate(indices):
            start, stop = self._starts[text : text + 2]
            length = stop - start
            text_tokens = self._tokens[start + text : stop + text + 1]  # a text has a token more than hidden states
            tokens[row, :length], labels[row, :length] = text_tokens[:-1], text_tokens[1:]
            hidden[row, :length] = self._hidden[start:stop]
        teacher = jaxkd.LinearLogits(jnp.asarray(hidden.view(self._dtype)), **self.head)
        return TeacherBatch(jnp.asarray(tokens), jnp.asarray(labels), teacher)

    def batches(self, indices: Iterable[Any], *, prefetch: int = 2) -> Iterator[TeacherBatch]:
        """`batch` of each item of ``indices``, while a thread prepares the next ``prefetch`` of them."""
        if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0:
            raise ValueError(f"`prefetch` is {prefetch!r}; give an integer of at least 0")
        return self._batches(indices, prefetch)

    def _batches(self, indices: Iterable[Any], prefetch: int) -> Iterator[TeacherBatch]:
        config: Any = jax.config
        device = config.jax_default_device  # a setting of this thread alone

        def read(item: Any) -> TeacherBatch:
            with jax.default_device(device):
                return self.batch(item)

        with ThreadPoolExecutor(1) as thread:
            pending: deque = deque()
            for item in indices:
                pending.append(thread.submit(read, item))
                if len(pending) > prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _map(self, name: str) -> np.ndarray:
        dtype, shape = self.header["arrays"][name]
        return np.memmap(self.folder / name, jnp.dtype(dtype), "r", shape=tuple(shape))


def _check_texts(texts: Any) -> np.ndarray:
    """The hash of each text, after a look at their types."""
    if isinstance(texts, str | bytes) or not hasattr(texts, "__len__") or not len(texts):
        raise TypeError(f"`texts` is {_short(texts)}; give strings or sequences of token ids, at least one")
    strings = isinstance(texts[0], str)
    for i, text in enumerate(texts):
        is_tokens = np.ndim(text) == 1 and np.issubdtype(np.asarray(text).dtype, np.integer)
        if not (isinstance(text, str) if strings else is_tokens):
            raise TypeError(f"`texts[{i}]` is {_short(text)}; give all strings or all sequences of token ids")
    return text_hashes(texts)


def _tokenize(texts: Sequence[Any], tokenizer: Any, max_length: int | None, model: Any) -> list[np.ndarray]:
    if isinstance(texts[0], str):
        texts = tokenizer(list(texts), verbose=False)["input_ids"]
    sequences = [np.asarray(tokens, np.int32)[:max_length] for tokens in texts]
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    for i, tokens in enumerate(sequences):
        if len(tokens) < 2:
            raise ValueError(f"`texts[{i}]` has {len(tokens)} tokens; a text needs 2, one to read and one to predict")
        if len(tokens) - 1 > limit:
            raise ValueError(
                f"`texts[{i}]` has {len(tokens)} tokens, but the model reads {limit}: give max_length={limit + 1}"
            )
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise ValueError(f"`texts[{i}]` has token {wrong}, but the model knows 0 to {vocabulary - 1}")
    return sequences


def _append_hidden_states(
    path: Path, teacher: LiveTeacher, sequences: list[np.ndarray], header: dict[str, Any], progress: Callable
) -> None:
    """The hidden states of all batches that the file does not hold whole."""
    size, dtype = header["batch_size"], getattr(torch, header["dtype"])
    row_bytes = header["arrays"]["hidden"][1][1] * dtype.itemsize
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    ends = np.cumsum([0, *(sum(len(tokens) - 1 for tokens in batch) * row_bytes for batch in batches)])
    with path.open("ab") as file:
        done = int(np.searchsorted(ends, file.tell(), side="right")) - 1
        file.truncate(int(ends[done]))  # a kill may have cut a batch short
        for number in progress(range(done, len(batches))):
            file.write(_hidden_states(teacher, batches[number], dtype))
            file.flush()


def _hidden_states(teacher: LiveTeacher, batch: list[np.ndarray], dtype: torch.dtype) -> bytes:
    lengths = np.array([len(tokens) - 1 for tokens in batch])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([tokens[:-1] for tokens in batch])
    padding = {} if mask.all() else {"attention_mask": mask.astype(np.int64)}
    hidden = teacher.hidden_states(tokens, **padding)
    rows = hidden[torch.from_numpy(mask).to(hidden.device)].to(dtype).cpu()
    return rows.view(torch.uint8).numpy().tobytes()


def _refuse_other(folder: Path, header: dict[str, Any], given: dict[str, Any], hashes: np.ndarray | None) -> None:
    """A `CacheError` that names each entry of the header that is not as given."""
    differences: list[str] = []
    for key, value in given.items():
        found = header.get(key)
        if found == value or (key == "arrays" and differences):  # other texts or another model say it more plainly
            continue
        difference = _in_words(key, found, value)
        if key == "texts" and hashes is not None:
            with contextlib.suppress(OSError, ValueError):
                difference = _text_difference(np.fromfile(folder / "text_hashes", np.uint8).reshape(-1, 32), hashes)
        differences.append(difference)
    if differences:
        raise CacheError(
            f"{folder} holds another teacher's cache: {'; '.join(differences)}. Give what it was made from, or another"
            " folder"
        )


def _in_words(key: str, found: Any, given: Any) -> str:
    """How an entry of the header differs; fingerprints mean nothing to a reader."""
    if key == "model":
        return "its model has other weights or another configuration than the one given"
    if key == "tokenizer" and found is None:
        return "it was made of token ids without a tokenizer, and one is given"
    if key == "tokenizer" and given is None:
        return "it was made with a tokenizer, and none is given"
    if key == "tokenizer":
        return "its tokenizer has another vocabulary, merges, normalization or special tokens than the one given"
    if key == "texts":
        return "its texts are not those given"
    return f"{key} was {_short(found)}, now {_short(given)}"


def _text_difference(began: np.ndarray, now: np.ndarray) -> str:
    if len(began) != len(now):
        return f"texts were {len(began)}, now {len(now)}"
    different = np.flatnonzero((began != now).any(axis=1))
    return f"{len(different)} of {len(now)} texts differ, texts[{different[0]}] the first"


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 80)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}): delete the folder and call cache_teacher") from error


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)
