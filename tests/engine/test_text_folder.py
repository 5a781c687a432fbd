"""Tokenizers for those who speak text: from a tokenizer.json, or written as one."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from tests.engine.tiny import make_tokenizer
from tinsmith.engine.text_folder import text_folder
from tinsmith.text.tokenizer import Tokenizer

TEXT = "Köln 東京 🙂"


def test_a_folder_that_has_one_is_taken_as_it_is(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert text_folder(tmp_path, tokenizer, tmp_path / "spill") == (str(tmp_path), "")
    assert not (tmp_path / "spill").exists()


def test_another_vocabulary_is_written_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(make_tokenizer().get_vocab()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": "{{ x }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    of_the_model = AutoTokenizer.from_pretrained(folder)
    where, why_not = text_folder(folder, of_the_model, tmp_path / "spill")
    assert why_not == ""
    assert Path(where).is_relative_to(tmp_path / "spill")
    tokenizer = Tokenizer.load(where)
    assert tokenizer.encode(TEXT) == of_the_model.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.template == "{{ x }}"


def test_one_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    class Slow:
        pass

    where, why_not = text_folder(tmp_path, Slow(), tmp_path / "spill")
    assert where == ""
    assert "Slow" in why_not
