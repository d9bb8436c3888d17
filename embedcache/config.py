"""Checks that every configuration shares: types, ranges and unknown names.

A configuration is a frozen, keyword-only dataclass that inherits from `Config`. Its annotations
state types and ranges; pydantic checks them when the configuration is made:

    @dataclass(frozen=True, slots=True, kw_only=True, repr=False)
    class Shape(Config):
        width: Count = 64

`check` is the place for rules between fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from functools import cache
from os import PathLike, fspath
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from embedcache.errors import UsageError, nearest


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _names(value: object) -> object:
    """Take one name for a sequence of one, and paths for their text."""
    if isinstance(value, str | PathLike):
        value = (value,)
    if not isinstance(value, Sequence):
        return value
    return tuple(fspath(item) if isinstance(item, PathLike) else item for item in value)


Integer = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
"""An integer of at least 1."""
Size = Annotated[int, Field(strict=True, ge=0)]
"""An integer of at least 0."""
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = Annotated[float, BeforeValidator(_not_a_bool), Field(allow_inf_nan=False)]
"""A finite number; its text, such as ``"2e-3"`` (a string to YAML), is one, too."""
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
"""A number in [0, 1)."""
Flag = Annotated[bool, Field(strict=True)]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_names)]
"""Names or paths, in order; one alone may stand for a tuple of one."""


class Config:
    """Base of the configuration dataclasses. Raises ``UsageError`` for values that do not fit."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        """Check and convert every field, then call `check`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        try:
            checked = _model(type(self)).model_validate(values)  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            name = first["loc"][0]
            problem = first["msg"].replace("Value error, ", "").replace("Input should", "should")
            value = values[str(name)]
            hint = nearest(str(value), re.findall("'(.*?)'", problem))
            raise UsageError(f"`{name}=` {problem}, found {value!r}.{hint}") from None
        for name in values:
            object.__setattr__(self, name, getattr(checked, name))
        self.check()

    def check(self) -> None:
        """Raise ``UsageError`` for fields that contradict each other."""

    def __repr__(self) -> str:
        """Return the fields that differ from their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != _default(field)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as values that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from values by name, as `to_dict` returns them.

        Raises ``UsageError`` for a name that is unknown or missing, naming the nearest known one.
        """
        if not isinstance(values, Mapping):
            raise UsageError(
                f"{cls.__name__} is made of names and values, such as a table; found {values!r}"
            )
        check_names(values, cls)
        for field in fields(cls):
            if _default(field) is MISSING and field.name not in values:
                raise UsageError(f"{cls.__name__} needs `{field.name}=`, found none")
        return cls(**values)


def check_names(values: Mapping[str, Any], *classes: type[Config]) -> None:
    """Raise ``UsageError`` for a name that is a field of none of the configurations."""
    known = [field.name for cls in classes for field in fields(cls)]
    for name in values:
        if name not in known:
            of = " or ".join(cls.__name__ for cls in classes)
            raise UsageError(
                f"`{name}=` is no setting of {of}.{nearest(str(name), known)} "
                f"Known: {', '.join(known)}"
            )


def split_settings(
    settings: Mapping[str, Any], *classes: type[Config]
) -> tuple[dict[str, Any], ...]:
    """Return settings by the configuration that has a field of that name, the first of them.

    Raises ``UsageError`` for a name that is a field of none.

    >>> from embedcache.corpus.config import CorpusConfig
    >>> from embedcache.training.config import TrainConfig
    >>> split_settings({"lr": 1e-3, "context": 512}, TrainConfig, CorpusConfig)
    ({'lr': 0.001}, {'context': 512})
    """
    check_names(settings, *classes)
    left, parts = dict(settings), []
    for cls in classes:
        names = [field.name for field in fields(cls) if field.name in left]
        parts.append({name: left.pop(name) for name in names})
    return tuple(parts)


@cache
def _model(cls: Any) -> type[BaseModel]:
    """Return the pydantic model with the fields of a configuration class."""
    hints = get_type_hints(cls, include_extras=True)
    definitions: dict[str, Any] = {field.name: (hints[field.name], ...) for field in fields(cls)}
    return create_model(
        cls.__name__, __config__=ConfigDict(arbitrary_types_allowed=True), **definitions
    )


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default
