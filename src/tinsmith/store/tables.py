"""The tables, as they are now. migrations/ tells how they came to be so.

Times are seconds since 1970. Whatever belongs to somebody carries the organization that owns it, so
that a lookup with another organization's key finds nothing.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

# SQLite counts rows by itself in a column of exactly this type alone; it is 64 bits wide there too.
RowId = BigInteger().with_variant(Integer, "sqlite")

organizations = Table(
    "organizations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(256), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("disabled_at", Float),
    Column("deleted_at", Float),
)

# A user is one person or program; memberships say which organizations it belongs to, and as what.
users = Table(
    "users",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(256), nullable=False),
    Column("email", String(320), unique=True),
    Column("created_at", Float, nullable=False),
    Column("disabled_at", Float),
    Column("deleted_at", Float),
)

memberships = Table(
    "memberships",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    Column("user_id", ForeignKey("users.id"), primary_key=True),
    Column("role", String(32), nullable=False),  # admin, billing-admin, member
    Column("created_at", Float, nullable=False),
    Index(None, "user_id"),
)

projects = Table(
    "projects",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("name", String(256), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("archived_at", Float),
    # Where a session goes that names no project. Every organization has exactly one.
    Column("is_default", Boolean, nullable=False),
    # What every member of the organization may do here: a role, or none.
    Column("org_role", String(32)),
    Column("deleted_at", Float),
    UniqueConstraint("org_id", "name"),
)

project_grants = Table(
    "project_grants",
    metadata,
    Column("project_id", ForeignKey("projects.id"), primary_key=True),
    Column("user_id", ForeignKey("users.id"), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("role", String(32), nullable=False),  # admin, member, sampler, viewer
    Column("created_at", Float, nullable=False),
    Index(None, "user_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    # The SDK knows a key by a whole number.
    Column("number", BigInteger, nullable=False, unique=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("name", String(256), nullable=False),
    # What it may be used for, as a JSON list; none: whatever its user may do.
    Column("scopes", Text),
    # The one project that it is good for; none: all of its user's.
    Column("project_id", ForeignKey("projects.id")),
    Column("prefix", String(32), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("admin", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_used_at", Float),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("note", Text),
)

# A team is a group of users that is given roles in projects together.
teams = Table(
    "teams",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("name", String(256), nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("org_id", "name"),
)

team_members = Table(
    "team_members",
    metadata,
    Column("team_id", ForeignKey("teams.id"), primary_key=True),
    Column("user_id", ForeignKey("users.id"), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Index(None, "user_id"),
)

team_grants = Table(
    "team_grants",
    metadata,
    Column("project_id", ForeignKey("projects.id"), primary_key=True),
    Column("team_id", ForeignKey("teams.id"), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("role", String(32), nullable=False),
    Column("created_at", Float, nullable=False),
    Index(None, "team_id"),
)

# Who did what to whom. Rows are added and never changed: the database itself refuses it.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("at", Float, nullable=False),
    Column("event_type", String(32), nullable=False),  # organizations, teams, projects, checkpoints
    Column("event", String(64), nullable=False),
    Column("outcome", String(16), nullable=False),  # success, denied, failed
    Column("user_id", String(64)),
    Column("key_id", String(64)),
    Column("details", Text, nullable=False),
    Index(None, "org_id", "at"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("key_id", ForeignKey("api_keys.id"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("finished_at", Float),
    Column("finish_reason", String(32)),
    Column("finish_detail", Text),
    Column("tags", Text, nullable=False),
    Column("user_metadata", Text),
    Column("sdk_version", String(1024), nullable=False),
    Column("display_name", String(1024)),
    Column("search_name", Text),  # the name in the form in which it is searched
    # What went wrong last, as a JSON object, and whether that is that a training run's state is gone.
    Column("failure", Text),
    Column("lost", Boolean, nullable=False),
    Index(None, "org_id", "created_at"),
    Index(None, "project_id"),
)

# The texts in a session's user_metadata, for finding it by them.
session_metadata = Table(
    "session_metadata",
    metadata,
    Column("session_id", ForeignKey("sessions.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_request_at", Float, nullable=False),
    # fresh: not created yet; live: created; failed: could not be created.
    Column("state", String(16), nullable=False),
    Column("base_model", String(1024), nullable=False),
    Column("lora", Text, nullable=False),
    Column("optimizer", String(16), nullable=False, server_default="adamw"),
    Column("user_metadata", Text),
    # What the weights were made with; another base under the same name must not take them.
    Column("fingerprint", String(256), nullable=False),
    Column("dtype", String(16), nullable=False),
    Column("versions", Text, nullable=False),
    # Where the newest snapshot of the whole state lies, and the last command that is in it.
    Column("snapshot", String(256)),
    Column("snapshot_seq", BigInteger),
    # The last number that was given up: whatever had not come by then counts as refused.
    Column("turn_seq", BigInteger),
    Column("lost", Text),  # why the state cannot be had back from the log, once that is known
    UniqueConstraint("session_id", "model_seq_id"),
    Index(None, "org_id", "created_at"),
    Index(None, "project_id"),
)

commands = Table(
    "commands",
    metadata,
    Column("pk", RowId, primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("run_id", ForeignKey("runs.id"), nullable=False),
    Column("seq_id", BigInteger, nullable=False),
    Column("request_id", String(256), nullable=False, unique=True),
    Column("kind", String(32), nullable=False),
    # Small bodies and results are here, big ones in the blob store under the key.
    Column("body", LargeBinary),
    Column("body_key", String(256)),
    Column("encoding", String(16), nullable=False),
    Column("key_id", String(64)),  # whose request it was
    Column("arrived_at", Float, nullable=False),
    Column("status", String(16), nullable=False),  # queued, done, failed
    Column("result", LargeBinary),
    Column("result_key", String(256)),
    Column("result_type", String(16)),  # json, protobuf; none once the result was swept
    Column("usage", Text),
    Column("error", Text),
    Column("category", String(16)),
    Column("finished_at", Float),
    Column("fetched_at", Float),
    Column("loaded", String(64)),  # the id of the checkpoint that a load took, whatever its path means later
    Column(
        "attempts", Integer, nullable=False, server_default="0"
    ),  # begun again after a crash, so many times
    UniqueConstraint("run_id", "seq_id"),
    Index(None, "status"),
    Index(None, "fetched_at"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("run_id", ForeignKey("runs.id"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("name", String(256), nullable=False),
    Column("seq_id", BigInteger, nullable=False),
    Column("folder", String(256), nullable=False),
    Column("size_bytes", BigInteger),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("published_at", Float),  # since when every organization may read it
    Column("user_metadata", Text),
    UniqueConstraint("run_id", "kind", "name"),
    Index(None, "org_id", "created_at"),
    Index(None, "expires_at"),
)

# When the requests of a session came, ran and were fetched, a few hundred of them in a row.
trace_chunks = Table(
    "trace_chunks",
    metadata,
    Column("pk", RowId, primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("written_at", Float, nullable=False),
    Column("requests", Integer, nullable=False),
    Column("size", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Index(None, "session_id"),
    Index(None, "written_at"),
)

# What clients told of themselves. The session need not be one of ours, and may be said to be anybody's.
telemetry = Table(
    "telemetry",
    metadata,
    Column("pk", RowId, primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("user_id", String(64), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("session_id", String(128), nullable=False),
    Column("process", String(64)),
    Column("sdk_version", String(64), nullable=False),
    Column("platform", String(64), nullable=False),
    Column("received_at", Float, nullable=False),
    Column("event_id", String(64), nullable=False),
    Column("place", BigInteger, nullable=False),
    Column("at", Float, nullable=False),
    Column("type", String(64), nullable=False),
    Column("name", String(256)),
    Column("severity", String(16), nullable=False),
    Column("details", Text, nullable=False),  # whatever else the event has, a JSON object
    UniqueConstraint("org_id", "session_id", "event_id"),
    Index(None, "org_id", "pk"),
    Index(None, "received_at"),
)

sampling_sessions = Table(
    "sampling_sessions",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("base_model", String(1024), nullable=False),
    Column("model_path", Text),
    # What the engine knows the weights by; none for the base model itself.
    Column("sampler", String(256)),
    Column("folder", String(256)),
    Column("ephemeral", Boolean, nullable=False),
    Column("clones", BigInteger, nullable=False),
    # Of weights without a name: the command that published them, whose replay does it again.
    Column("run_id", String(128)),
    Column("seq_id", BigInteger),
    Index(None, "session_id"),
)

# What was used, by the hour. `session_id` is empty for what belongs to no session, `rate` (dollars per
# million tokens or GB-month, as text) for what has no price.
usage = Table(
    "usage",
    metadata,
    Column("pk", RowId, primary_key=True),
    Column("hour", BigInteger, nullable=False),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("project_id", String(64), nullable=False),
    Column("session_id", String(64), nullable=False),
    Column("user_id", String(64), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("model", String(1024), nullable=False),
    Column("kind", String(16), nullable=False),  # train, prefill, cached_prefill, sample, checkpoint, storage
    Column("rate", String(32), nullable=False),
    Column("quantity", BigInteger, nullable=False),  # tokens, checkpoints, byte-seconds
    UniqueConstraint(
        "org_id",
        "hour",
        "session_id",
        "kind",
        "model",
        "rate",
        "key_id",
        "user_id",
        "project_id",
        name="uq_usage",
    ),
    Index(None, "hour"),
)

# The life of every checkpoint, also of those that are gone. An open one ends when the checkpoint expires.
storage_spans = Table(
    "storage_spans",
    metadata,
    Column("checkpoint_id", String(64), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("project_id", String(64), nullable=False),
    Column("session_id", String(64), nullable=False),
    Column("user_id", String(64), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("model", String(1024), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("begin_at", Float, nullable=False),
    Column("end_at", Float),
    Index(None, "end_at"),
)

# How far something that is counted by the clock has come.
meters = Table(
    "meters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

# What an organization, or with `project_id` one of its projects, may use. An empty organization stands for
# all that have no value of their own.
limits = Table(
    "limits",
    metadata,
    Column("org_id", String(64), primary_key=True),
    Column("project_id", String(64), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("value", String(32), nullable=False),
    Column("set_at", Float, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("user_id", ForeignKey("users.id"), nullable=False),
    Column("key_id", ForeignKey("api_keys.id"), nullable=False),
    Column("base_model", String(1024), nullable=False),
    Column("lora", Text, nullable=False),
    Column("folder", String(256), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("path", Text),  # the checkpoint that was made of it
    Index(None, "created_at"),
)
