"""What every route takes and answers: the OpenAPI document's one source, beside the routes themselves."""

from __future__ import annotations

from tinsmith.wire.telemetry import SEVERITIES

from .records import (
    ADAM,
    AUDIT_ENTRY,
    CHECKPOINT,
    EMPTY,
    FUTURE,
    LISTING,
    LORA,
    MODEL,
    NAME,
    OPTIMIZER,
    PAGE,
    PASS,
    PLACE,
    PROMPT,
    RECEIPT,
    RUN,
    SAMPLE,
    SAMPLING_PLACE,
    SAVE,
    SESSION,
    SESSION_SUMMARY,
    SIGNED,
    STORED,
    TARGET,
    TINKER_PATH,
    TRAINING_RUN,
    TTL,
    USAGE,
)
from .schemas import (
    ANY,
    BOOLEAN,
    CURSOR,
    INTEGER,
    METADATA,
    NUMBER,
    STRING,
    TEXTS,
    TIME,
    Operation,
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
        "A signed identity in exchange for a key", "identity", body=EMPTY, answer=record({"jwt": STRING})
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
    ("DELETE", "auth/apikey/me"): Operation("Revoke the key", "identity", answer=EMPTY),
    ("GET", "audit"): Operation(
        "Who did what on one day", "identity",
        query={
            "event_type": one_of("all", "organizations", "teams", "projects", "checkpoints"),
            "day": {"type": "string", "format": "date"},
            **PAGE,
        },
        answer=record({"entries": array(AUDIT_ENTRY), "cursor": CURSOR}),
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
        "The client lives", "sessions", body=record({"session_id": SESSION}),
        answer=record({"type": one_of("session_heartbeat")}), statuses=(410,),
    ),
    ("GET", "sessions"): Operation(
        "Sessions, the newest first", "sessions", query=LISTING, answer=record({"sessions": array(STRING)})
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
        answer=EMPTY,
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
        answer=record({"sessions": array(SESSION_SUMMARY), "next_cursor": maybe(METADATA)}),
    ),
    ("PUT", "sessions/{session_id}/project"): Operation(
        "Move a session into a project", "sessions", body=record({"project_id": name_of("project")}),
        answer=EMPTY,
    ),
    ("GET", "sessions/{session_id}/trace_export"): Operation(
        "The session's timeline as a Perfetto trace, under a signed URL", "sessions",
        answer=record({"status": one_of("pending", "ready", "failed")}, {"url": STRING, "error": STRING}),
    ),
    ("GET", "traces/{name}"): Operation(
        "A timeline's file", "sessions", query=SIGNED,
        statuses=(403, 404, 410), key=False, files=True,
    ),
    # Training
    ("POST", "create_model"): Operation(
        "A new training run", "training",
        body=record(
            {"session_id": SESSION, "model_seq_id": PLACE, "base_model": MODEL, "lora_config": LORA},
            {"user_metadata": METADATA, "optimizer_config": OPTIMIZER},
        ),
        answer=RECEIPT, statuses=(402, 410),
    ),
    ("POST", "get_info"): Operation(
        "About a run's model", "training", body=record({"model_id": RUN}),
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
        body=record({**TARGET, "forward_input": PASS}), answer=RECEIPT, statuses=(402,),
    ),
    ("POST", "forward_backward"): Operation(
        "A pass whose gradients are accumulated; what is wrong with its content is told by its future",
        "training", body=record({**TARGET, "forward_backward_input": PASS}), answer=RECEIPT,
        statuses=(402,), protobuf_body="ForwardBackwardRequest",
    ),
    ("POST", "create_custom_loss"): Operation(
        "Take a traced loss; its future resolves to its id", "training",
        body=record({"session_id": SESSION}), answer=RECEIPT, statuses=(402, 410),
    ),
    ("POST", "optim_step"): Operation(
        "An optimizer step on what was accumulated", "training",
        body=record({**TARGET, "adam_params": ADAM}), answer=RECEIPT, statuses=(402,),
    ),
    ("POST", "save_weights"): Operation(
        "Save weights and optimizer state", "training",
        body=record({**TARGET, "path": NAME}, SAVE), answer=RECEIPT, statuses=(402,),
    ),
    ("POST", "save_weights_for_sampler"): Operation(
        "Save weights to sample from", "training",
        body=record(
            TARGET,
            {
                **SAVE,
                "path": NAME,
                "sampling_session_seq_id": PLACE,
                "kind": one_of("snapshot", "inflight"),
            },
        ),
        answer=RECEIPT, statuses=(402,),
    ),
    ("POST", "save_weights_external"): Operation(
        "Save weights for use elsewhere", "training",
        body=record(
            {**TARGET, "path": NAME}, {**SAVE, "age_encryption_recipients": array(text(), minItems=1)}
        ),
        answer=RECEIPT, statuses=(402,),
    ),
    ("POST", "load_weights"): Operation(
        "Load a checkpoint into a run, or into a new run of a session", "training",
        body={
            "anyOf": [
                record({**TARGET, "path": TINKER_PATH}, {"optimizer": BOOLEAN}),
                record(
                    {"session_id": SESSION, "model_seq_id": PLACE, "path": TINKER_PATH},
                    {"optimizer": BOOLEAN, "base_model": MODEL, "user_metadata": METADATA},
                ),
            ]
        },
        answer=RECEIPT, statuses=(402, 410),
    ),
    # Sampling
    ("POST", "create_sampling_session"): Operation(
        "A sampling client's place: a base model, or weights by their path", "sampling",
        body={
            "anyOf": [
                record({**SAMPLING_PLACE, "base_model": MODEL}),
                record({**SAMPLING_PLACE, "model_path": TINKER_PATH}),
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
                    {"prompt": PROMPT, "sampling_session_id": name_of("sampler"), "seq_id": PLACE}, SAMPLE
                ),
                record({"prompt": PROMPT, "base_model": MODEL}, SAMPLE),
                record({"prompt": PROMPT, "model_path": TINKER_PATH}, SAMPLE),
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
        answer=FUTURE, statuses=(408, 410), protobuf_answer="ForwardBackwardOutput or SampleResponse",
    ),
    ("POST", "retrieve_futures"): Operation(
        "Which of a sampling client's requests have ended", "results",
        body=record(
            {"target": record({"sampling_session_id": name_of("sampler")}, {"cloned_sampler_id": PLACE})},
            {"prev_cursor": PLACE, "timeout": number(minimum=0), "retrieved_request_ids": array(STRING)},
        ),
        answer=record({"completions": array(METADATA), "cursor": INTEGER}),
    ),
    ("POST", "cancel_future"): Operation(
        "Stop a sample", "results", body=record({"request_id": name_of("request")}), answer=EMPTY
    ),
    # Runs and checkpoints
    ("POST", "weights_info"): Operation(
        "What is needed to load a checkpoint", "checkpoints", body=record({"tinker_path": TINKER_PATH}),
        answer=record({"base_model": STRING, "is_lora": BOOLEAN, "lora_rank": maybe(INTEGER)}),
    ),
    ("GET", "training_runs"): Operation(
        "Runs, the newest first", "checkpoints", query={**LISTING, "project_id": name_of("project")},
        answer=record({"training_runs": array(TRAINING_RUN), "cursor": CURSOR}),
    ),
    ("GET", "training_runs/{run_id}"): Operation("A run", "checkpoints", answer=TRAINING_RUN),
    ("GET", "training_runs/{run_id}/checkpoints"): Operation(
        "A run's checkpoints", "checkpoints",
        answer=record({"checkpoints": array(CHECKPOINT), "cursor": maybe(CURSOR)}),
    ),
    ("POST", "training_runs/{run_id}/checkpoints/{kind}/{name}/publish"): Operation(
        "Let every organization read a checkpoint", "checkpoints", body=EMPTY, answer=EMPTY
    ),
    ("DELETE", "training_runs/{run_id}/checkpoints/{kind}/{name}/publish"): Operation(
        "Let nobody else read it any more", "checkpoints", answer=EMPTY
    ),
    ("PUT", "training_runs/{run_id}/checkpoints/{kind}/{name}/ttl"): Operation(
        "Give a checkpoint an end, or none", "checkpoints", body=record({}, {"ttl_seconds": TTL}),
        answer=EMPTY,
    ),
    ("DELETE", "training_runs/{run_id}/checkpoints/{kind}/{name}"): Operation(
        "Delete a checkpoint", "checkpoints", answer=EMPTY
    ),
    ("GET", "checkpoints"): Operation(
        "Checkpoints, the newest first", "checkpoints", query=PAGE,
        answer=record({"checkpoints": array(CHECKPOINT), "cursor": CURSOR}),
    ),
    ("GET", "training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls"): Operation(
        "Signed URLs of an external checkpoint's files", "checkpoints",
        answer=record({"urls": TEXTS, "expires": TIME}),
    ),
    ("GET", "external_weights/{checkpoint_id}/{file}"): Operation(
        "A file of external weights", "checkpoints", query=SIGNED,
        statuses=(403, 404, 410), key=False, files=True,
    ),
    ("GET", "training_runs/{run_id}/checkpoints/{kind}/{name}/archive"): Operation(
        "Where a tar of a checkpoint's adapter is", "checkpoints", statuses=(302,)
    ),
    ("GET", "checkpoint_archives/{checkpoint_id}"): Operation(
        "A tar of a checkpoint's adapter", "checkpoints", query=SIGNED,
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
                "base_models": array(MODEL, minItems=1),
                "limit": integer(1, 200),
            },
        ),
        answer=record({"checkpoints": array(CHECKPOINT), "next_cursor": maybe(METADATA)}),
    ),
    ("POST", "copy_weights"): Operation(
        "Copy a checkpoint into a project, or into a session", "checkpoints",
        body=record(
            {"source_path": TINKER_PATH},
            {"destination_project_id": name_of("project"), "session_id": SESSION, "model_seq_id": PLACE},
        ),
        answer=record({}), statuses=(402, 409, 410),
    ),
    ("POST", "external_weights_upload_start"): Operation(
        "Signed URLs that take a checkpoint's files from elsewhere", "checkpoints",
        body=record(
            {"base_model": MODEL, "lora_config": LORA}, {"destination_project_id": name_of("project")}
        ),
        answer=record({"upload_id": STRING, "urls": TEXTS, "expires": TIME}), statuses=(402,),
    ),
    ("PUT", "external_weights_uploads/{upload_id}/{file}"): Operation(
        "Take a file of an upload", "checkpoints", query=SIGNED, statuses=(403, 404, 410), key=False,
        answer=EMPTY, binary_body=True,
    ),
    ("POST", "external_weights_upload_finish"): Operation(
        "Make a checkpoint of an upload", "checkpoints", body=record({"upload_id": name_of("upload")}),
        answer=record({"tinker_path": STRING}), statuses=(402,),
    ),
    # Billing
    ("GET", "billing/usage/events"): Operation(
        "Usage by the hour, with its cost", "billing",
        query={"starting_on": TIME, "ending_before": TIME}, required_query=("starting_on", "ending_before"),
        answer=record({"data": array(USAGE), "sessions": METADATA, "cost_data_through": maybe(TIME)}),
    ),
    ("GET", "billing/usage/checkpoints/current"): Operation(
        "What is stored now", "billing", query={"project_id": name_of("project")},
        answer=record({"effective_rate_usd_per_gigabyte_month": maybe(NUMBER), "data": array(STORED)}),
    ),
}  # fmt: skip
