"""The Flax student with all of the teacher's layers is the teacher."""

import functools
import os

import gguf
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from smollm2_cases import tiny_llama

from examples.smollm2 import teacher, text
from examples.smollm2.flags import default_cache
from examples.smollm2.model import evenly_spaced, student_from_teacher


def hidden_states_of_both(torch_model, tokens):
    with torch.inference_mode():
        expected = torch_model.model(input_ids=torch.from_numpy(tokens), use_cache=False).last_hidden_state.numpy()
    student = student_from_teacher(torch_model.requires_grad_(False), torch_model.config.num_hidden_layers)
    with jax.default_matmul_precision("highest"):
        return np.asarray(nnx.jit(lambda model: model(tokens))(student)), expected


def relative_error(actual, expected):
    """The largest relative L2 error of a token's hidden state."""
    return (np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


def test_random_llama_is_reproduced():
    tokens = np.random.default_rng(0).integers(0, 300, (2, 37))
    assert relative_error(*hidden_states_of_both(tiny_llama(), tokens)) < 1e-5


def test_pruned_student_holds_the_chosen_layers():
    torch_model = tiny_llama(num_layers=5).requires_grad_(False)
    student = student_from_teacher(torch_model, 3)
    assert evenly_spaced(5, 3) == [0, 2, 4]
    for ours, theirs in zip(student.layers, (0, 2, 4), strict=True):
        expected = torch_model.model.layers[theirs].mlp.up_proj.weight.numpy().T
        np.testing.assert_array_equal(ours.mlp.up.kernel[...], expected)


def test_evenly_spaced_keeps_both_ends():
    assert evenly_spaced(30, 30) == list(range(30))
    assert evenly_spaced(30, 1) == [0]
    assert evenly_spaced(30, 12)[0] == 0
    assert evenly_spaced(30, 12)[-1] == 29


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_is_reproduced_on_real_text(monkeypatch):
    # Most of the time, else: config, tokenizer and model each read the file's 98000 strings, and each module its names.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    try:
        torch_model, tokenizer = teacher.open_teacher(None, default_cache())
    except teacher.TeacherError as error:
        if "CI" in os.environ:
            raise
        pytest.skip(str(error))
    tokens = tokenizer(text.read_text(None)[:4000], add_special_tokens=False)["input_ids"]
    windows = text.windows_of(tokens[:257], 256)[:, :-1].astype(np.int64)
    assert relative_error(*hidden_states_of_both(torch_model, windows)) < 1e-3
