"""The price table: what is listed, what the rule makes of the rest, and that nothing is a float."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from tinsmith.service.prices import PricesError, PriceTable, cost, gigabyte_hours, plain

NOW = datetime(2026, 11, 5, tzinfo=UTC).timestamp()


def table(text: str) -> PriceTable:
    return PriceTable.parse(tomllib.loads(text, parse_float=Decimal))


def test_the_table_that_ships_has_the_published_shape() -> None:
    shipped = PriceTable.read()
    assert shipped.rate("prefill", "meta-llama/Llama-3.2-1B", None, NOW) == Decimal("0.03")
    assert shipped.rate("sample", "moonshotai/Kimi-K2.6:peft:131072", None, NOW) == Decimal("12.81")
    assert shipped.rate("storage", None, None, NOW) == Decimal("0.10")
    rates = [
        rate
        for name in shipped._models
        for kind in ("prefill", "sample", "train")
        if (rate := shipped.rate(kind, name, None, NOW)) is not None  # type: ignore[arg-type]
    ]
    assert (min(rates), max(rates)) == (Decimal("0.03"), Decimal("12.81"))
    # A token from the cache costs a fifth.
    assert shipped.rate("cached_prefill", "Qwen/Qwen3-8B", None, NOW) == Decimal("0.026")


def test_a_context_suffix_has_its_own_price_or_that_of_the_name_before_it() -> None:
    shipped = PriceTable.read()
    assert shipped.rate("train", "openai/gpt-oss-120b:peft:131072", None, NOW) == Decimal("1.82")
    assert shipped.rate("train", "Qwen/Qwen3-8B:peft:131072", None, NOW) == Decimal("0.40")


@pytest.mark.parametrize(
    ("active", "kind", "dollars"),
    [
        (5_000_000, "train", "0.03"),  # not less than
        (5_000_000, "cached_prefill", "0.006"),
        (8_000_000_000, "prefill", "0.124"),
        (8_000_000_000, "cached_prefill", "0.0248"),
        (8_030_261_248, "sample", "0.373407"),  # 0.0465 x 8.030261248 = 0.373407148...
        (1_000_000_000_000, "sample", "12.81"),  # not more than
    ],
)
def test_an_unlisted_model_is_priced_by_its_active_parameters(active: int, kind: str, dollars: str) -> None:
    rate = PriceTable.read().rate(kind, "somebody/else", active, NOW)  # type: ignore[arg-type]
    assert rate == Decimal(dollars)


def test_a_dated_entry_holds_from_its_date_and_changes_nothing_before() -> None:
    prices = table("""
        [[model]]
        name = "a/b"
        prefill = 1
        sample = 2.5
        train = 3

        [[model]]
        name = "a/b"
        from = 2027-01-01
        prefill = 10
        cached_prefill = 9
        sample = 20
        train = 30

        [[storage]]
        from = 2027-01-01T06:00:00Z
        gb_month = 0.2
    """)
    new_year = datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    assert prices.rate("train", "a/b", None, new_year - 1) == 3
    assert prices.rate("train", "a/b", None, new_year) == 30
    assert prices.rate("cached_prefill", "a/b", None, new_year - 1) == Decimal("0.2")
    assert prices.rate("cached_prefill", "a/b", None, new_year) == 9
    assert prices.rate("storage", None, None, new_year) is None
    assert prices.rate("storage", None, None, new_year + 6 * 3600) == Decimal("0.2")
    assert prices.rate("train", "not/listed", 10**9, new_year) is None  # and there is no rule
    assert prices.rate("checkpoint", "a/b", None, new_year) is None


def test_costs_are_exact() -> None:
    assert cost("train", 1, Decimal("0.03")) == Decimal("0.00000003")
    assert cost("sample", 10**15 + 1, Decimal("12.81")) == Decimal("12810000000.00001281")
    assert sum(cost("prefill", 1, Decimal("0.1")) or 0 for _ in range(10)) == Decimal("0.000001")
    # A gigabyte for a month of 720 hours.
    assert cost("storage", 10**9 * 3600 * 720, Decimal("0.10")) == Decimal("0.10")
    assert gigabyte_hours(10**9 * 3600) == 1
    # What does not come out even is rounded to 12 places, half to even.
    assert cost("storage", 10**9 * 3600, Decimal("0.10")) == Decimal("0.000138888889")
    assert cost("train", 5, None) is None
    assert (plain(Decimal("0.10")), plain(Decimal("1E+2")), plain(Decimal("3E-8"))) == (
        "0.1",
        "100",
        "0.00000003",
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[modle]]\n", "'modle' is not known"),
        ("model = 3", r"model: must be a list of tables, \[\[model\]\]"),
        ("[[model]]\nprefill = 1", r"model\[0\].name"),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1', "model 'a'.train: is missing"),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = "1"', "train: must be a number"),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = true', "train: must be a number"),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = -1', "train: must be from 0"),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = nan', "train: must be from 0"),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = 1e-13', "at most 12 places"),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = 1\nfrom = "soon"', "from: must be a date"),
        (
            '[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = 1\nfrom = 2027-01-01T00:30:00Z',
            "full hour",
        ),
        ('[[model]]\nname = "a"\nprefill = 1\nsample = 1\ntrain = 1\noutput = 2', "output: is not known"),
        ("[[storage]]\ngb_month = 1\n[[storage]]\ngb_month = 2", "two entries from the same date"),
        ("[[storage]]\ngb_month = 1e9", "storage.*gb_month: must be from 0"),
        ("[[unlisted]]\nprefill = 1", "cached_prefill: is missing"),
    ],
)
def test_a_table_that_is_wrong_says_where_and_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(PricesError, match=says):
        table(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PricesError, match="No such file"):
        PriceTable.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("= 3")
    with pytest.raises(PricesError, match=r"bad.toml is no valid TOML"):
        PriceTable.read(tmp_path / "bad.toml")
