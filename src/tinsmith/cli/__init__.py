"""The command line: a command a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tinsmith import __version__
from tinsmith.settings import SettingsError

from . import (
    audit,
    backup,
    checkpoints,
    keys,
    limits,
    model,
    org,
    project,
    serve,
    session,
    status,
    team,
    telemetry,
    usage,
    user,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tinsmith", description="Tinker's API on hardware that you own.")
    parser.add_argument("--version", action="version", version=f"tinsmith {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        serve,
        org,
        user,
        team,
        project,
        keys,
        session,
        limits,
        usage,
        status,
        audit,
        telemetry,
        model,
        checkpoints,
        backup,
    ):
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                parser.error(f"{name.replace('_', '-')}: {text!a} is not valid UTF-8")
    try:
        code: int = arguments.run(arguments)
        return code
    except SettingsError as error:
        print(f"tinsmith: {error}", file=sys.stderr)
        return 2


__all__ = ["main"]
