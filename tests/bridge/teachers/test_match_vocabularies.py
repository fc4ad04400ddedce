"""Which tokens two tokenizers share: by the bytes of text that a token stands for."""

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import jaxkd
from torch_bridge import match_vocabularies


def tokenizer(tokens, decoder):
    built = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    built.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=built)


def test_matched_vocabularies():
    """A byte-level vocabulary and one with SentencePiece's marks: by the bytes that a token stands for."""
    byte_level = tokenizer(["<s>", "Ġthe", "the", "Ċ", "Ã©", "Ġ", "only", "Â«"], decoders.ByteLevel())
    pieces = tokenizer(["<s>", "the", "▁the", "<0x0A>", "é", "<0xC2>", "▁", "Ã©", "<0x20>"], decoders.Metaspace())
    student_ids, teacher_ids = match_vocabularies(byte_level, pieces)
    assert student_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert teacher_ids.tolist() == [0, 2, 1, 3, 4, 6]
    assert student_ids.dtype == teacher_ids.dtype == np.int32
    student, teacher = (jaxkd.Logits(jnp.zeros((1, size))) for size in (8, 9))
    assert jaxkd.distillation_loss(student, jaxkd.VocabularyMap(teacher, student_ids, teacher_ids))[0] > 0


def test_nothing_in_common():
    ids = match_vocabularies(tokenizer(["a", "b"], decoders.ByteLevel()), tokenizer(["c"], decoders.ByteLevel()))
    assert [x.shape for x in ids] == [(0,), (0,)]
