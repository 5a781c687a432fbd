"""tinsmith status: what a server is doing, once or live."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from tinsmith.settings import SettingsError

_CLEAR = "\x1b[H\x1b[J"
_BLANK = "\u00a0"  # within what belongs on one line


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("status", help="show what a running server is doing")
    parser.add_argument(
        "--url", help="the server's address (default: TINKER_BASE_URL, else http://127.0.0.1:8000)"
    )
    parser.add_argument("--key", help="an administrator's key (default: TINKER_API_KEY)")
    parser.add_argument("--once", action="store_true", help="print it once instead of every two seconds")
    parser.add_argument("--json", action="store_true", help="print JSON, a line each time")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    url = arguments.url or os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000"
    key = arguments.key or os.environ.get("TINKER_API_KEY") or ""
    terminal = sys.stdout.isatty()
    clear = _CLEAR if terminal and not arguments.once else ""
    before: Mapping[str, Any] | None = None
    try:
        while True:
            try:
                now = _ask(url, key)
            except SettingsError as error:
                if before is None:
                    raise
                print(f"{clear}tinsmith: {error}; it is tried again", file=sys.stderr, flush=True)
            else:
                if arguments.json:
                    print(json.dumps(now), flush=True)
                else:
                    width = shutil.get_terminal_size().columns if terminal else None
                    print(clear + page(now, before, width), flush=True)
                if arguments.once:
                    return 0
                before = now
            time.sleep(2.0)
    except KeyboardInterrupt:
        return 0


def _ask(url: str, key: str) -> dict[str, Any]:
    """Raises SettingsError, which says what is wrong."""
    address = f"{url.rstrip('/')}/api/v1/status"
    try:
        request = urllib.request.Request(address, headers={"X-API-Key": key})
        with urllib.request.urlopen(request, timeout=30.0) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except urllib.error.HTTPError as error:
        raise SettingsError(f"{address} answers {error.code}: {_detail(error)}") from None
    except OSError as error:
        raise SettingsError(f"{address} cannot be reached: {getattr(error, 'reason', error)}") from None
    except UnicodeEncodeError:
        raise SettingsError("key: is no API key; they are plain ASCII") from None
    except (ValueError, http.client.HTTPException):
        raise SettingsError(f"{address} is not the address of a Tinsmith server") from None


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def page(now: Mapping[str, Any], before: Mapping[str, Any] | None = None, width: int | None = None) -> str:
    """The figures for the eye; with those of a moment before, what has happened since. No line is longer
    than `width`."""
    lines = _lines(now, before)
    if width is not None:
        lines = [
            line
            for long in lines
            for line in textwrap.wrap(long, width, subsequent_indent=" " * 10, break_on_hyphens=False)
        ]
    return "\n".join(lines).replace(_BLANK, " ")


def _lines(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    engine = now["engine"]
    state = "ready" if now["ready"] else "not ready"
    lines = [
        f"tinsmith {now['version']}  {state}  up {_span(now['uptime_seconds'])}  engine life"
        f" {now['generation']}  {now['device'] or ''}",
        f"models    {', '.join(now['models'])}",
        f"runs      {_counts(now['runs'])}",
        f"queues    {_counts(now['queues'])}",
        f"metered   {_counts(now['metered'])}",
    ]
    if not engine:
        return [*lines, "engine    has not answered"]
    tokens = engine["tokens"]
    prompt = tokens["prefill"] + tokens["cached_prefill"]
    hits = f", {100 * tokens['cached_prefill'] / prompt:.1f}% of prompts from the cache" if prompt else ""
    lines.append(f"computed  {_counts(tokens)}{hits}")
    if before is not None and before["engine"] and before["generation"] == now["generation"]:
        seconds = now["uptime_seconds"] - before["uptime_seconds"]
        if seconds > 0:
            rates = {
                kind: round((n - before["engine"]["tokens"][kind]) / seconds) for kind, n in tokens.items()
            }
            lines.append(f"per s     {_counts(rates)}")
    for name, figures in engine["histograms"].items():
        count = sum(figures["counts"])
        if count:
            mean, unit = figures["sum"] / count, ""
            if name.endswith("_seconds"):
                mean, unit = 1000 * mean, " ms"
            lines.append(f"{name.removesuffix('_seconds'):18}  mean {mean:.4g}{unit} of {count:,}")
    used, budget = engine["adapter_bytes"], engine["adapter_budget_bytes"]
    lines.append(
        f"memory    models {_bytes(engine['model_bytes'])}, adapters {_bytes(used)} of {_bytes(budget)},"
        f" cache {_bytes(engine['cache_used_bytes'])} of {_bytes(engine['cache_budget_bytes'])}"
    )
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return "  ".join(f"{name}{_BLANK}{count:,}" for name, count in counts.items()) or "none"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _bytes(number: float) -> str:
    units = ["B", "KB", "MB", "GB", "TB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        del units[0]
    return f"{number:.1f} {units[0]}"
