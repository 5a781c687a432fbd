"""Settings: where they come from, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinsmith.engine.commands import ModelSource
from tinsmith.settings import SHIPPED_MODEL, Settings, SettingsError, load, parse_bytes, parse_model


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tinsmith.toml"
    file.write_text('host = "file"\nport = 1\nmax_rank = 7\n')
    settings = load({"host": "flag", "port": None}, {"TINSMITH_PORT": "2", "TINSMITH_HOST": "env"}, file)
    assert (settings.host, settings.port, settings.max_rank) == ("flag", 2, 7)
    assert load({}, {"TINSMITH_CONFIG": str(file)}).host == "file"


def test_a_switch_is_off_and_has_many_words_for_on(tmp_path: Path) -> None:
    assert not load({}, {}).trust_remote_code
    for text, on in (("1", True), ("True", True), ("yes", True), ("0", False), ("off", False)):
        assert load({}, {"TINSMITH_TRUST_REMOTE_CODE": text}).trust_remote_code == on
    (tmp_path / "t.toml").write_text("trust_remote_code = true")
    assert load({}, {}, tmp_path / "t.toml").trust_remote_code
    assert not load({"trust_remote_code": False}, {}, tmp_path / "t.toml").trust_remote_code


def test_without_a_model_the_one_that_ships_is_served() -> None:
    assert [model.name for model in load({}, {}).models] == [SHIPPED_MODEL]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TINSMITH_PROT": "1"}, "TINSMITH_PROT"),
        ({"TINSMITH_PORT": "x"}, "port: must be a number"),
        ({"TINSMITH_PORT": "70000"}, "port: must be at least 0 and at most 65535"),
        ({"TINSMITH_PORT": "1.5"}, "port"),
        ({"TINSMITH_DEVICE": "tpu"}, "device: must be one of auto, cpu, cuda"),
        ({"TINSMITH_MEMORY": "much"}, "512MB"),
        ({"TINSMITH_GAP_TIMEOUT": "0"}, "gap_timeout"),
        ({"TINSMITH_MODELS": "a:b=/"}, "colon"),
        ({"TINSMITH_ROOT_PATH": "x"}, "slash"),
        ({"TINSMITH_TRUST_REMOTE_CODE": "maybe"}, "trust_remote_code: must be true or false, not 'maybe'"),
    ],
)
def test_what_is_unknown_or_wrong_is_an_error_that_says_what_would_be_right(
    environment: dict[str, str], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        load({}, environment)


def test_an_unknown_setting_in_the_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text("prot = 1")
    with pytest.raises(SettingsError, match="'prot'"):
        load({}, {}, file)
    file.write_text("nonsense")
    with pytest.raises(SettingsError, match="TOML"):
        load({}, {}, file)
    with pytest.raises(SettingsError, match="No such file"):
        load({}, {}, tmp_path / "none.toml")


def test_models_are_names_with_or_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert parse_model("org/local") == ModelSource("org/local", str(tmp_path / "org" / "local"))
    assert parse_model("org/hub") == ModelSource("org/hub", "org/hub")
    assert parse_model("any=org/local") == ModelSource("any", str(tmp_path / "org" / "local"))
    for wrong in ("", "=x", "a=", "a=no/such/folder", "a:b", "no-such-folder"):
        with pytest.raises(SettingsError, match="model: "):
            parse_model(wrong)


def test_one_name_cannot_be_two_models(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="twice"):
        load({"models": [f"a={tmp_path}", f"a={tmp_path}"]}, {})


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("512MB", 512 * 2**20), ("8 GiB", 8 * 2**30), ("1.5g", 3 * 2**29), ("2k", 2048)],
)
def test_bytes_have_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_the_defaults_are_sound() -> None:
    assert Settings().check().host == "127.0.0.1"
