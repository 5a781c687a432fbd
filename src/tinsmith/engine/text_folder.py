"""Where other processes find a model's tokenizer in the one form that needs neither torch nor a checkpoint's
own code to be read: tokenizer.json."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tinsmith.engine.model.errors import short

_FILE = "tokenizer.json"


def text_folder(folder: Path, tokenizer: Any, spill: Path) -> tuple[str, str]:
    """A folder with tokenizer.json, and an empty text or why there is none. A tokenizer that transformers has
    made of another vocabulary (vocab.json and merges.txt, tokenizer.model) is written below `spill`, where
    its class can do that."""
    if (folder / _FILE).is_file():
        return str(folder), ""
    own = spill / f"tokenizer-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    name = type(tokenizer).__name__
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return "", f"its tokenizer ({name}) has no tokenizer.json and cannot be written as one"
    try:
        tokenizer.save_pretrained(own)
    except Exception as error:  # whatever a class may do
        return "", f"its tokenizer ({name}) could not be written as a tokenizer.json: {short(error)}"
    return (
        (str(own), "") if (own / _FILE).is_file() else ("", f"its tokenizer ({name}) has no tokenizer.json")
    )
