"""A table from a TOML file, checked against a pydantic model: what is wrong with it in one sentence."""

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedsb.errors import ConfigError

TYPE = re.compile(r"(constrained-)?(int|float|str|bool)|(literal|tuple)\[.*\]")  # in the location of a union's error
Checked = TypeVar("Checked", bound=BaseModel)


def read_toml(path: Path, where: str, remedy: str = "name a readable TOML file") -> dict[str, Any]:
    """The table in a TOML file. Raises ConfigError, which begins with `where`."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: cannot be read ({error}); {remedy}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: is not valid TOML ({error}); mend that line") from None


def set_key(table: dict[str, Any], override: str) -> None:
    """Apply `section.key=value`, whose value is TOML or a plain word, to a table. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: has no value; write --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a plain word: --set adapter.method=lora-sb
    set_value(table, key.strip(), value, f"--set {override}")


def set_value(table: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put a value at `section.key`. Raises ConfigError."""
    *sections, name = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {section} is not a section; `fedsb simulate --help` shows the form")
    table[name] = value


def validated(model: type[Checked], table: dict[str, Any], where: str, page: str = "docs/configuration.md") -> Checked:
    """The table as an instance of a pydantic model.

    Raises ConfigError: one sentence with the key, what is wrong and what to do; `page` lists the keys that there are.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")  # a misspelt key is missing too
        first, key = faults[0], _key(faults[0]["loc"])
        allowed = [fault["msg"] for fault in faults if _key(fault["loc"]) == key]  # one for each type that it may have
        keys = _keys_at(model, first["loc"][:-1]) if first["type"] == "extra_forbidden" else []
        said = _sentence(first["type"], first["loc"], " or ".join(allowed), first.get("input"), keys, page)
        raise ConfigError(f"{where}: {said}") from None


def _key(location: tuple[int | str, ...]) -> str:
    """A pydantic location as a key of the file, without the names of the types that were tried."""
    return ".".join(str(part) for part in location if not TYPE.fullmatch(str(part)))


def _sentence(kind: str, location: tuple[int | str, ...], message: str, value: object, keys: Sequence[str], page: str) -> str:
    """One pydantic error as one sentence: the key, what is wrong, what to do."""
    key = _key(location)
    if kind == "extra_forbidden":
        *parents, name = location
        near = difflib.get_close_matches(str(name), keys, n=1)
        remedy = f"did you mean {'.'.join([*map(str, parents), near[0]])}?" if near else f"{page} lists them all"
        return f"{key} is not a setting; {remedy}"
    if kind == "missing":
        return f"{key} is missing; set it"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return f"{key} = {value!r} will not do: {message[0].lower()}{message[1:]}; change it"


def _keys_at(model: type[BaseModel], parents: tuple[int | str, ...]) -> list[str]:
    section = model
    for parent in (part for part in parents if isinstance(part, str)):
        annotation = section.model_fields[parent].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
