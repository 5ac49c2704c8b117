"""How a setting is declared: value, bounds, unit and description in one place, checked by pydantic.

    @settings("distill")
    class DistillConfig:
        lr: float = setting(3e-4, "Peak learning rate of AdamW.", gt=0)

makes a frozen dataclass. A value that does not fit raises a SafeSteerError that names the setting.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo

from safesteer._errors import SafeSteerError

PLAIN = {  # pydantic's words for bounds, shorter
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
LARGEST = 2**31 - 1  # of a whole number: what every random number generator and tensor size takes
T = TypeVar("T")


def setting(default: Any, description: str, *, unit: str = "", infinite: bool = False, **bounds: Any) -> Any:
    """Declare a setting; `bounds` are pydantic's (gt, ge, lt, le). Whole numbers are never negative."""
    if isinstance(default, int) and not isinstance(default, bool):
        bounds = {"ge": 0, "le": LARGEST} | bounds
    if isinstance(default, float):
        # NaN is not within any bounds, so an infinite threshold (which switches it off) needs one.
        bounds |= {"ge": bounds.get("ge", -math.inf)} if infinite else {"allow_inf_nan": False}
    return Field(default=default, description=description, json_schema_extra={"unit": unit}, **bounds)


def setting_or_none(default: Any, description: str, *, unit: str = "") -> Any:
    """Declare a setting that may be None; its bounds are those of its type (CountOrNone ...)."""
    return Field(default=default, description=description, json_schema_extra={"unit": unit})


def section(factory: type, description: str) -> Any:
    """Declare the settings of a stage inside a recipe."""
    return Field(default_factory=factory, description=description)


def _no_none(value: Any) -> Any:
    return None if value == "none" else value


def _words(value: Any) -> Any:
    return (
        tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value
    )


Words = BeforeValidator(_words)  # "train,val" is a tuple of words
OrNone = BeforeValidator(_no_none)  # the command line and TOML files have no None: they write "none"
CountOrNone = Annotated[Annotated[int, Field(ge=1, le=LARGEST)] | None, OrNone]
SizeOrNone = Annotated[Annotated[int, Field(ge=0, le=LARGEST)] | None, OrNone]
TextOrNone = Annotated[str | None, OrNone]
PositiveOrNone = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, OrNone]


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(setting, setting_or_none, section)
)
def settings(name: str) -> Callable[[type[T]], type[T]]:
    """Turn a class into a frozen dataclass whose values are checked; `name` is that of its stage."""

    def decorate(kind: type[T]) -> type[T]:
        config = ConfigDict(extra="forbid", validate_default=True)
        checked: Any = checked_dataclass(kind, frozen=True, kw_only=True, config=config)
        initialize = checked.__init__

        @wraps(initialize)
        def __init__(self: Any, **values: Any) -> None:
            try:
                initialize(self, **values)
            except ValidationError as error:
                raise SafeSteerError(_sentence(name, error)) from None

        checked.__init__ = __init__
        meanings = (f"    {field}: {info.description}" for field, info in describe(checked))
        checked.__doc__ = "\n".join([f"{kind.__doc__}\n\nAttributes:", *meanings])
        return checked

    return decorate


def _sentence(name: str, error: ValidationError) -> str:
    """Say which setting does not fit, and what it may be."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part.isidentifier())
    shown = f"{name}.{place}" if name else place
    if first["type"] == "unexpected_keyword_argument":
        return f"Unknown setting '{shown}': `safesteer settings` lists what there is."
    reason = first["msg"].split(", unable")[0].replace("Input should be", "must be")
    for long, short in PLAIN.items():
        reason = reason.replace(long, short)
    return f"{shown} {reason}, not {first['input']!r}."


def describe(kind: type) -> list[tuple[str, FieldInfo]]:
    """List (name, pydantic's FieldInfo) of a settings class, in the order of declaration."""
    known: dict[str, FieldInfo] = getattr(kind, "__pydantic_fields__")  # noqa: B009
    return list(known.items())
