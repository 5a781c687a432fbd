"""What the doors for other clients take and answer, for the OpenAPI document: their own APIs' shapes."""

from __future__ import annotations

from tinsmith.wire.sample_request import MOST_SAMPLES

from .schemas import (
    BOOLEAN,
    INT32,
    INTEGER,
    METADATA,
    NUMBER,
    STRING,
    Operation,
    Schema,
    array,
    integer,
    maybe,
    name_of,
    number,
    one_of,
    record,
    text,
)

_MODEL = name_of("weights", longest=4096)
_TEXTS = {"anyOf": [text(), array(text(), maxItems=16)]}
_OPENAI_ERROR = record(
    {
        "error": record({"message": STRING, "type": STRING, "param": maybe(STRING), "code": maybe(STRING)}),
        "detail": STRING,
    }
)
_ANTHROPIC_ERROR = record(
    {"type": one_of("error"), "error": record({"type": STRING, "message": STRING}), "detail": STRING}
)
_STATUSES = (402, 410, 413)

_SERVED = record({"id": STRING, "object": one_of("model"), "created": INTEGER, "owned_by": STRING})
_USAGE = record({"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER})
_SAMPLING: dict[str, Schema] = {
    "max_tokens": integer(1, INT32),
    "temperature": number(minimum=0),
    "top_p": number(exclusiveMinimum=0, maximum=1),
    "top_k": integer(-1, INT32),
    "seed": integer(-(2**63), 2**64 - 1),
    "stop": _TEXTS,
    "n": integer(1, MOST_SAMPLES),
    "stream": BOOLEAN,
    "user": STRING,
}
_FUNCTION = record({"name": text()}, {"description": text(), "parameters": METADATA})
_TOOLS = array(record({"type": one_of("function"), "function": _FUNCTION}))
_TEXT = record({"type": one_of("text"), "text": STRING})
_CONTENT = {"anyOf": [STRING, array(_TEXT)]}
_URL = record({"url": STRING}, {"detail": one_of("auto")})  # data:image/png;base64,...
_IMAGE_URL = record({"type": one_of("image_url"), "image_url": _URL})
_SEEN = {"anyOf": [STRING, array({"anyOf": [_TEXT, _IMAGE_URL]})]}
_SOURCE = record({"type": one_of("base64"), "media_type": one_of("image/png", "image/jpeg"), "data": STRING})
_IMAGE = record({"type": one_of("image"), "source": _SOURCE})
_BLOCKS = {"anyOf": [STRING, array({"anyOf": [_TEXT, _IMAGE]})]}
_MESSAGE = {
    "anyOf": [
        record({"role": one_of("system", "developer", "assistant"), "content": _CONTENT}),
        record({"role": one_of("user"), "content": _SEEN}),
    ]
}
_IDS = array(integer(0, INT32), minItems=1)
_TOKENS_OR_TEXTS = {"anyOf": [text(), array(text(), minItems=1), _IDS, array(_IDS, minItems=1)]}


def _choices(**more: Schema) -> Schema:
    choice = {"index": INTEGER, "logprobs": maybe(METADATA), "finish_reason": STRING}
    answer = {"id": STRING, "created": INTEGER, "model": STRING, "usage": _USAGE}
    return record({**answer, "choices": array(record({**choice, **more}))})


_ASKED = {"model": _MODEL, "messages": array(
    {"anyOf": [
        record({"role": one_of("user"), "content": _BLOCKS}),
        record({"role": one_of("assistant"), "content": _CONTENT}),
    ]}, minItems=1
)}  # fmt: skip
_BESIDE: dict[str, Schema] = {
    "system": _CONTENT,
    "tools": array(record({"name": text(), "input_schema": METADATA}, {"description": text()})),
    "tool_choice": record({"type": one_of("auto", "none")}, {"disable_parallel_tool_use": BOOLEAN}),
}

DOORS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/models"): Operation(
        "OpenAI: base models", "openai", error=_OPENAI_ERROR,
        answer=record({"object": one_of("list"), "data": array(_SERVED)}),
    ),
    ("GET", "/v1/models/{model}"): Operation(
        "OpenAI: whether there is a model, or such weights", "openai", answer=_SERVED, error=_OPENAI_ERROR
    ),
    ("POST", "/v1/completions"): Operation(
        "OpenAI: completions of texts or tokens", "openai", error=_OPENAI_ERROR, statuses=_STATUSES,
        body=record(
            {"model": _MODEL, "prompt": _TOKENS_OR_TEXTS},
            {**_SAMPLING, "max_tokens": integer(0, INT32), "logprobs": integer(0, 20), "echo": BOOLEAN},
        ),
        answer=_choices(text=STRING), events=True,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        "OpenAI: the next message of a chat", "openai", error=_OPENAI_ERROR, statuses=_STATUSES,
        body=record(
            {"model": _MODEL, "messages": array(_MESSAGE, minItems=1)},
            {
                **_SAMPLING,
                "max_completion_tokens": integer(1, INT32),
                "logprobs": BOOLEAN,
                "top_logprobs": integer(0, 20),
                "tools": _TOOLS,
                "tool_choice": one_of("auto", "none"),
                "parallel_tool_calls": BOOLEAN,
                "separate_reasoning": BOOLEAN,
            },
        ),
        answer=_choices(
            message=record(
                {"role": one_of("assistant"), "content": maybe(STRING)}, {"reasoning_content": STRING}
            )
        ),
        events=True,
    ),
    ("POST", "/v1/messages"): Operation(
        "Anthropic: the next message of a chat", "anthropic", error=_ANTHROPIC_ERROR, statuses=_STATUSES,
        body=record(
            {**_ASKED, "max_tokens": integer(1, INT32)},
            {
                **_BESIDE,
                "temperature": number(minimum=0),
                "top_p": number(exclusiveMinimum=0, maximum=1),
                "top_k": integer(0, INT32),
                "stop_sequences": array(text(), maxItems=16),
                "stream": BOOLEAN,
            },
        ),
        answer=record(
            {
                "id": STRING,
                "type": one_of("message"),
                "role": one_of("assistant"),
                "content": array(record({"type": one_of("text", "thinking", "tool_use")})),
                "stop_reason": STRING,
                "usage": record({"input_tokens": INTEGER, "output_tokens": NUMBER}),
            }
        ),
        events=True,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Anthropic: how many tokens a chat has", "anthropic", error=_ANTHROPIC_ERROR, statuses=_STATUSES,
        body=record(_ASKED, _BESIDE), answer=record({"input_tokens": INTEGER}),
    ),
}  # fmt: skip
