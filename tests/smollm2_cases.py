"""A teacher without a download, a tiny random Llama saved as transformers saves it, and what is checked of a run."""

import json
import signal

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.smollm2 import run_folder
from examples.smollm2.report import SCORES

TEXT = "\n\n".join(
    f"Paragraph {i}: the {i % 7} small foxes see {i * i} dogs and jump over {i % 3}." for i in range(200)
)


def tiny_llama(num_layers=4, vocabulary=300):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).eval()


def save_tiny_teacher(folder):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    tiny_llama().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def records(out, kind):
    with (out / "log.jsonl").open() as file:
        return [record for record in map(json.loads, file) if record["kind"] == kind]


def assert_same_losses(out, finished, num_steps):
    """Of two run folders: losses of every step, and scores on held-out text."""
    actual, expected = records(out, "train"), records(finished, "train")
    assert [record["position"] for record in actual] == list(range(1, num_steps + 1))
    np.testing.assert_allclose([r["loss"] for r in actual], [r["loss"] for r in expected], rtol=1e-6)
    for actual, expected in zip(records(out, "held_out"), records(finished, "held_out"), strict=True):
        assert actual["model"] == expected["model"]
        for score in SCORES.keys() & expected.keys():
            assert actual[score] == pytest.approx(expected[score], rel=1e-6, abs=1e-6)


def interrupt_after(position, patch):
    """Ctrl-C once the step at ``position`` of a run is logged."""
    write = run_folder.Log.write

    def write_then_interrupt(log, kind, at, **values):
        write(log, kind, at, **values)
        if at == position and kind == "train":
            signal.raise_signal(signal.SIGINT)

    patch.setattr(run_folder.Log, "write", write_then_interrupt)
