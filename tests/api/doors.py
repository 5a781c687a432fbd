"""What the tiny model speaks: its chat template, and weights that know two answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tinker
from tinker import types
from transformers import AutoTokenizer

from tests.harness import MODEL, Server

# Qwen's format, shortened to fit a context of 512 bytes.
TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool['function']['name'] }}\
{{- ' ' }}{%- endfor %}{{- 'answer by <tool_call>' + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>\\n' }}{{- call.function | tojson }}\
{{- '\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\
{%- if enable_thinking is defined and enable_thinking %}{{- 'T' }}{%- endif %}{%- endif %}
{#- it answers with <think> where it thinks #}"""

STEPS, RATE = 80, 5e-3

GREETING = "hello"
ANSWER = "Grüße aus 東京, mein Freund 🙂!"
QUESTION = "weather?"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
RIDDLE = "why?"
THOUGHT = "<think>\nhm, 東\n</think>\n\nso"
TOOL = {
    "name": "weather",
    "description": "of a city",
    "schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def tokenizer_of(folder: Path):  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(folder)


def teach(server: Server, folder: Path) -> str:
    """The path of weights that answer QUESTION with CALL where there is a tool, GREETING with ANSWER, and
    RIDDLE with THOUGHT where thinking is on."""
    tokenizer = tokenizer_of(folder)
    tool = {"type": "function", "function": {"name": TOOL["name"]}}
    data = [
        _datum(tokenizer, GREETING, None, ANSWER),
        _datum(tokenizer, QUESTION, [tool], CALL),
        _datum(tokenizer, RIDDLE, None, THOUGHT, enable_thinking=True),
    ]
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=32, seed=1).result()
        steps = []
        for _ in range(STEPS):
            steps.append(training.forward_backward(data, "cross_entropy"))
            steps.append(training.optim_step(tinker.AdamParams(learning_rate=RATE)))
        for step in steps:
            step.result()
        return training.save_weights_for_sampler("speaks").result().path


def _datum(  # type: ignore[no-untyped-def]
    tokenizer, question: str, tools: list | None, answer: str, **options: bool
) -> types.Datum:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tools=tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **options,
    )
    wanted = [*tokenizer.encode(answer), tokenizer.eos_token_id]
    tokens = [*prompt, *wanted]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": np.array(tokens[1:]),
            "weights": np.array([0.0] * (len(prompt) - 1) + [1.0] * len(wanted), np.float32),
        },
    )
