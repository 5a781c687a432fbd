"""The records of which requests and answers are made, in the OpenAPI document."""

from __future__ import annotations

from tinsmith.wire.requests import HOUR, TEN_YEARS
from tinsmith.wire.sample_request import MOST_SAMPLES

from .schemas import (
    BOOLEAN,
    INT32,
    INTEGER,
    METADATA,
    NUMBER,
    STRING,
    TEXTS,
    TIME,
    Schema,
    array,
    integer,
    mapping,
    maybe,
    name_of,
    number,
    one_of,
    record,
    text,
)

CHECKPOINT_NAME = r"^[A-Za-z0-9_.\-+=@,:~ ]*[A-Za-z0-9_\-+=@,:~][A-Za-z0-9_.\-+=@,:~ ]*$"
PATH = r"^tinker://[^/]+/(weights|sampler_weights|external_weights)/[^/]+$"

EMPTY = record({})
SESSION = name_of("session")
RUN = name_of("run")
MODEL = name_of("model")
TINKER_PATH = name_of("path", longest=2048, pattern=PATH)
TTL = integer(HOUR, TEN_YEARS)
PAGE: dict[str, Schema] = {"limit": INTEGER, "offset": INTEGER}
ACCESS: dict[str, Schema] = {"access_scope": one_of("owned", "accessible")}
LISTING: dict[str, Schema] = {**PAGE, **ACCESS}
SIGNED: dict[str, Schema] = {"expires": STRING, "signature": STRING}
PLACE = integer(0)

RECEIPT = record({"request_id": STRING, "model_id": maybe(STRING)})
OPTIMIZER = record({"type": one_of("adamw", "dimuon")}, {"version": INTEGER})

CHECKPOINT = record(
    {
        "checkpoint_id": STRING,
        "checkpoint_type": one_of("training", "sampler", "external"),
        "time": TIME,
        "tinker_path": STRING,
        "size_bytes": maybe(INTEGER),
        "public": BOOLEAN,
        "user_metadata": maybe(TEXTS),
        "expires_at": maybe(TIME),
    }
)

TRAINING_RUN = record(
    {
        "training_run_id": STRING,
        "base_model": STRING,
        "model_owner": STRING,
        "is_lora": BOOLEAN,
        "corrupted": BOOLEAN,
        "lora_rank": maybe(INTEGER),
        "last_request_time": TIME,
        "last_checkpoint": maybe(CHECKPOINT),
        "last_sampler_checkpoint": maybe(CHECKPOINT),
        "user_metadata": maybe(TEXTS),
    }
)

SESSION_SUMMARY = record(
    {
        "session_id": STRING,
        "created_at": TIME,
        "owner": STRING,
        "project_id": STRING,
        "status": METADATA,
        "checkpoints_count": INTEGER,
        "checkpoint_storage_bytes": INTEGER,
        "display_name": maybe(STRING),
        "user_metadata": maybe(TEXTS),
    }
)

ADAM = record(
    {},
    {
        "type": one_of("adam", "adamw"),
        "learning_rate": number(minimum=0),
        "beta1": number(minimum=0, exclusiveMaximum=1),
        "beta2": number(minimum=0, exclusiveMaximum=1),
        "eps": number(minimum=0),
        "weight_decay": number(minimum=0),
        "grad_clip_norm": number(minimum=0),
    },
)

LORA = record(
    {"rank": integer(1)},
    {"seed": INTEGER, "train_attn": BOOLEAN, "train_mlp": BOOLEAN, "train_unembed": BOOLEAN},
)

CHUNK = record(
    {"tokens": array(integer(0, INT32))},
    {"type": one_of("encoded_text")},
)
PROMPT = record({"chunks": array(CHUNK, minItems=1)})

SAMPLING_PARAMS = record(
    {},
    {
        "max_tokens": integer(1, INT32),
        "seed": integer(-(2**63), 2**64 - 1),
        "temperature": number(minimum=0),
        "top_k": integer(-1, INT32),
        "top_p": number(exclusiveMinimum=0, maximum=1),
        "stop": {"anyOf": [text(), array(text()), array(integer(0, INT32))]},
    },
)

SAMPLE: dict[str, Schema] = {
    "sampling_params": SAMPLING_PARAMS,
    "num_samples": integer(1, MOST_SAMPLES),
    "prompt_logprobs": BOOLEAN,
    "topk_prompt_logprobs": integer(0, INT32),
    "topk_sample_logprobs": integer(0, INT32),
    "prompt_alt_tokens_k": integer(0, INT32),
}

SAVE: dict[str, Schema] = {
    "ttl_seconds": TTL,
    "overwrite": BOOLEAN,
    "user_metadata": TEXTS,
}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": CHECKPOINT_NAME}

TENSOR = record({"data": array(NUMBER), "dtype": one_of("int64", "float32"), "shape": array(integer(0))})
DATUM = record({"model_input": PROMPT, "loss_fn_inputs": mapping(TENSOR)})
PASS = record(
    {"loss_fn": text(), "data": array(DATUM)}, {"loss_fn_config": mapping({"type": ["number", "string"]})}
)

SAMPLING_PLACE: dict[str, Schema] = {"session_id": SESSION, "sampling_session_seq_id": PLACE}
TARGET: dict[str, Schema] = {"model_id": RUN, "seq_id": integer(1)}

AUDIT_ENTRY = record(
    {
        "timestamp": TIME,
        "event": STRING,
        "event_details": METADATA,
        "model_id": maybe(STRING),
        "tinker_path": maybe(STRING),
        "purpose": maybe(STRING),
    }
)

USAGE = record(
    {
        "bucket_start": TIME,
        "bucket_end": TIME,
        "base_model": maybe(STRING),
        "user_id": maybe(STRING),
        "user_name": maybe(STRING),
        "session_id": maybe(STRING),
        "project_id": maybe(STRING),
        "estimated_cost_usd": maybe(NUMBER),
        "event_info": record(
            {"type": one_of("training", "sampling_prefill", "sampling_sample", "checkpoint", "storage")}
        ),
    }
)

STORED = record(
    {
        "project_id": maybe(STRING),
        "org_user_urn": STRING,
        "checkpoint_count": INTEGER,
        "size_bytes": INTEGER,
        "size_gigabytes": NUMBER,
        "estimated_monthly_cost_usd": maybe(NUMBER),
    }
)

FUTURE = {
    "anyOf": [
        record({"error": STRING, "category": one_of("user", "server", "unknown")}),
        record({}, {"type": STRING}),
    ]
}
