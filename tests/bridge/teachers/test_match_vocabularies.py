"""Which tokens two tokenizers share: by the bytes of text that a token stands for."""

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxkd
from torch_bridge import match_vocabularies


def tokenizer(tokens, decoder, added=(), special=()):
    built = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    built.decoder = decoder
    built.add_special_tokens(list(special))
    built.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=built)


def byte_level(*tokens, **kinds):
    return tokenizer(tokens, decoders.ByteLevel(), **kinds)


def pieces(*tokens, **kinds):
    return tokenizer(tokens, decoders.Metaspace(), **kinds)


def matched(student, teacher):
    return [ids.tolist() for ids in match_vocabularies(student, teacher)]


def test_matched_vocabularies():
    """A byte-level vocabulary and one with SentencePiece's marks: by the bytes that a token stands for."""
    student = byte_level("<s>", "Ġthe", "the", "Ċ", "Ã©", "Ġ", "only", "Â«")
    teacher = pieces("<s>", "the", "▁the", "<0x0A>", "é", "<0xC2>", "▁", "Ã©", "<0x20>")
    student_ids, teacher_ids = match_vocabularies(student, teacher)
    assert student_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert teacher_ids.tolist() == [0, 2, 1, 3, 4, 6]
    assert student_ids.dtype == teacher_ids.dtype == np.int32
    student, teacher = (jaxkd.Logits(jnp.zeros((1, size))) for size in (8, 9))
    assert jaxkd.distillation_loss(student, jaxkd.VocabularyMap(teacher, student_ids, teacher_ids))[0] > 0


def test_a_byte_token_counts_where_no_piece_has_its_byte():
    like_llama = pieces("<0x31>", "▁", "1", "<0x0A>", "<0xE9>")
    assert matched(like_llama, byte_level("1")) == [[2], [0]]
    assert matched(byte_level("1"), like_llama) == [[0], [2]]
    assert matched(like_llama, byte_level("Ċ", "Ġ", "é")) == [[1, 3, 4], [1, 0, 2]]
    assert matched(like_llama, pieces("1", "<0x31>", "<0x0A>")) == [[2, 3], [0, 2]]


def test_a_byte_tokens_spelling_is_text_in_a_byte_level_vocabulary():
    assert matched(byte_level("<0x31>"), pieces("<0x31>")) == [[], []]
    assert matched(byte_level("<0x31>"), byte_level("1", "<0x31>")) == [[0], [1]]


def test_an_added_token_is_spelled_as_it_stands_in_the_text():
    """In a byte-level vocabulary é is the letter of byte 0xE9 and Ġ that of the space, but not in an added token."""
    student = byte_level("a", added=["é", "▁", "Ġ"])
    assert matched(student, byte_level("Ã©", "âĸģ", "Äł", "é", "Ġ")) == [[1, 2, 3], [0, 1, 2]]
    assert matched(student, pieces("<0xE9>", "é", "▁")) == [[1], [1]]
    assert matched(byte_level("ĠĠ"), pieces("a", added=["▁▁"])) == [[0], [1]]


def test_an_added_token_goes_before_a_piece_of_the_same_bytes():
    student = byte_level("ĠĠ", "a", added=["  "])
    assert matched(student, pieces("a", "▁▁")) == [[1, 2], [0, 1]]


def test_of_pieces_with_the_same_bytes_the_lowest_id_counts():
    assert matched(pieces("a", "▁b", " b"), byte_level("Ġb")) == [[1], [0]]


def test_a_special_token_stands_for_no_text():
    with_special = pieces("a", "b", special=["<s>", "</s>"])
    assert matched(with_special, byte_level("<s>", "a")) == [[0], [1]]  # a tag for text struck through
    assert matched(with_special, byte_level("<s>", "</s>", special=["<s>"])) == [[2], [0]]
    assert matched(with_special, byte_level("x", added=["</s>"])) == [[3], [1]]  # another says it is not special
    shadowed = pieces("x", "<s>x", special=["<s>x"])  # its own piece of the same spelling
    assert matched(shadowed, byte_level("<s>x")) == [[], []]


def test_no_id_comes_twice():
    student = pieces("x", "<think>", special=["<think>"])
    teacher = byte_level("y", added=["<think>"])
    assert matched(student, teacher) == [[1], [1]]
    for side in match_vocabularies(teacher, student):
        assert len(set(side.tolist())) == len(side)


def test_tokenizers_of_the_tokenizers_library():
    student = byte_level("Ġthe", "Ċ")
    teacher = pieces("a", "▁the", "<0x0A>", special=["<s>"])
    assert (
        matched(student.backend_tokenizer, teacher.backend_tokenizer) == matched(student, teacher) == [[0, 1], [1, 2]]
    )


def test_a_byte_level_vocabulary_is_known_by_its_pre_tokenizer_too():
    built = Tokenizer(models.WordLevel({"Ġthe": 0}, unk_token="Ġthe"))
    built.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert matched(PreTrainedTokenizerFast(tokenizer_object=built), pieces("▁the")) == [[0], [0]]


def test_what_is_no_tokenizer():
    good = byte_level("a")
    with pytest.raises(TypeError, match=r"`student_tokenizer` is 'gpt2', a string; .*from_pretrained\('gpt2'\)"):
        match_vocabularies("gpt2", good)
    with pytest.raises(TypeError, match=r"`teacher_tokenizer` is a dict; give a tokenizer: .*from_pretrained"):
        match_vocabularies(good, {"a": 0})


def test_nothing_in_common():
    ids = match_vocabularies(byte_level("a", "b"), byte_level("c"))
    assert [x.shape for x in ids] == [(0,), (0,)]
