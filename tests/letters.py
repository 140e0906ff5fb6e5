"""A tokenizer whose tokens are the letters of a text, after a BOS of its own."""

from __future__ import annotations

from typing import Any


class Letters:
    """Ids are code points below 256."""

    bos_token_id = 1
    eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id, *map(ord, text)]}
