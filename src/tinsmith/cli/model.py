"""tinsmith model: where a model's files are."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinsmith.settings import SHIPPED_MODEL, load, parse_model

from .options import add_settings, read_settings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("model", help="look at models")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    path = actions.add_parser("path", help="print the folder of a model's tokenizer and weights")
    path.add_argument("name", nargs="?", default=SHIPPED_MODEL, help=f"default: {SHIPPED_MODEL}")
    add_settings(path, only=("models",))
    path.set_defaults(run=_path)


def _path(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments) if arguments.models or arguments.config else load({}, {})
    sources = {source.name: source for source in settings.models}
    source = sources.get(arguments.name) or parse_model(arguments.name)
    if Path(source.path).is_dir():
        print(source.path)
        return 0
    from huggingface_hub import snapshot_download

    try:
        print(snapshot_download(source.path, local_files_only=True))
    except Exception:
        print(
            f"tinsmith: {arguments.name!r} is not on this machine; serve it once, or give --model NAME=PATH",
            file=sys.stderr,
        )
        return 1
    return 0
