"""Dataclasses as JSON and back, read off their annotations.

The journal, the wire and a new controller all speak this form, so it is made in one place and from
the classes themselves: a field added to an event is in the journal from that day on, and nobody
keeps a second list of names. An object is its fields by name, with `at` for `at_s`; a named tuple is
a list in field order, unless it has a form of its own (OwnForm).

Reading is strict about types, as the bytes come from a socket or an old file: anything that does not
fit raises ValueError, and the caller, who knows where the bytes came from, says whose fault that is.
Keys that are not known are passed over, and a missing key takes the field's default, so that a
journal may be read by the version before and after the one that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import (
    Literal,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
JsonObject = dict[str, Json]

T = TypeVar("T")

_UNION = type(int | None)


@runtime_checkable
class OwnForm(Protocol):
    """A class that says its own JSON form."""

    def json_form(self) -> object: ...

    @classmethod
    def from_json_form(cls, raw: object) -> object:
        """Raises ValueError when `raw` is not what `json_form` writes."""


def misfit(expected: str, raw: object) -> ValueError:
    return ValueError(f"expected {expected}, not {raw!r:.80}")


def encode(value: object) -> Json:
    """A dataclass, or anything that may stand in one. Raises TypeError on other classes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, OwnForm):
        return cast(Json, value.json_form())
    if isinstance(value, tuple | list):
        return [encode(one) for one in value]
    if isinstance(value, set | frozenset):
        return [encode(one) for one in sorted(value)]
    if isinstance(value, dict):
        return {str(key): encode(one) for key, one in value.items()}
    if is_dataclass(value):
        return {_key(f): encode(getattr(value, f.name)) for f in fields(value)}
    raise TypeError(f"no JSON form for {type(value).__name__}")


def decode(cls: Callable[..., T], raw: Json) -> T:
    """The `cls` (a dataclass or named tuple) that `raw` encodes.

    Raises ValueError, naming the field, when it does not fit.
    """
    return cast(T, _decode(cls, raw))


def _key(field: Field[object]) -> str:
    return "at" if field.name == "at_s" else field.name


def _plan(cls: type) -> tuple[tuple[str, str, object, bool], ...]:
    """(field, key, type, required) of each field; resolving annotations is slow, so once a class."""
    if cls not in _PLANS:
        hints: dict[str, object] = get_type_hints(cls)
        _PLANS[cls] = tuple(
            (f.name, _key(f), hints[f.name], f.default is MISSING and f.default_factory is MISSING)
            for f in fields(cls)
        )
    return _PLANS[cls]


_PLANS: dict[type, tuple[tuple[str, str, object, bool], ...]] = {}


def _dataclass(cls: type, raw: Json) -> object:
    if not isinstance(raw, dict):
        raise misfit(f"{cls.__name__}, an object", raw)
    values: dict[str, object] = {}
    for name, key, hint, required in _plan(cls):
        if key in raw:
            try:
                values[name] = _decode(hint, raw[key])
            except ValueError as error:
                raise ValueError(f"{cls.__name__}.{key}: {error}") from None
        elif required:
            raise ValueError(f"{cls.__name__}: {key!r} is missing")
    return cast("Callable[..., object]", cls)(**values)


def _decode(hint: object, raw: Json) -> object:
    origin, args = get_origin(hint), cast("tuple[object, ...]", get_args(hint))
    if origin is _UNION:
        if raw is None and type(None) in args:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return _decode(inner, raw)
    if origin is Literal:
        if raw not in args:
            raise misfit(f"one of {args}", raw)
        return raw
    if origin in (tuple, list, set):
        return _sequence(cast(type, origin), args, raw)
    if origin is dict:
        if not isinstance(raw, dict):
            raise misfit("an object", raw)
        as_int = args[0] is int
        return {int(k) if as_int else k: _decode(args[1], v) for k, v in raw.items()}
    if isinstance(hint, type):
        return _plain(hint, raw)
    raise TypeError(f"no JSON form for {hint!r}")


def _sequence(origin: type, args: tuple[object, ...], raw: Json) -> object:
    if not isinstance(raw, list):
        raise misfit("a list", raw)
    if origin is tuple and args[-1] is not Ellipsis:
        if len(raw) != len(args):
            raise misfit(f"{len(args)} items", raw)
        return tuple(_decode(arg, one) for arg, one in zip(args, raw, strict=True))
    return cast("Callable[..., object]", origin)(_decode(args[0], one) for one in raw)


def _plain(hint: type, raw: Json) -> object:
    if issubclass(hint, OwnForm):
        return hint.from_json_form(raw)
    if issubclass(hint, tuple):
        hints: dict[str, object] = get_type_hints(hint)
        items = cast("tuple[object, ...]", _sequence(tuple, tuple(hints.values()), raw))
        return cast("Callable[..., object]", hint)(*items)
    if is_dataclass(hint):
        return _dataclass(hint, raw)
    if hint is float and type(raw) is int:
        return float(raw)
    if type(raw) is not hint:
        raise misfit(hint.__name__, raw)
    return raw
