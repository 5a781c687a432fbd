"""What a token and a stored byte cost: a table of dated entries, read from TOML.

All arithmetic is exact. Amounts are `decimal.Decimal` from the file to the answer, never floats. A rate is
written into the ledger beside what it was applied to, so that no later table changes the past. Rounding
happens in two places alone: a rate made by the rule for unlisted models has RATE_PLACES places, and the cost
of a row of storage COST_PLACES (its formula divides by 2,592 * 10^12), both half to even.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["train", "prefill", "cached_prefill", "sample", "checkpoint", "storage"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TOKEN_KINDS: tuple[Kind, ...] = ("train", "prefill", "cached_prefill", "sample")

SHIPPED = Path(__file__).parents[1] / "assets" / "prices.toml"

MILLION = Decimal(1_000_000)
GIGABYTE = 10**9
MONTH_HOURS = 720
_BYTE_SECONDS = Decimal(GIGABYTE * 3600 * MONTH_HOURS)  # of a GB-month
RATE_PLACES = Decimal("0.000001")
COST_PLACES = Decimal("0.000000000001")
_HIGHEST = Decimal(1_000_000)  # dollars: a rate above is a slip of the pen
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
_ALWAYS = float("-inf")


class PricesError(ValueError):
    """A price table that cannot be used; the message names the entry and what would be right."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Rates from a moment on (seconds since 1970), in dollars per million tokens or per GB-month."""

    since: float
    rates: Mapping[str, Decimal]


class PriceTable:
    """All prices at all times."""

    def __init__(
        self, models: Mapping[str, list[_Entry]], unlisted: list[_Entry], storage: list[_Entry]
    ) -> None:
        self._models = {name: _in_order(entries) for name, entries in models.items()}
        self._unlisted = _in_order(unlisted)
        self._storage = _in_order(storage)

    @classmethod
    def read(cls, path: Path | None = None) -> PriceTable:
        """The table in the file `path`, or the one that ships. Raises PricesError."""
        path = path or SHIPPED
        try:
            content = tomllib.loads(path.read_text(), parse_float=Decimal)
        except OSError as error:
            raise PricesError(f"cannot read the price table {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PricesError(f"{path} is no valid TOML: {error}") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str = "prices") -> PriceTable:
        """The table in parsed TOML, whose fractions are Decimals. Raises PricesError."""
        unknown = set(content) - {"model", "unlisted", "storage"}
        if unknown:
            raise PricesError(f"{where}: {min(unknown)!r} is not known here; use model, unlisted and storage")
        models: dict[str, list[_Entry]] = {}
        for index, item in enumerate(_list(content, "model", where)):
            place = f"{where}: model[{index}]"
            name = item.get("name")
            if not isinstance(name, str) or not name:
                raise PricesError(f"{place}.name: must be a model's name")
            place = f"{where}: model {name!r}"
            rest = {field: value for field, value in item.items() if field != "name"}
            rates = _rates(rest, place, needed=("prefill", "sample", "train"), more=("cached_prefill",))
            rates.setdefault("cached_prefill", _EXACT.divide(rates["prefill"], Decimal(5)))
            models.setdefault(name, []).append(_Entry(_since(item, place), rates))
        unlisted = [
            _Entry(
                _since(item, f"{where}: unlisted[{index}]"),
                _rates(
                    item,
                    f"{where}: unlisted[{index}]",
                    needed=("prefill", "cached_prefill", "sample", "train", "least", "most"),
                ),
            )
            for index, item in enumerate(_list(content, "unlisted", where))
        ]
        storage = [
            _Entry(
                _since(item, f"{where}: storage[{index}]"),
                _rates(item, f"{where}: storage[{index}]", needed=("gb_month",)),
            )
            for index, item in enumerate(_list(content, "storage", where))
        ]
        for name, entries in [*models.items(), ("unlisted", unlisted), ("storage", storage)]:
            dates = [entry.since for entry in entries]
            if len(set(dates)) != len(dates):
                raise PricesError(f"{where}: {name!r} has two entries from the same date")
        return cls(models, unlisted, storage)

    def rate(self, kind: Kind, model: str | None, active_parameters: int | None, at: float) -> Decimal | None:
        """Dollars per million tokens, or per GB-month of storage, at a time. None where nothing was
        priced yet, and for what has no price of its own (saving a checkpoint).

        `NAME:peft:N` has NAME's price unless it is listed itself. A model that is listed nowhere is priced
        by its active parameters: so much per billion of them, within the rule's bounds.
        """
        if kind == "storage":
            entry = _at(self._storage, at)
            return entry.rates["gb_month"] if entry is not None else None
        if kind == "checkpoint" or model is None:
            return None
        for name in (model, model.partition(":")[0]):
            entry = _at(self._models.get(name, []), at)
            if entry is not None:
                return entry.rates[kind]
        rule = _at(self._unlisted, at)
        if rule is None or active_parameters is None:
            return None
        return _by_parameters(rule, kind, active_parameters)


def _by_parameters(rule: _Entry, kind: Kind, active_parameters: int) -> Decimal:
    rates = rule.rates
    if kind == "cached_prefill":  # a part of prefill, and bounded as that is
        whole = _by_parameters(rule, "prefill", active_parameters)
        part = _EXACT.divide(_EXACT.multiply(whole, rates[kind]), rates["prefill"] or Decimal(1))
        return part.quantize(RATE_PLACES, context=_EXACT).normalize(_EXACT)
    billions = _EXACT.divide(Decimal(active_parameters), Decimal(10**9))
    rate = _EXACT.multiply(rates[kind], billions).quantize(RATE_PLACES, context=_EXACT)
    return min(max(rate, rates["least"]), rates["most"]).normalize(_EXACT)


def cost(kind: Kind, quantity: int, rate: Decimal | None) -> Decimal | None:
    """Dollars for one row of the ledger: `quantity` tokens, or byte-seconds of storage."""
    if rate is None:
        return None
    if kind == "storage":
        spent = _EXACT.divide(_EXACT.multiply(Decimal(quantity), rate), _BYTE_SECONDS)
        return spent.quantize(COST_PLACES, context=_EXACT)
    return _EXACT.divide(_EXACT.multiply(Decimal(quantity), rate), MILLION)


def gigabyte_hours(byte_seconds: int) -> Decimal:
    return _EXACT.divide(Decimal(byte_seconds), Decimal(GIGABYTE * 3600))


def add(left: Decimal, right: Decimal) -> Decimal:
    """Exactly, however long the two are."""
    return _EXACT.add(left, right)


def plain(amount: Decimal) -> str:
    """An amount as text, without an exponent and without zeros at its end."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


# Reading


def _list(content: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    items = content.get(name, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise PricesError(f"{where}: {name}: must be a list of tables, [[{name}]]")
    return items


def _rates(
    item: Mapping[str, Any], where: str, *, needed: tuple[str, ...], more: tuple[str, ...] = ()
) -> dict[str, Decimal]:
    unknown = set(item) - {"from", *needed, *more}
    if unknown:
        raise PricesError(
            f"{where}.{min(unknown)}: is not known here; use {', '.join((*needed, *more))} and from"
        )
    found: dict[str, Decimal] = {}
    for name in (*needed, *more):
        value = item.get(name)
        if value is None:
            if name in needed:
                raise PricesError(f"{where}.{name}: is missing")
            continue
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise PricesError(f"{where}.{name}: must be a number of dollars, not {value!r}")
        amount = Decimal(value)
        if not amount.is_finite() or not 0 <= amount <= _HIGHEST or _places(amount) > 12:
            raise PricesError(
                f"{where}.{name}: must be from 0 to {_HIGHEST} dollars with at most 12 places, not {value}"
            )
        found[name] = amount
    return found


def _places(amount: Decimal) -> int:
    exponent = amount.as_tuple().exponent
    return -exponent if isinstance(exponent, int) else 0


def _since(item: Mapping[str, Any], where: str) -> float:
    value = item.get("from")
    if value is None:
        return _ALWAYS
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    elif isinstance(value, date):
        moment = datetime(value.year, value.month, value.day, tzinfo=UTC)
    else:
        raise PricesError(f"{where}.from: must be a date such as 2027-01-01, not {value!r}")
    seconds = moment.timestamp()
    if seconds % 3600:
        raise PricesError(f"{where}.from: must be a full hour, since usage is kept by the hour; not {value}")
    return seconds


def _in_order(entries: list[_Entry]) -> list[_Entry]:
    return sorted(entries, key=lambda entry: entry.since, reverse=True)


def _at(entries: list[_Entry], when: float) -> _Entry | None:
    """The newest entry that has begun."""
    return next((entry for entry in entries if entry.since <= when), None)
