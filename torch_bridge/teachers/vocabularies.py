"""Which tokens two tokenizers share."""

import json
import re
from typing import Any

import numpy as np


def match_vocabularies(student_tokenizer: Any, teacher_tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the tokens that stand for the same bytes of text, for `jaxkd.VocabularyMap`.

    Space marks ("Ġ", "▁"), byte-level letters and byte tokens ("<0x0A>") are undone. A special token matches one
    that is spelled alike. Of several tokens with the same bytes the lowest id counts.

    Args:
      student_tokenizer, teacher_tokenizer: `transformers` tokenizers.

    Returns:
      ``(student_ids, teacher_ids)``, (S,) int32 each, by increasing id of the student's.
    """
    student, teacher = _ids_by_bytes(student_tokenizer), _ids_by_bytes(teacher_tokenizer)
    pairs = sorted((i, teacher[text]) for text, i in student.items() if text in teacher)
    matched = np.array(pairs, np.int32).reshape(-1, 2)
    return matched[:, 0], matched[:, 1]


def _ids_by_bytes(tokenizer: Any) -> dict[bytes, int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    letters = _byte_level_letters() if is_byte_level else {}

    def as_bytes(token: str) -> bytes:
        if is_byte_level and all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()

    ids: dict[bytes, int] = {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        ids.setdefault(as_bytes(token), i)
    return ids


def _byte_level_letters() -> dict[str, int]:
    """GPT-2's letter of each byte: itself where it is printable in Latin-1, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
