"""tinsmith usage: what was used, by whom, and what it costs."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TextIO

from tinsmith.service.metering import StorageMeter
from tinsmith.service.prices import KINDS, PricesError, PriceTable, gigabyte_hours, plain
from tinsmith.service.reports import ATTRIBUTES, PERIODS, Row, add_up, entries, total
from tinsmith.settings import SettingsError
from tinsmith.store import ledger, reading
from tinsmith.store.scope import SERVER

from .options import add_settings, read_settings

_COLUMNS = ("train", "prefill", "cached_prefill", "sample", "checkpoints", "gb_hours", "cost_usd")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("usage", help="show what was used and what it costs")
    parser.add_argument(
        "--by",
        default="org,model",
        metavar="LIST",
        help=f"what to add up by: of {', '.join((*PERIODS, *ATTRIBUTES))} (default: org,model)",
    )
    parser.add_argument("--since", metavar="TIME", help="first hour, in UTC (default: this month's first)")
    parser.add_argument("--until", metavar="TIME", help="end, in UTC (default: now)")
    for name in ATTRIBUTES:
        parser.add_argument(f"--{name}", metavar="NAME", help=f"only of this {name}, by id or name")
    parser.add_argument("--kind", choices=KINDS, help="only usage of this kind")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", metavar="FILE", help="write CSV into FILE (- for the terminal)")
    form.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, only=("data", "prices"))
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    by = [name.strip() for name in arguments.by.split(",") if name.strip()]
    for name in by:
        if name not in (*PERIODS, *ATTRIBUTES):
            raise SettingsError(f"by: {name!r} is not known; use of {', '.join((*PERIODS, *ATTRIBUTES))}")
    since, until = _window(arguments)
    only = {name: value for name in (*ATTRIBUTES, "kind") if (value := getattr(arguments, name)) is not None}
    settings = read_settings(arguments)
    try:
        prices = PriceTable.read(settings.prices)
    except PricesError as error:
        raise SettingsError(f"prices: {error}") from None
    storage = StorageMeter(prices)
    try:
        with reading.read_only(settings.data / reading.FILE) as connection:
            found = entries(connection, SERVER, storage, since, until)
            names = ledger.names(connection)
    except reading.NoDatabase as error:
        raise SettingsError(f"data: {error}") from None
    rows = add_up(found, by, only, names)
    if arguments.csv is not None:
        _csv(arguments.csv, by, rows)
    elif arguments.json:
        print(json.dumps([_record(by, row) for row in rows], indent=2, ensure_ascii=False))
    else:
        _table(by, rows)
    return 0


def _window(arguments: argparse.Namespace) -> tuple[float, float]:
    now = datetime.now(UTC)
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    since = month.timestamp() if arguments.since is None else _moment("since", arguments.since)
    until = time.time() if arguments.until is None else _moment("until", arguments.until)
    if until <= since:
        raise SettingsError("until: must be after --since")
    return ledger.hour_of(since), until


def _moment(name: str, text: str) -> float:
    """A date or a time, in UTC where it does not say otherwise; or so many days ago, as 7d."""
    try:
        if text.endswith("d"):
            return (datetime.now(UTC) - timedelta(days=int(text[:-1]))).timestamp()
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise SettingsError(
            f"{name}: must be a time such as 2026-07-13T06:00, a date, or 7d for a week ago, not {text!r}"
        ) from None


def _figures(row: Row) -> list[str]:
    """One for each of _COLUMNS, exact."""
    counts = row.quantities
    tokens = [str(counts[kind]) for kind in ("train", "prefill", "cached_prefill", "sample", "checkpoint")]
    return [*tokens, plain(gigabyte_hours(counts["storage"])), plain(row.cost)]


def _record(by: Sequence[str], row: Row) -> dict[str, object]:
    values = dict(zip(_COLUMNS, _figures(row), strict=True))
    counts = {name: int(values[name]) for name in _COLUMNS[:5]}
    return {**dict(zip(by, row.of, strict=True)), **values, **counts, "unpriced": row.unpriced}


def _csv(where: str, by: Sequence[str], rows: Sequence[Row]) -> None:
    def write(file: TextIO) -> None:
        writer = csv.writer(file)
        writer.writerow([*by, *_COLUMNS])
        writer.writerows([*row.of, *_figures(row)] for row in rows)

    if where == "-":
        write(sys.stdout)
        return
    try:
        with Path(where).open("w", newline="") as file:
            write(file)
    except OSError as error:
        raise SettingsError(f"csv: cannot write {where}: {error.strerror}") from None
    print(f"wrote {len(rows)} rows to {where}", file=sys.stderr)


def _table(by: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows:
        print("nothing was used in that time")
        return
    whole = total(rows, len(by))
    lines = [[*by, *_COLUMNS]]
    lines += [[*row.of, *_rounded(row)] for row in rows]
    lines += [[*(("total",) if by else ()), *([""] * (len(by) - 1)), *_rounded(whole)]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.ljust(width) if i < len(by) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    if whole.unpriced:
        print("some of it had no price when it was used: see docs/billing.md", file=sys.stderr)


def _rounded(row: Row) -> list[str]:
    """For the eye: six places. The exact amounts are in --csv and --json."""
    figures = _figures(row)
    return [*figures[:5], f"{gigabyte_hours(row.quantities['storage']):.6f}", f"{row.cost:.6f}"]
