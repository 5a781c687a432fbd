"""tinsmith model: where a model's files are, and what it would take to serve it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.settings import SHIPPED_MODEL, SettingsError, load, parse_model

from .options import add_settings, read_settings

if TYPE_CHECKING:
    from tinsmith.engine.model.describe import Description


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("model", aliases=["models"], help="look at models")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    path = actions.add_parser("path", help="print the folder of a model's tokenizer and weights")
    path.add_argument("name", nargs="?", default=SHIPPED_MODEL, help=f"default: {SHIPPED_MODEL}")
    add_settings(path, only=("models",))
    path.set_defaults(run=_path)
    check = actions.add_parser(
        "check", help="say from a model's config alone whether and how it would be served; no weights needed"
    )
    check.add_argument(
        "name",
        metavar="NAME|PATH",
        help="a model of the settings, a folder in Hugging Face layout, or a hub id",
    )
    check.add_argument("--rank", type=int, default=32, help="of the adapters to plan with (default: 32)")
    check.add_argument("--json", action="store_true", help="print it as JSON, sizes in bytes")
    add_settings(check, only=("models", "device", "dtype", "memory", "trust_remote_code"))
    check.set_defaults(run=_check)


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


def _check(arguments: argparse.Namespace) -> int:
    """0 if it fits, 1 if it does not or cannot be served at all."""
    from transformers.utils.logging import set_verbosity_error

    from tinsmith.engine.model.base import ModelError
    from tinsmith.engine.model.describe import describe

    set_verbosity_error()  # which kernels it would like to have is not the question
    settings = read_settings(arguments)
    if arguments.rank < 1:
        raise SettingsError(f"rank: must be at least 1, not {arguments.rank}")
    sources = {source.name: source for source in settings.models}
    source = sources.get(arguments.name) or parse_model(arguments.name)
    try:
        found = describe(
            source.name,
            source.path,
            settings.device,
            settings.dtype,
            memory=settings.memory,
            rank=arguments.rank,
            trust_remote_code=settings.trust_remote_code,
        )
    except ModelError as error:
        print(f"tinsmith: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found.as_dict(), indent=2) if arguments.json else _page(found))
    return 0 if found.fits else 1


def _page(found: Description) -> str:
    cache = f"{_size(found.cache_bytes_per_1k_tokens)} per 1,000 tokens"
    if found.state_bytes_per_sequence:
        cache += f", and {_size(found.state_bytes_per_sequence)} of state per sequence"
    beside = found.active_parameters - found.embedding_parameters
    lines = {
        "architecture": found.architecture,
        "parameters": f"{_count(found.parameters)}, {_count(found.active_parameters)} active per token"
        + (f" ({_count(beside)} beside the embedding)" if found.embedding_parameters else ""),
        "weights": f"{_size(found.weights_bytes)} in {found.dtype}"
        + (f", from {found.quantized}" if found.quantized else ""),
        "adapter": f"{_count(found.adapter_parameters)} parameters at rank {found.rank}: "
        f"{_size(found.adapter_bytes)} with gradient and moments, {_size(found.sampler_bytes)} as a sampler",
        "cache": cache,
        "context": f"{found.max_context} tokens",
        "path": {
            "packed": "packed training, paged cache",
            "packed, recurrent": "packed training and paged cache; recurrent layers in padded batches",
            "generic": "transformers' own attention and cache, sequences apart",
        }[found.way],
        "images": "yes, if its vision tower is one that this server knows" if found.images else "no",
        "fits": f"{'yes' if found.fits else 'no'}: {_size(found.device_bytes)} to plan with on "
        f"{found.device}{'' if found.fits else '; ' + found.why_not}",
    }
    return "\n".join([found.name, *(f"  {name:<13} {text}" for name, text in lines.items())])


def _count(number: int) -> str:
    for unit, power in (("T", 12), ("B", 9)):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {unit}"
    return f"{number / 1e6:.2f} M"


def _size(number: int) -> str:
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if number >= 10**power:
            return f"{number / 10**power:.1f} {unit}"
    return f"{number / 1000:.1f} kB"
