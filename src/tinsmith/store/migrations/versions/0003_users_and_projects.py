"""Users and projects

Every organization gets a default project, in which all that it has lies, and every key gets a user of
its name. A session's project used to be any text: each one becomes a project of that name.
"""

import uuid
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("organizations", sa.Column("disabled_at", sa.Float(), nullable=True))
    op.create_table(
        "users",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("email", sa.String(length=320), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("disabled_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
    )
    op.create_table(
        "memberships",
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_memberships_org_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_memberships_user_id")),
        sa.PrimaryKeyConstraint("org_id", "user_id", name=op.f("pk_memberships")),
    )
    op.create_index(op.f("ix_memberships_user_id"), "memberships", ["user_id"])
    op.create_table(
        "projects",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("archived_at", sa.Float(), nullable=True),
        sa.Column("is_default", sa.Boolean(), nullable=False),
        sa.Column("org_role", sa.String(length=32), nullable=True),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_projects_org_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("org_id", "name", name=op.f("uq_projects_org_id_name")),
    )
    op.create_table(
        "project_grants",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=64), nullable=False),
        sa.Column("org_id", sa.String(length=64), nullable=False),
        sa.Column("role", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_project_grants_org_id")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_project_grants_project_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_project_grants_user_id")),
        sa.PrimaryKeyConstraint("project_id", "user_id", name=op.f("pk_project_grants")),
    )
    op.create_index(op.f("ix_project_grants_user_id"), "project_grants", ["user_id"])

    op.add_column("api_keys", sa.Column("number", sa.BigInteger(), nullable=True))
    op.add_column("api_keys", sa.Column("user_id", sa.String(length=64), nullable=True))
    op.add_column("api_keys", sa.Column("scopes", sa.Text(), nullable=True))
    op.add_column("api_keys", sa.Column("project_id", sa.String(length=64), nullable=True))
    op.add_column("api_keys", sa.Column("expires_at", sa.Float(), nullable=True))
    op.add_column("sessions", sa.Column("user_id", sa.String(length=64), nullable=True))
    op.add_column("runs", sa.Column("project_id", sa.String(length=64), nullable=True))
    op.add_column("runs", sa.Column("user_id", sa.String(length=64), nullable=True))
    op.add_column("commands", sa.Column("org_id", sa.String(length=64), nullable=True))
    _fill(op.get_bind())

    with op.batch_alter_table("api_keys") as batch:
        batch.alter_column("number", existing_type=sa.BigInteger(), nullable=False)
        batch.alter_column("user_id", existing_type=sa.String(length=64), nullable=False)
        batch.create_unique_constraint(op.f("uq_api_keys_number"), ["number"])
        batch.create_foreign_key(op.f("fk_api_keys_user_id"), "users", ["user_id"], ["id"])
        batch.create_foreign_key(op.f("fk_api_keys_project_id"), "projects", ["project_id"], ["id"])
    for table in ("sessions", "runs"):
        before = sa.String(length=1024 if table == "sessions" else 64)
        with op.batch_alter_table(table) as batch:
            batch.alter_column("project_id", existing_type=before, type_=sa.String(length=64), nullable=False)
            batch.alter_column("user_id", existing_type=sa.String(length=64), nullable=False)
            batch.create_foreign_key(op.f(f"fk_{table}_project_id"), "projects", ["project_id"], ["id"])
            batch.create_foreign_key(op.f(f"fk_{table}_user_id"), "users", ["user_id"], ["id"])
            batch.create_index(op.f(f"ix_{table}_project_id"), ["project_id"])
    with op.batch_alter_table("commands") as batch:
        batch.alter_column("org_id", existing_type=sa.String(length=64), nullable=False)
        batch.create_foreign_key(op.f("fk_commands_org_id"), "organizations", ["org_id"], ["id"])


def _fill(connection: sa.Connection) -> None:
    """Give every row its user and its project."""

    def run(statement: str, **values: object) -> Any:
        return connection.execute(sa.text(statement), values)

    for org_id, created in run("select id, created_at from organizations").all():
        _project(connection, org_id, "Default", created, is_default=True)
        known: dict[str, str] = {}
        keys = run(
            "select id, name, admin, created_at from api_keys where org_id = :org order by created_at, id",
            org=org_id,
        )
        for key_id, name, admin, key_created in keys.all():
            if name not in known:
                user_id = uuid.uuid4().hex
                # Who came first, and who ran the server, looks after the organization.
                role = "admin" if admin or not known else "member"
                known[name] = user_id
                run(
                    "insert into users (id, name, created_at) values (:id, :name, :created)",
                    id=user_id, name=name, created=key_created,
                )  # fmt: skip
                run(
                    "insert into memberships (org_id, user_id, role, created_at)"
                    " values (:org, :user, :role, :created)",
                    org=org_id, user=user_id, role=role, created=key_created,
                )  # fmt: skip
            run("update api_keys set user_id = :user where id = :key", user=known[name], key=key_id)
        asked = run(
            "select distinct project_id from sessions where org_id = :org and project_id is not null",
            org=org_id,
        )
        for (text,) in asked.all():
            plain = text != "Default" and len(text) <= 256
            name = text if plain else f"{text[:240]} {uuid.uuid4().hex[:8]}"
            project_id = _project(connection, org_id, name, created, is_default=False)
            run(
                "update sessions set project_id = :project where org_id = :org and project_id = :text",
                project=project_id, org=org_id, text=text,
            )  # fmt: skip
    for number, (key_id,) in enumerate(run("select id from api_keys order by created_at, id").all(), 1):
        run("update api_keys set number = :number where id = :key", number=number, key=key_id)
    run(
        "update sessions set project_id = (select id from projects where projects.org_id = sessions.org_id"
        " and projects.name = 'Default') where project_id is null"
    )
    run("update sessions set user_id = (select user_id from api_keys where api_keys.id = sessions.key_id)")
    for column in ("project_id", "user_id"):
        run(f"update runs set {column} = (select {column} from sessions where sessions.id = runs.session_id)")
    run("update commands set org_id = (select org_id from runs where runs.id = commands.run_id)")


def _project(connection: sa.Connection, org_id: str, name: str, created: float, *, is_default: bool) -> str:
    """A project in which every member may work, as everybody could until now."""
    project_id = uuid.uuid4().hex
    connection.execute(
        sa.text(
            "insert into projects (id, org_id, name, created_at, is_default, org_role)"
            " values (:id, :org, :name, :created, :is_default, 'member')"
        ),
        {"id": project_id, "org": org_id, "name": name, "created": created, "is_default": is_default},
    )
    return project_id


def downgrade() -> None:
    for table, columns in (
        ("commands", ("org_id",)),
        ("runs", ("user_id", "project_id")),
        ("sessions", ("user_id",)),
        ("api_keys", ("expires_at", "project_id", "scopes", "user_id", "number")),
    ):
        with op.batch_alter_table(table) as batch:
            if table in ("runs", "sessions"):
                batch.drop_index(op.f(f"ix_{table}_project_id"))
            if table == "sessions":  # the ids of projects stay, as the texts that they used to be
                batch.drop_constraint(op.f("fk_sessions_project_id"), type_="foreignkey")
                batch.alter_column(
                    "project_id",
                    existing_type=sa.String(length=64),
                    type_=sa.String(length=1024),
                    nullable=True,
                )
            for column in columns:
                if column in ("user_id", "project_id", "org_id"):
                    batch.drop_constraint(op.f(f"fk_{table}_{column}"), type_="foreignkey")
                if column == "number":
                    batch.drop_constraint(op.f("uq_api_keys_number"), type_="unique")
                batch.drop_column(column)
    for table in ("project_grants", "projects", "memberships", "users"):
        op.drop_table(table)
    op.drop_column("organizations", "disabled_at")
