"""tinsmith backup and tinsmith restore: a data folder's copy, and a data folder of a copy."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from tinsmith.service.audit import record_everywhere
from tinsmith.service.backup import BackupError, Summary, backup, restore

from .office import log_act
from .options import add_settings, read_settings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    make = commands.add_parser("backup", help="copy the data folder, while its server runs or not")
    make.add_argument(
        "--out", required=True, type=Path, metavar="DIR|FILE", help="new: a folder, .tar, .tar.zst"
    )
    add_settings(make, only=("data",))
    make.set_defaults(run=_backup)
    take = commands.add_parser("restore", help="make a data folder of a copy")
    take.add_argument("source", type=Path, metavar="DIR|FILE", help="what tinsmith backup wrote")
    add_settings(take, only=("data",))
    take.set_defaults(run=_restore)


def _backup(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    data = read_settings(arguments).data
    try:
        summary = backup(data, arguments.out)
    except BackupError as error:
        print(f"tinsmith: {error}", file=sys.stderr)
        return 1
    log_act(data, lambda connection, actor: record_everywhere(connection, actor, "backup"))
    _warn(summary)
    print(f"copied {data} to {arguments.out}: {_told(summary)}")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    data = read_settings(arguments).data
    try:
        summary = restore(arguments.source, data)
    except BackupError as error:
        print(f"tinsmith: {error}", file=sys.stderr)
        return 1
    log_act(data, lambda connection, actor: record_everywhere(connection, actor, "restore"))
    _warn(summary)
    print(f"restored {arguments.source} to {data}: {_told(summary)}")
    return 0


def _warn(summary: Summary) -> None:
    for key in summary.absent:
        print(f"note: the data folder lacks {key}, and so does the copy", file=sys.stderr)


def _told(summary: Summary) -> str:
    return f"{summary.files} files, {summary.size_bytes} bytes"
