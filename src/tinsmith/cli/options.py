"""Settings as command-line flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from tinsmith.settings import Settings, load


def add_settings(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """A flag for every setting, or for those in `only`. Their values are read by tinsmith.settings."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="read settings from this TOML file")
    for setting in fields(Settings):
        if only is not None and setting.name not in only:
            continue
        flag = "--" + setting.metadata.get("flag", setting.name).replace("_", "-")
        choices = setting.metadata.get("choices")
        if isinstance(setting.default, bool):
            parser.add_argument(
                flag,
                dest=setting.name,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=setting.metadata["help"],
            )
            continue
        parser.add_argument(
            flag,
            dest=setting.name,
            action="append" if setting.name == "models" else "store",
            metavar=None if choices else setting.metadata.get("flag", setting.name).upper(),
            choices=choices,
            help=setting.metadata["help"],
        )


def read_settings(arguments: argparse.Namespace) -> Settings:
    flags = {item.name: getattr(arguments, item.name, None) for item in fields(Settings)}
    return load(flags, os.environ, arguments.config)
