"""Every setting, its default, and where it may come from: flags, environment, file, in that order."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from tinsmith.engine.commands import ModelSource

SHIPPED_MODEL = "tinsmith/tin-5m"
SHIPPED_FOLDER = Path(__file__).parent / "assets" / "models" / "tin-5m"
_ENVIRONMENT = "TINSMITH_"
# Environment variables of ours that are no settings.
_NO_SETTINGS = {"TINSMITH_BOOTSTRAP_API_KEY", "TINSMITH_CONFIG"}


class SettingsError(ValueError):
    """A setting that is unknown or wrong; the message says which and what would be right."""


def _about(help_: str, **more: Any) -> dict[str, Any]:
    return {"help": help_, **more}


def _default_data() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "tinsmith"


@dataclass(frozen=True, slots=True)
class Settings:
    host: str = field(default="127.0.0.1", metadata=_about("address to listen on"))
    port: int = field(default=8000, metadata=_about("port to listen on", least=0, most=65535))
    data: Path = field(
        default_factory=_default_data,
        metadata=_about("folder for the database, checkpoints and everything else that is kept"),
    )
    models: tuple[ModelSource, ...] = field(
        default=(),
        metadata=_about(
            "a model to serve, NAME or NAME=PATH; may be given several times (default: the one that ships)",
            flag="model",
        ),
    )
    device: str = field(default="auto", metadata=_about("where to compute", choices=("auto", "cpu", "cuda")))
    dtype: str = field(
        default="auto", metadata=_about("in what to compute", choices=("auto", "bf16", "fp32"))
    )
    max_context: int | None = field(default=None, metadata=_about("longest sequence, in tokens", least=1))
    max_rank: int = field(default=128, metadata=_about("highest LoRA rank", least=1))
    memory: int | None = field(
        default=None,
        metadata=_about("bound for weights, adapters, caches and activations (8GB, 512MB)", bytes=True),
    )
    deterministic: bool = field(
        default=False,
        metadata=_about(
            "on a GPU: results to the last bit whatever runs beside them (a CPU always gives them)"
        ),
    )
    threads: int | None = field(default=None, metadata=_about("CPU threads of the engine", least=1))
    trust_remote_code: bool = field(
        default=False,
        metadata=_about("run modeling and tokenizer code that a model's folder brings along"),
    )
    log_level: str = field(
        default="info", metadata=_about("how much to log", choices=("debug", "info", "warning", "error"))
    )
    log_format: str = field(
        default="text", metadata=_about("lines for people, or JSON for programs", choices=("text", "json"))
    )
    open_metrics: bool = field(
        default=False, metadata=_about("let everybody read /metrics, not administrators' keys alone")
    )
    otlp_endpoint: str = field(
        default="",
        metadata=_about("OpenTelemetry collector to send traces to, such as http://localhost:4318"),
    )
    root_path: str = field(default="", metadata=_about("path below which a proxy shows the server"))
    public_url: str = field(
        default="",
        metadata=_about("the server's address as its clients see it (default: the one that a request names)"),
    )
    body_limit: int = field(
        default=256 * 2**20,
        metadata=_about("largest request body, after decompression (256MB)", bytes=True, least=1024),
    )
    upload_limit: int = field(
        default=16 * 2**30,
        metadata=_about("largest file of weights that are uploaded (16GB)", bytes=True, least=1024),
    )
    gap_timeout: float = field(
        default=600.0,
        metadata=_about(
            "seconds after which a training request that never came counts as refused", least=0.1
        ),
    )
    heartbeat_timeout: float = field(
        default=600.0,
        metadata=_about("seconds of silence after which a client's memory is released", least=0.1),
    )
    snapshot_every: float = field(
        default=30.0,
        metadata=_about(
            "seconds of a run's training after which its state is written down for a replay after a crash",
            least=0.0,
        ),
    )
    result_ttl: float = field(
        default=3600.0, metadata=_about("seconds for which a result that was fetched is kept", least=1.0)
    )
    trace_ttl: float = field(
        default=30 * 86400.0,
        metadata=_about("seconds for which it is kept when a session's requests came and ran", least=1.0),
    )
    trace_limit: int = field(
        default=256 * 2**20,
        metadata=_about(
            "bytes that this may take of the database; the oldest goes first", bytes=True, least=0
        ),
    )
    telemetry_ttl: float = field(
        default=30 * 86400.0,
        metadata=_about("seconds for which it is kept what clients tell of themselves", least=1.0),
    )
    telemetry_events: int = field(
        default=20_000,
        metadata=_about(
            "events of each organization that are kept of it; the oldest go first, 0 keeps none",
            least=0,
            most=10_000_000,
        ),
    )
    poll_hold: float = field(
        default=35.0,
        metadata=_about("seconds for which a request for a pending result is held", least=0.1, most=40.0),
    )
    prices: Path | None = field(
        default=None, metadata=_about("price table, a TOML file (default: the one that ships)")
    )
    grace: float = field(
        default=30.0, metadata=_about("seconds that a stopping server gives to what it is doing", least=0.0)
    )

    def check(self) -> Settings:
        """Refuse what cannot work before anything is started."""
        for name in {source.name for source in self.models}:
            if sum(source.name == name for source in self.models) > 1:
                raise SettingsError(f"model: the name {name!r} is given twice")
        if self.root_path and not self.root_path.startswith("/"):
            raise SettingsError(f"root_path: must begin with a slash, not {self.root_path!r}")
        if self.public_url and not self.public_url.startswith(("http://", "https://")):
            raise SettingsError(f"public_url: must begin with http:// or https://, not {self.public_url!r}")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise SettingsError(
                f"otlp_endpoint: must begin with http:// or https://, not {self.otlp_endpoint!r}"
            )
        return self


def load(flags: Mapping[str, object], environment: Mapping[str, str], config: Path | None = None) -> Settings:
    """The settings that `flags` give, else the environment, else the TOML file, else the defaults."""
    known = {item.name: item for item in fields(Settings)}
    values: dict[str, object] = {}
    if config is None and environment.get("TINSMITH_CONFIG"):
        config = Path(environment["TINSMITH_CONFIG"])
    if config is not None:
        for name, value in _read_file(config).items():
            if name not in known:
                raise SettingsError(f"{config}: unknown setting {name!r}; known are: {', '.join(known)}")
            values[name] = value
    for variable, text in environment.items():
        if not variable.startswith(_ENVIRONMENT) or variable in _NO_SETTINGS:
            continue
        name = variable.removeprefix(_ENVIRONMENT).lower()
        if name not in known:
            names = ", ".join(_ENVIRONMENT + item.upper() for item in known)
            raise SettingsError(f"unknown setting {variable} in the environment; known are: {names}")
        values[name] = text
    values.update({name: value for name, value in flags.items() if value is not None})
    types = get_type_hints(Settings)
    read: dict[str, Any] = {
        name: _read(name, value, types[name], known[name].metadata) for name, value in values.items()
    }
    settings = Settings(**read)
    if not settings.models:
        settings = Settings(**{**read, "models": (ModelSource(SHIPPED_MODEL, str(SHIPPED_FOLDER)),)})
    return settings.check()


def parse_model(text: str) -> ModelSource:
    """NAME or NAME=PATH. A NAME alone is a folder of that name if there is one, else a hub id."""
    name, separator, path = text.partition("=")
    if not name or (separator and not path):
        raise SettingsError(f"model: {text!r} must be NAME or NAME=PATH")
    if ":" in name:
        raise SettingsError(f"model: the name {name!r} has a colon; Tinker's names have none")
    if not path:
        if name == SHIPPED_MODEL:
            return ModelSource(name, str(SHIPPED_FOLDER))
        path = str(Path(name).resolve()) if Path(name).is_dir() else name
    elif not Path(path).expanduser().is_dir():
        raise SettingsError(f"model: there is no folder {path!r} (for the model {name!r})")
    else:
        path = str(Path(path).expanduser().resolve())
    if not Path(name).is_dir() and "/" not in name and not separator:
        raise SettingsError(
            f"model: there is no folder {name!r}, and a hub id has the form org/name; give NAME=PATH"
        )
    return ModelSource(name, path)


def parse_bytes(text: str) -> int:
    """A number of bytes, with or without a unit: 512MB, 8 GiB, 1000000."""
    number = text.strip().upper().removesuffix("B").removesuffix("I").strip()
    power = "KMGT".find(number[-1:]) + 1 if number[-1:].isalpha() else 0
    try:
        value = float(number[:-1] if power else number) * 1024**power
    except ValueError:
        raise SettingsError(f"{text!r} is no number of bytes; write 512MB or 8GB") from None
    return int(value)


def _read_file(config: Path) -> dict[str, object]:
    try:
        return tomllib.loads(config.read_text())
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {config}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{config} is no valid TOML: {error}") from None


def _read(name: str, value: object, wanted: Any, metadata: Mapping[str, Any]) -> object:
    """One setting, from whatever type its source has, checked."""
    if name == "models":
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise SettingsError("models: must be a list of NAME or NAME=PATH")
        return tuple(
            item if isinstance(item, ModelSource) else parse_model(str(item).strip()) for item in items
        )
    if metadata.get("bytes"):
        number: float = parse_bytes(value) if isinstance(value, str) else _number(name, value, int)
    elif wanted is bool:
        return _switch(name, value)
    elif wanted in (Path, Path | None):
        return Path(str(value)).expanduser()
    elif wanted is str:
        choices = metadata.get("choices")
        if choices and value not in choices:
            raise SettingsError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")
        return str(value)
    else:
        number = _number(name, value, float if wanted is float else int)
    least, most = metadata.get("least"), metadata.get("most")
    if (least is not None and number < least) or (most is not None and number > most):
        limits = f"at least {least}" + (f" and at most {most}" if most is not None else "")
        raise SettingsError(f"{name}: must be {limits}, not {number}")
    return number


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        raise SettingsError(f"{name}: must be true or false, not {value!r}")
    return text in ("true", "1", "yes", "on")


def _number(name: str, value: object, kind: type[int] | type[float]) -> float:
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(str(value))
    except (TypeError, ValueError):
        raise SettingsError(f"{name}: must be a number, not {value!r}") from None
