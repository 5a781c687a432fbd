"""What every route takes and answers: the OpenAPI document's one source, beside the routes themselves."""

from __future__ import annotations

from tinsmith.wire.requests import HOUR, TEN_YEARS
from tinsmith.wire.sample_request import MOST_SAMPLES
from tinsmith.wire.telemetry import SEVERITIES

from .schemas import (
    ANY,
    BOOLEAN,
    CURSOR,
    INT32,
    INTEGER,
    METADATA,
    NUMBER,
    STRING,
    TEXTS,
    TIME,
    Operation,
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
_PATH = r"^tinker://[^/]+/(weights|sampler_weights|external_weights)/[^/]+$"


_EMPTY = record({})
_SESSION = name_of("session")
_RUN = name_of("run")
_MODEL = name_of("model")
_TINKER_PATH = name_of("path", longest=2048, pattern=_PATH)
_TTL = integer(HOUR, TEN_YEARS)
_PAGE: dict[str, Schema] = {"limit": INTEGER, "offset": INTEGER}
_ACCESS: dict[str, Schema] = {"access_scope": one_of("owned", "accessible")}
_LISTING: dict[str, Schema] = {**_PAGE, **_ACCESS}
_SIGNED: dict[str, Schema] = {"expires": STRING, "signature": STRING}
_PLACE = integer(0)

_RECEIPT = record({"request_id": STRING, "model_id": maybe(STRING)})
_OPTIMIZER = record({"type": one_of("adamw", "dimuon")}, {"version": INTEGER})

_CHECKPOINT = record(
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

_TRAINING_RUN = record(
    {
        "training_run_id": STRING,
        "base_model": STRING,
        "model_owner": STRING,
        "is_lora": BOOLEAN,
        "corrupted": BOOLEAN,
        "lora_rank": maybe(INTEGER),
        "last_request_time": TIME,
        "last_checkpoint": maybe(_CHECKPOINT),
        "last_sampler_checkpoint": maybe(_CHECKPOINT),
        "user_metadata": maybe(TEXTS),
    }
)

_SESSION_SUMMARY = record(
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

_ADAM = record(
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

_LORA = record(
    {"rank": integer(1)},
    {"seed": INTEGER, "train_attn": BOOLEAN, "train_mlp": BOOLEAN, "train_unembed": BOOLEAN},
)

_CHUNK = record(
    {"tokens": array(integer(0, INT32))},
    {"type": one_of("encoded_text")},
)
_PROMPT = record({"chunks": array(_CHUNK, minItems=1)})

_SAMPLING_PARAMS = record(
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

_SAMPLE: dict[str, Schema] = {
    "sampling_params": _SAMPLING_PARAMS,
    "num_samples": integer(1, MOST_SAMPLES),
    "prompt_logprobs": BOOLEAN,
    "topk_prompt_logprobs": integer(0, INT32),
    "topk_sample_logprobs": integer(0, INT32),
    "prompt_alt_tokens_k": integer(0, INT32),
}

_SAVE: dict[str, Schema] = {
    "ttl_seconds": _TTL,
    "overwrite": BOOLEAN,
    "user_metadata": TEXTS,
}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": CHECKPOINT_NAME}

_TENSOR = record({"data": array(NUMBER), "dtype": one_of("int64", "float32"), "shape": array(integer(0))})
_DATUM = record({"model_input": _PROMPT, "loss_fn_inputs": mapping(_TENSOR)})
_PASS = record(
    {"loss_fn": text(), "data": array(_DATUM)}, {"loss_fn_config": mapping({"type": ["number", "string"]})}
)

_SAMPLING_PLACE: dict[str, Schema] = {"session_id": _SESSION, "sampling_session_seq_id": _PLACE}
_TARGET: dict[str, Schema] = {"model_id": _RUN, "seq_id": integer(1)}

_AUDIT_ENTRY = record(
    {
        "timestamp": TIME,
        "event": STRING,
        "event_details": METADATA,
        "model_id": maybe(STRING),
        "tinker_path": maybe(STRING),
        "purpose": maybe(STRING),
    }
)

_USAGE = record(
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

_STORED = record(
    {
        "project_id": maybe(STRING),
        "org_user_urn": STRING,
        "checkpoint_count": INTEGER,
        "size_bytes": INTEGER,
        "size_gigabytes": NUMBER,
        "estimated_monthly_cost_usd": maybe(NUMBER),
    }
)

_FUTURE = {
    "anyOf": [
        record({"error": STRING, "category": one_of("user", "server", "unknown")}),
        record({}, {"type": STRING}),
    ]
}

OPERATIONS: dict[tuple[str, str], Operation] = {
    # Service
    ("GET", "healthz"): Operation(
        "Whether work can be done now", "service", answer=record({"status": one_of("ok")}), key=False
    ),
    ("GET", "openapi.json"): Operation(
        "This document", "service", answer=record({"openapi": STRING}), key=False
    ),
    ("POST", "client/config"): Operation(
        "Which features a client shall use", "service", body=record({}, {"sdk_version": STRING}),
        answer=mapping(ANY),
    ),
    ("POST", "client/dynamic_config"): Operation(
        "The same, for what may change while a client runs", "service",
        body=record({}, {"sdk_version": STRING}), answer=mapping(ANY),
    ),
    ("GET", "get_server_capabilities"): Operation(
        "The served models", "service",
        answer=record(
            {
                "supported_models": array(
                    record(
                        {
                            "model_name": STRING,
                            "max_context_length": INTEGER,
                            "trainable": BOOLEAN,
                            "sampleable": BOOLEAN,
                        }
                    )
                )
            }
        ),
    ),
    ("POST", "telemetry"): Operation(
        "A client's events", "service",
        body=record(
            {
                "session_id": text(longest=128),
                "events": array(
                    record(
                        {
                            "event": text(longest=64),
                            "event_id": text(longest=64),
                            "event_session_index": INTEGER,
                            "severity": one_of(*SEVERITIES),
                            "timestamp": TIME,
                        }
                    )
                ),
            },
            {"sdk_version": STRING, "platform": STRING, "process_uuid": STRING},
        ),
        answer=record({"status": one_of("accepted")}),
    ),
    ("GET", "status"): Operation("Figures for the operator", "service", answer=record({"ready": BOOLEAN})),
    # Identity
    ("POST", "auth/token"): Operation(
        "A signed identity in exchange for a key", "identity", body=_EMPTY, answer=record({"jwt": STRING})
    ),
    ("GET", "auth/apikey/me"): Operation(
        "What the key is called, and whose it is", "identity",
        answer=record(
            {
                "key_id": INTEGER,
                "name": STRING,
                "note": STRING,
                "details": record(
                    {"org_details": record({"name": STRING}), "user_details": record({"email": STRING})}
                ),
            }
        ),
    ),
    ("DELETE", "auth/apikey/me"): Operation("Revoke the key", "identity", answer=_EMPTY),
    ("GET", "audit"): Operation(
        "Who did what on one day", "identity",
        query={
            "event_type": one_of("all", "organizations", "teams", "projects", "checkpoints"),
            "day": {"type": "string", "format": "date"},
            **_PAGE,
        },
        answer=record({"entries": array(_AUDIT_ENTRY), "cursor": CURSOR}),
    ),
    # Sessions
    ("POST", "create_session"): Operation(
        "A new client session", "sessions",
        body=record(
            {},
            {
                "tags": array(STRING),
                "user_metadata": METADATA,
                "sdk_version": text(),
                "project_id": name_of("project"),
                "display_name": text(),
            },
        ),
        answer=record({"type": one_of("create_session"), "session_id": STRING}),
    ),
    ("POST", "session_heartbeat"): Operation(
        "The client lives", "sessions", body=record({"session_id": _SESSION}),
        answer=record({"type": one_of("session_heartbeat")}), statuses=(410,),
    ),
    ("GET", "sessions"): Operation(
        "Sessions, the newest first", "sessions", query=_LISTING, answer=record({"sessions": array(STRING)})
    ),
    ("GET", "sessions/{session_id}"): Operation(
        "A session's runs and samplers", "sessions",
        answer=record(
            {
                "training_run_ids": array(STRING),
                "sampler_ids": array(STRING),
                "user_metadata": maybe(TEXTS),
                "display_name": maybe(STRING),
            }
        ),
    ),
    ("POST", "sessions/{session_id}/finish"): Operation(
        "The client has ended", "sessions",
        body=record(
            {},
            {"reason": record({}, {"type": one_of("success", "errored", "interrupted")}), "detail": STRING},
        ),
        answer=_EMPTY,
    ),
    ("POST", "sessions/search"): Operation(
        "Sessions by name, project, owner, status and metadata", "sessions",
        body=record(
            {},
            {
                "session_id": text(),
                "display_name": text(),
                "project_ids": array(name_of("project"), minItems=1),
                "user_metadata": TEXTS,
                "owner": record({}, {"type": one_of("own", "everyone")}),
                "limit": integer(1, 200),
            },
        ),
        answer=record({"sessions": array(_SESSION_SUMMARY), "next_cursor": maybe(METADATA)}),
    ),
    ("PUT", "sessions/{session_id}/project"): Operation(
        "Move a session into a project", "sessions", body=record({"project_id": name_of("project")}),
        answer=_EMPTY,
    ),
    ("GET", "sessions/{session_id}/trace_export"): Operation(
        "The session's timeline as a Perfetto trace, under a signed URL", "sessions",
        answer=record({"status": one_of("pending", "ready", "failed")}, {"url": STRING, "error": STRING}),
    ),
    ("GET", "traces/{name}"): Operation(
        "A timeline's file", "sessions", query=_SIGNED,
        statuses=(403, 404, 410), key=False, files=True,
    ),
    # Training
    ("POST", "create_model"): Operation(
        "A new training run", "training",
        body=record(
            {"session_id": _SESSION, "model_seq_id": _PLACE, "base_model": _MODEL, "lora_config": _LORA},
            {"user_metadata": METADATA, "optimizer_config": _OPTIMIZER},
        ),
        answer=_RECEIPT, statuses=(402, 410),
    ),
    ("POST", "get_info"): Operation(
        "About a run's model", "training", body=record({"model_id": _RUN}),
        answer=record(
            {
                "type": one_of("get_info"),
                "model_id": STRING,
                "model_data": record({"arch": STRING, "model_name": STRING, "tokenizer_id": STRING}),
                "is_lora": BOOLEAN,
                "lora_rank": maybe(INTEGER),
            }
        ),
    ),
    ("POST", "forward"): Operation(
        "A forward pass, as SDKs before 0.27 ask for it", "training",
        body=record({**_TARGET, "forward_input": _PASS}), answer=_RECEIPT, statuses=(402,),
    ),
    ("POST", "forward_backward"): Operation(
        "A pass whose gradients are accumulated; what is wrong with its content is told by its future",
        "training", body=record({**_TARGET, "forward_backward_input": _PASS}), answer=_RECEIPT,
        statuses=(402,), protobuf_body="ForwardBackwardRequest",
    ),
    ("POST", "create_custom_loss"): Operation(
        "Take a traced loss; its future resolves to its id", "training",
        body=record({"session_id": _SESSION}), answer=_RECEIPT, statuses=(402, 410),
    ),
    ("POST", "optim_step"): Operation(
        "An optimizer step on what was accumulated", "training",
        body=record({**_TARGET, "adam_params": _ADAM}), answer=_RECEIPT, statuses=(402,),
    ),
    ("POST", "save_weights"): Operation(
        "Save weights and optimizer state", "training",
        body=record({**_TARGET, "path": _NAME}, _SAVE), answer=_RECEIPT, statuses=(402,),
    ),
    ("POST", "save_weights_for_sampler"): Operation(
        "Save weights to sample from", "training",
        body=record(
            _TARGET,
            {
                **_SAVE,
                "path": _NAME,
                "sampling_session_seq_id": _PLACE,
                "kind": one_of("snapshot", "inflight"),
            },
        ),
        answer=_RECEIPT, statuses=(402,),
    ),
    ("POST", "save_weights_external"): Operation(
        "Save weights for use elsewhere", "training",
        body=record(
            {**_TARGET, "path": _NAME}, {**_SAVE, "age_encryption_recipients": array(text(), minItems=1)}
        ),
        answer=_RECEIPT, statuses=(402,),
    ),
    ("POST", "load_weights"): Operation(
        "Load a checkpoint into a run, or into a new run of a session", "training",
        body={
            "anyOf": [
                record({**_TARGET, "path": _TINKER_PATH}, {"optimizer": BOOLEAN}),
                record(
                    {"session_id": _SESSION, "model_seq_id": _PLACE, "path": _TINKER_PATH},
                    {"optimizer": BOOLEAN, "base_model": _MODEL, "user_metadata": METADATA},
                ),
            ]
        },
        answer=_RECEIPT, statuses=(402, 410),
    ),
    # Sampling
    ("POST", "create_sampling_session"): Operation(
        "A sampling client's place: a base model, or weights by their path", "sampling",
        body={
            "anyOf": [
                record({**_SAMPLING_PLACE, "base_model": _MODEL}),
                record({**_SAMPLING_PLACE, "model_path": _TINKER_PATH}),
            ]
        },
        answer=record({"type": one_of("create_sampling_session"), "sampling_session_id": STRING}),
        statuses=(402, 410),
    ),
    ("POST", "join_sampling_session"): Operation(
        "A number for one more client of a sampling session", "sampling",
        body=record({"sampling_session_id": name_of("sampler")}),
        answer=record({"type": one_of("join_sampling_session"), "client_counter": INTEGER}),
    ),
    ("GET", "samplers/{sampler_id}"): Operation(
        "What a sampling client samples from", "sampling",
        answer=record({"sampler_id": STRING, "base_model": STRING, "model_path": maybe(STRING)}),
    ),
    ("POST", "asample"): Operation(
        "Sample", "sampling",
        body={
            "anyOf": [
                record(
                    {"prompt": _PROMPT, "sampling_session_id": name_of("sampler"), "seq_id": _PLACE}, _SAMPLE
                ),
                record({"prompt": _PROMPT, "base_model": _MODEL}, _SAMPLE),
                record({"prompt": _PROMPT, "model_path": _TINKER_PATH}, _SAMPLE),
            ]
        },
        answer=record(
            {"request_id": STRING, "model_id": maybe(STRING), "sample_sequence_ids": array(STRING)}
        ),
        statuses=(402, 410),
    ),
    # Results
    ("POST", "retrieve_future"): Operation(
        "The outcome of a request, held back until there is one", "results",
        body=record({"request_id": name_of("request")}, {"allow_metadata_only": BOOLEAN}),
        answer=_FUTURE, statuses=(408, 410), protobuf_answer="ForwardBackwardOutput or SampleResponse",
    ),
    ("POST", "retrieve_futures"): Operation(
        "Which of a sampling client's requests have ended", "results",
        body=record(
            {"target": record({"sampling_session_id": name_of("sampler")}, {"cloned_sampler_id": _PLACE})},
            {"prev_cursor": _PLACE, "timeout": number(minimum=0), "retrieved_request_ids": array(STRING)},
        ),
        answer=record({"completions": array(METADATA), "cursor": INTEGER}),
    ),
    ("POST", "cancel_future"): Operation(
        "Stop a sample", "results", body=record({"request_id": name_of("request")}), answer=_EMPTY
    ),
    # Runs and checkpoints
    ("POST", "weights_info"): Operation(
        "What is needed to load a checkpoint", "checkpoints", body=record({"tinker_path": _TINKER_PATH}),
        answer=record({"base_model": STRING, "is_lora": BOOLEAN, "lora_rank": maybe(INTEGER)}),
    ),
    ("GET", "training_runs"): Operation(
        "Runs, the newest first", "checkpoints", query={**_LISTING, "project_id": name_of("project")},
        answer=record({"training_runs": array(_TRAINING_RUN), "cursor": CURSOR}),
    ),
    ("GET", "training_runs/{run_id}"): Operation("A run", "checkpoints", answer=_TRAINING_RUN),
    ("GET", "training_runs/{run_id}/checkpoints"): Operation(
        "A run's checkpoints", "checkpoints",
        answer=record({"checkpoints": array(_CHECKPOINT), "cursor": maybe(CURSOR)}),
    ),
    ("POST", "training_runs/{run_id}/checkpoints/{kind}/{name}/publish"): Operation(
        "Let every organization read a checkpoint", "checkpoints", body=_EMPTY, answer=_EMPTY
    ),
    ("DELETE", "training_runs/{run_id}/checkpoints/{kind}/{name}/publish"): Operation(
        "Let nobody else read it any more", "checkpoints", answer=_EMPTY
    ),
    ("PUT", "training_runs/{run_id}/checkpoints/{kind}/{name}/ttl"): Operation(
        "Give a checkpoint an end, or none", "checkpoints", body=record({}, {"ttl_seconds": _TTL}),
        answer=_EMPTY,
    ),
    ("DELETE", "training_runs/{run_id}/checkpoints/{kind}/{name}"): Operation(
        "Delete a checkpoint", "checkpoints", answer=_EMPTY
    ),
    ("GET", "checkpoints"): Operation(
        "Checkpoints, the newest first", "checkpoints", query=_PAGE,
        answer=record({"checkpoints": array(_CHECKPOINT), "cursor": CURSOR}),
    ),
    ("GET", "training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls"): Operation(
        "Signed URLs of an external checkpoint's files", "checkpoints",
        answer=record({"urls": TEXTS, "expires": TIME}),
    ),
    ("GET", "external_weights/{checkpoint_id}/{file}"): Operation(
        "A file of external weights", "checkpoints", query=_SIGNED,
        statuses=(403, 404, 410), key=False, files=True,
    ),
    ("GET", "training_runs/{run_id}/checkpoints/{kind}/{name}/archive"): Operation(
        "Where a tar of a checkpoint's adapter is", "checkpoints", statuses=(302,)
    ),
    ("GET", "checkpoint_archives/{checkpoint_id}"): Operation(
        "A tar of a checkpoint's adapter", "checkpoints", query=_SIGNED,
        statuses=(403, 404, 410), key=False, files=True,
    ),
    ("POST", "checkpoints/search"): Operation(
        "Checkpoints by project, owner, kind, base model and metadata", "checkpoints",
        body=record(
            {},
            {
                "project_ids": array(name_of("project"), minItems=1),
                "user_metadata": TEXTS,
                "checkpoint_type": one_of("training", "sampler", "external"),
                "owner": record({}, {"type": one_of("own", "everyone")}),
                "base_models": array(_MODEL, minItems=1),
                "limit": integer(1, 200),
            },
        ),
        answer=record({"checkpoints": array(_CHECKPOINT), "next_cursor": maybe(METADATA)}),
    ),
    ("POST", "copy_weights"): Operation(
        "Copy a checkpoint into a project, or into a session", "checkpoints",
        body=record(
            {"source_path": _TINKER_PATH},
            {"destination_project_id": name_of("project"), "session_id": _SESSION, "model_seq_id": _PLACE},
        ),
        answer=record({}), statuses=(402, 409, 410),
    ),
    ("POST", "external_weights_upload_start"): Operation(
        "Signed URLs that take a checkpoint's files from elsewhere", "checkpoints",
        body=record(
            {"base_model": _MODEL, "lora_config": _LORA}, {"destination_project_id": name_of("project")}
        ),
        answer=record({"upload_id": STRING, "urls": TEXTS, "expires": TIME}), statuses=(402,),
    ),
    ("PUT", "external_weights_uploads/{upload_id}/{file}"): Operation(
        "Take a file of an upload", "checkpoints", query=_SIGNED, statuses=(403, 404, 410), key=False,
        answer=_EMPTY, binary_body=True,
    ),
    ("POST", "external_weights_upload_finish"): Operation(
        "Make a checkpoint of an upload", "checkpoints", body=record({"upload_id": name_of("upload")}),
        answer=record({"tinker_path": STRING}), statuses=(402,),
    ),
    # Billing
    ("GET", "billing/usage/events"): Operation(
        "Usage by the hour, with its cost", "billing",
        query={"starting_on": TIME, "ending_before": TIME}, required_query=("starting_on", "ending_before"),
        answer=record({"data": array(_USAGE), "sessions": METADATA, "cost_data_through": maybe(TIME)}),
    ),
    ("GET", "billing/usage/checkpoints/current"): Operation(
        "What is stored now", "billing", query={"project_id": name_of("project")},
        answer=record({"effective_rate_usd_per_gigabyte_month": maybe(NUMBER), "data": array(_STORED)}),
    ),
}  # fmt: skip
