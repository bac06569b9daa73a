"""A command's settings as JSON and back: every run saves them, `--config` and the planner read them."""

import dataclasses
import types
import typing
from pathlib import Path

from soul.errors import UserError


def config_from_json(cls: type, values: object, where: str) -> object:
    """A config dataclass from what `config_to_json` wrote; an unknown or missing key is a UserError naming it."""
    if not isinstance(values, dict):
        raise UserError("must hold a JSON object of settings", where=where)
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown setting {unknown[0]!r}", where=where, fix=f"Settings are: {', '.join(sorted(known))}.")
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise UserError(f"setting {missing[0]!r} is missing", where=where)
    return cls(**{key: _typed(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _typed(hint: object, value: object, where: str) -> object:
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    option = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(option):
        return config_from_json(option, value, where)
    if option is Path:
        return Path(str(value))
    if typing.get_origin(option) is tuple or option is tuple:
        return tuple(Path(v) if Path in typing.get_args(option) else v for v in value)
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if option in (int, float, str, bool) and type(value) is not option:
        raise UserError(f"must be {option.__name__}, not {value!r}", where=where)
    return value


def config_to_json(config: object) -> object:
    if dataclasses.is_dataclass(config):
        return {field.name: config_to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [config_to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config
