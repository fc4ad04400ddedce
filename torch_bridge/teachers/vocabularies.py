"""Which tokens two tokenizers share."""

import json
import re
from typing import Any, NamedTuple

import numpy as np

from torch_bridge.teachers.fingerprints import check_tokenizer


def match_vocabularies(student_tokenizer: Any, teacher_tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens that stand for the same bytes of text, for `jaxkd.VocabularyMap`.

    Space marks ("Ġ", "▁"), byte-level letters and byte tokens ("<0x0A>") are undone, each in the tokenizers that have
    them. Of several tokens with the same bytes the one counts that the tokenizer emits: an added token, which is cut
    out of the text first, before a piece, and a byte token only where no piece has that byte; else the lowest id. A
    special token stands for no text: it matches the other side's added token that is spelled alike, and nothing else.

    Args:
      student_tokenizer, teacher_tokenizer: `transformers` tokenizers, or those of `tokenizers`.

    Returns:
      ``(student_ids, teacher_ids)``, (S,) int32 each, by increasing id of the student's. No id comes twice.

    Raises:
      TypeError: one of them is no tokenizer, such as the name of one.
    """
    check_tokenizer("student_tokenizer", student_tokenizer)
    check_tokenizer("teacher_tokenizer", teacher_tokenizer)
    student, teacher = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    pairs = {
        i: teacher.added[spelling]
        for spelling, i in student.added.items()
        if spelling in teacher.added and (i in student.special or teacher.added[spelling] in teacher.special)
    }
    matched = set(pairs.values())
    for text, i in student.by_bytes.items():
        other = teacher.by_bytes.get(text)
        if other is not None and other not in matched:
            pairs.setdefault(i, other)
    ids = np.array(sorted(pairs.items()), np.int32).reshape(-1, 2)
    return ids[:, 0], ids[:, 1]


class _Tokens(NamedTuple):
    added: dict[str, int]  # by their spelling, special ones included
    special: set[int]
    by_bytes: dict[bytes, int]  # what is emitted for these bytes; no special token


def _tokens(tokenizer: Any) -> _Tokens:
    backend = tokenizer if hasattr(tokenizer, "to_str") else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one in Python
        is_byte_level, decoder = hasattr(tokenizer, "byte_decoder"), tokenizer.added_tokens_decoder
    else:
        rules, decoder = json.loads(backend.to_str()), backend.get_added_tokens_decoder()
        is_byte_level = any('"ByteLevel"' in json.dumps(rules[part]) for part in ("decoder", "pre_tokenizer"))
    added = {token.content: i for i, token in decoder.items()}
    special = {i for i, token in decoder.items() if token.special} | set(getattr(tokenizer, "all_special_ids", ()))
    letters = _byte_level_letters() if is_byte_level else {}

    def bytes_and_rank(token: str) -> tuple[bytes, int]:
        """What a token stands for, and 0 to 2 as it goes before others of the same bytes."""
        if token in added:  # spelled as it stands in the text
            return (token if is_byte_level else token.replace("▁", " ")).encode(), 0
        if is_byte_level and all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token), 1
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1]), 2
        return token.replace("▁", " ").encode(), 1

    best: dict[bytes, tuple[int, int]] = {}
    for token, i in tokenizer.get_vocab().items():
        if i not in special:
            text, rank = bytes_and_rank(token)
            best[text] = min(best.get(text, (rank, i)), (rank, i))
    return _Tokens(added, special, {text: i for text, (_, i) in best.items()})


def _byte_level_letters() -> dict[str, int]:
    """GPT-2's letter of each byte: itself where it is printable in Latin-1, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
