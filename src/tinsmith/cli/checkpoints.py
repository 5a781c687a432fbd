"""tinsmith checkpoints: a data folder's checkpoints for other programs. The server may run or not."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tinsmith.service.audit import about_checkpoint, record
from tinsmith.settings import SHIPPED_FOLDER, SHIPPED_MODEL, Settings, SettingsError, parse_model
from tinsmith.store import checkpoints, reading, runs
from tinsmith.store.scope import SERVER
from tinsmith.wire.errors import WireError
from tinsmith.wire.paths import TinkerPath

from .office import log_act
from .options import add_settings, read_settings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("checkpoints", help="export checkpoints for other programs")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    export = actions.add_parser(
        "export", help="write a checkpoint as an adapter for PEFT or vLLM, or merged into a whole model"
    )
    export.add_argument("path", metavar="PATH", help="tinker://RUN/weights/NAME, or an adapter's folder")
    export.add_argument("--format", required=True, dest="form", help="peft, vllm or merged")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder to write")
    export.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="MODULE",
        help="leave out what vLLM does not take",
    )
    export.add_argument(
        "--keep", action="append", default=[], metavar="MODULE", help="keep what your vLLM does take"
    )
    add_settings(export, only=("data", "models", "trust_remote_code"))
    export.set_defaults(run=_export)


@dataclass(frozen=True, slots=True)
class _Source:
    folder: Path
    base_model: str
    org_id: str | None = None  # whose it is; None for a folder that is no data folder's


def _export(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    try:
        source = _find(arguments.path, settings)
    except (WireError, reading.NoDatabase, _NotFound) as error:
        print(f"tinsmith: {error}", file=sys.stderr)
        return 1
    from tinsmith.engine.export import ExportError, export

    base, named = _base(source.base_model, arguments, settings)
    try:
        remarks = export(
            source.folder,
            source.base_model,
            base,
            arguments.form,
            arguments.out,
            drop=arguments.drop,
            keep=arguments.keep,
            trust_remote_code=settings.trust_remote_code,
        )
    except ExportError as error:
        hint = "" if named else f" (--model {source.base_model}=PATH says where the base model is)"
        print(f"tinsmith: {error}{hint}", file=sys.stderr)
        return 1
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    if source.org_id is not None:
        org_id, path, how = source.org_id, TinkerPath.parse(arguments.path), {"format": arguments.form}
        log_act(
            settings.data,
            lambda connection, actor: record(
                connection, actor, org_id, "checkpoint", "export", about_checkpoint(path), how
            ),
        )
    print(arguments.out)
    return 0


class _NotFound(Exception):
    pass


def _find(path: str, settings: Settings) -> _Source:
    if not path.startswith("tinker://"):
        return _of_folder(Path(path))
    wanted = TinkerPath.parse(path, "PATH")
    with reading.read_only(settings.data / reading.FILE) as connection:
        row = checkpoints.find(connection, wanted, SERVER, time.time())
        run = runs.get(connection, wanted.run, SERVER)
    if row is None or run is None:
        raise _NotFound(f"there is no checkpoint {path} in {settings.data}")
    return _Source(settings.data / "blobs" / row.folder, run.base_model, row.org_id)


def _of_folder(folder: Path) -> _Source:
    config = folder / "adapter_config.json"
    try:
        base = json.loads(config.read_text())["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("base_model_name_or_path is not set")
    except OSError as error:
        raise _NotFound(
            f"{folder} is no adapter's folder: adapter_config.json cannot be read ({error.strerror})"
            + ("; it is encrypted: decrypt it with age -d" if Path(f"{config}.age").exists() else "")
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _NotFound(f"{config} does not name its base model: {error}") from None
    return _Source(folder, base)


def _base(name: str, arguments: argparse.Namespace, settings: Settings) -> tuple[str, bool]:
    """Where a base model's files are, and whether that was said."""
    for source in settings.models:
        if source.name == name:
            return source.path, bool(arguments.models or arguments.config)
    if name == SHIPPED_MODEL:
        return str(SHIPPED_FOLDER), True
    try:
        return parse_model(name).path, False
    except SettingsError:
        return name, False
