"""Recipes of the cookbook, unmodified, in a folder where they find a model and small data sets by name.

The cookbook picks renderer, tokenizer and learning rate by the model's name, so the server serves its model
under one that the cookbook knows, and the folder has the tokenizer under the same name: transformers and
datasets take a folder of the wanted name before they ask the hub.
"""

from __future__ import annotations

import json
from pathlib import Path

MODEL = "Qwen/Qwen3-8B"
ANSWERER = "Qwen/Qwen3.5-9B"  # whom twenty_questions asks; served beside it

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
    "multiplayer_rl.twenty_questions.train": (
        f"batch_size=2 group_size=2 max_tokens=8 max_steps=1 eval_every=0 {_CHAT}"
    ),
    "rubric.train": (
        f"groups_per_batch=2 train_group_size=2 max_tokens=16 max_steps=2 eval_every=0 {_CHAT}"
        f" grader_llm_name={MODEL} grader_renderer_name=qwen3_disable_thinking"
        " train_jsonl_path=rubric.jsonl test_jsonl_path=rubric.jsonl"
    ),
    "distillation.on_policy_distillation": (
        f"teacher_model={MODEL} groups_per_batch=4 group_size=2 max_tokens=16 max_steps=2 lora_rank=16"
    ),
    "distillation.on_policy_multi_teacher": (
        f"deepmath_teacher_model={MODEL} tulu3_teacher_model={MODEL} deepmath_groups_per_batch=2"
        " tulu3_groups_per_batch=2 group_size=2 max_tokens=16 max_steps=2 lora_rank=16"
    ),
    "distillation.off_policy_reasoning": (
        f"batch_size=8 max_prompts=64 buffer_size=64 max_length=512 max_steps=2 lora_rank=16 {_CHAT}"
    ),
    "sdft.train": (
        "groups_per_batch=4 max_tokens=16 topk=4 max_steps=2 eval_every=0 teacher_sync_every=1 lora_rank=16"
        f" max_context_length=2048 {_CHAT}"
    ),
    "rl_numerics_check.train": (
        "groups_per_batch=2 group_size=2 max_tokens=24 max_steps=2 lora_rank=8 max_trajectory_tokens=3000"
        f" task.page_chars=300 task.num_pages_min=2 task.num_pages_max=3 {_CHAT}"
    ),
    "true_thinking_score.analyze": "dataset=gsm8k n_problems=4 max_tokens=64",
}


def command(python: Path, name: str, log: Path) -> list[str]:
    return [
        *(str(python), "-m", f"tinker_cookbook.recipes.{name}", f"log_path={log}", f"model_name={MODEL}"),
        *RECIPES[name].split(),
    ]


def make_folder(folder: Path, model: Path) -> None:
    """What the recipes need to be there under its name."""
    for name in (MODEL, ANSWERER):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(model)
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
    questions = [(f"What is {a} plus {b}?", a, b) for a, b in sums]
    said = [("human", "It is asked: "), ("gpt", "It is said: ")]
    rows: dict[str, list[dict[str, object]]] = {
        "zwhe99/DeepMath-103K/train": [{"question": q, "final_answer": str(a + b)} for q, a, b in questions],
        "allenai/tulu-3-sft-mixture/train": chats,
        "open-thoughts/OpenThoughts3-1.2M/train": [
            {"conversations": [{"from": who, "value": f"{words}{q}"} for who, words in said]}
            for q, _, _ in questions
        ],
        "hicai-zju/SciKnowEval/test": [
            {
                "domain": "Chemistry", "details": {"level": "L3"}, "type": "mcq-4-choices", "question": q,
                "choices": {"text": [str(a + b), str(a), str(b), "0"], "label": list("ABCD")},
                "answerKey": "A",
            }
            for q, a, b in questions
        ],
        "Salesforce/wikitext/wikitext-103-raw-v1/train": [
            {"text": f"The town had {a} mills and {b} houses , many of them closed before the war .\n"}
            for _, a, b in questions * 40
        ],
        "rubric": [
            {
                "convo": [{"role": "user", "content": q}],
                "rubric_items": [
                    {
                        "rubric_str": f"Is it {a + b}?",
                        "extraction_regex": "<score>(.*?)</score>",
                        "grader_output_format_instruction": "Say <score>1</score> if so.",
                    }
                ],
            }
            for q, a, b in questions[:8]
        ],
    }  # fmt: skip
    for name, data in rows.items():
        _write(folder / f"{name}.jsonl", data)
    _card(folder / "openai/gsm8k", "main", "train", "test")
    _card(folder / "Salesforce/wikitext", "wikitext-103-raw-v1", "train")


def _card(folder: Path, config: str, *splits: str) -> None:
    """What tells `datasets` of a named configuration."""
    files = "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in splits)
    head = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(head)


def _write(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
