"""What a model computes, how a tokenizer cuts text and what a text says, each told by a SHA-256."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# What a configuration says about files, versions and outputs. The type of the weights shows in their bytes.
_PASSING = {"_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states", "return_dict"}
_PASSING |= {"torch_dtype", "transformers_version", "use_cache"}


def model_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the configuration and of the weights by their names: the same whatever file they were loaded from."""
    config: Any = model.config
    settings = {key: value for key, value in config.to_dict().items() if key not in _PASSING}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_tokenizer(argument: str, tokenizer: Any) -> None:
    """A `TypeError` that names the argument where it is no tokenizer but, say, the name of one."""
    if not hasattr(tokenizer, "get_vocab"):
        found = f"{tokenizer!r}, a string" if isinstance(tokenizer, str) else f"a {type(tokenizer).__name__}"
        name = repr(tokenizer) if isinstance(tokenizer, str) else "its name or folder"
        raise TypeError(
            f"`{argument}` is {found}; give a tokenizer: transformers.AutoTokenizer.from_pretrained({name})"
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a `transformers` tokenizer's rules: vocabulary, merges, normalisation, special tokens.

    Padding and truncation do not count: a call sets them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode()).hexdigest()


def text_hashes(texts: Sequence[Any]) -> np.ndarray:
    """(N, 32) bytes: SHA-256 of each text in UTF-8, or of its int32 tokens."""
    parts = (text.encode() if isinstance(text, str) else np.asarray(text, np.int32).tobytes() for text in texts)
    hashes = b"".join(hashlib.sha256(part).digest() for part in parts)
    return np.frombuffer(hashes, np.uint8).reshape(-1, 32)
