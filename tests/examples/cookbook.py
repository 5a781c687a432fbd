"""Recipes of the cookbook, unmodified, in a folder where they find a model and small data sets by name.

The cookbook picks renderer, tokenizer and learning rate by the model's name, so the server serves its model
under one that the cookbook knows, and the folder has the tokenizer under the same name: transformers and
datasets take a folder of the wanted name before they ask the hub.
"""

from __future__ import annotations

import json
from pathlib import Path

MODEL = "Qwen/Qwen3-8B"

_CHAT = "renderer_name=qwen3_disable_thinking"

# Each is run as: python -m tinker_cookbook.recipes.NAME log_path=FOLDER WORDS
RECIPES: dict[str, str] = {
    "sl_loop": "batch_size=4 max_length=512 max_steps=3 save_every=2",
    "rl_loop": "batch_size=2 group_size=4 max_tokens=16 max_steps=2 save_every=1",
    "sl_basic": "max_steps=2 eval_every=1 save_every=1",
    "rl_basic": "max_tokens=16 max_steps=1",
    "math_rl.train": f"env=arithmetic group_size=4 groups_per_batch=8 max_steps=2 save_every=1 {_CHAT}",
    "preference.shorter.train": f"batch_size=2 group_size=4 max_tokens=16 max_steps=2 {_CHAT}",
    "multiplayer_rl.guess_number.train": f"batch_size=2 group_size=4 max_tokens=16 max_steps=2 {_CHAT}",
    "chat_sl.train": f"dataset=conversations.jsonl batch_size=4 max_length=512 max_steps=3 {_CHAT}",
    "prompt_distillation.train": f"file_path=conversations.jsonl batch_size=4 max_steps=3 {_CHAT}",
    "preference.dpo.train": "dataset=hhh batch_size=4 max_length=512 max_steps=2",
}


def command(python: Path, name: str, log: Path) -> list[str]:
    return [
        *(str(python), "-m", f"tinker_cookbook.recipes.{name}", f"log_path={log}", f"model_name={MODEL}"),
        *RECIPES[name].split(),
    ]


def make_folder(folder: Path, model: Path) -> None:
    """What the recipes need to be there under its name."""
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).symlink_to(model)
    sums = [(a, b) for a in range(3, 19) for b in range(2, 18)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"It is {a + b}."},
            ]
        }
        for a, b in sums
    ]
    _write(folder / "conversations.jsonl", chats)
    for split in ("train", "test"):
        _write(folder / f"HuggingFaceH4/no_robots/{split}.jsonl", chats)
        _write(
            folder / f"openai/gsm8k/main/{split}.jsonl",
            [
                {"question": f"{a} and {b}?", "answer": f"They are {a + b}.\n#### {a + b}"}
                for a, b in sums[:8]
            ],
        )
        _write(
            folder / f"Anthropic/hh-rlhf/{split}.jsonl",
            [
                {
                    "chosen": f"\n\nHuman: What is {a} plus {b}?\n\nAssistant: It is {a + b}.",
                    "rejected": f"\n\nHuman: What is {a} plus {b}?\n\nAssistant: Who knows?",
                }
                for a, b in sums[:32]
            ],
        )
    (folder / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n"
        "  - split: test\n    path: main/test.jsonl\n---\n"
    )


def _write(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
