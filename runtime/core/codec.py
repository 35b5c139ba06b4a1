"""Events, commands and snapshots as JSON, and back.

The journal, the wire and a new controller all speak this form, so it is made in one place. It is read
off the dataclasses themselves: a field added to an event is in the journal from that day on, and
nobody keeps a second list of names. An object is its fields by name, with `kind` (the class name in
snake_case) and `at` for `at_s`; an attempt is "term.counter", a restore point {"step", "attempt"},
any other named tuple a list in field order.

Reading is strict about types, as the bytes come from a socket or an old file: anything that does not
fit raises ValueError, and the caller, who knows where the bytes came from, says whose fault that is.
Keys that are not known are passed over, and a missing key takes the field's default, so that a
journal may be read by the version before and after the one that wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from perdure.runtime.core.commands import Command
from perdure.runtime.core.events import Attempt, Event, Member, RestorePoint

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
JsonObject = dict[str, Json]

T = TypeVar("T")

_ATTEMPT = re.compile(r"^(\d{1,12})\.(\d{1,12})$")
_UNION = type(int | None)


def _kinds(classes: tuple[type, ...]) -> dict[str, type]:
    """RankExited -> "rank_exited"."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(): cls for cls in classes}


_EVENTS = _kinds(get_args(Event))
_COMMANDS = _kinds(get_args(Command))
_KIND_OF = {cls: kind for kind, cls in (_EVENTS | _COMMANDS).items()}


def to_json(message: Event | Command) -> JsonObject:
    """`kind`, `at` (events only), then the fields by name."""
    return {"kind": _KIND_OF[type(message)], **cast(JsonObject, encode(message))}


def event_from_json(raw: Mapping[str, Json]) -> Event:
    """Raises ValueError when `raw` is no event, or a field of it does not fit."""
    return cast(Event, _message(_EVENTS, raw))


def command_from_json(raw: Mapping[str, Json]) -> Command:
    """Raises ValueError when `raw` is no command, or a field of it does not fit."""
    return cast(Command, _message(_COMMANDS, raw))


def is_event(kind: str) -> bool:
    return kind in _EVENTS


def attempt_from_text(text: str) -> Attempt:
    """ "2.7" -> Attempt(2, 7). Raises ValueError on anything else."""
    return decode(Attempt, text)


def members_from_json(raw: Json) -> tuple[Member, ...]:
    """[[node, group_rank, first_rank, nproc], ...]. Raises ValueError on anything else."""
    if not isinstance(raw, list):
        raise _misfit("a list of members", raw)
    return tuple(decode(Member, one) for one in raw)


def restore_from_json(raw: Json) -> RestorePoint | None:
    """{"step", "attempt"} or None. Raises ValueError on anything else."""
    return None if raw is None else decode(RestorePoint, raw)


def encode(value: object) -> Json:
    """Any event, command, snapshot or part of one. Raises TypeError on other classes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Attempt):
        return str(value)
    if isinstance(value, RestorePoint):
        return {"step": value.step, "attempt": str(value.attempt)}
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
    """The `cls` (a dataclass or named tuple of this package) that `raw` encodes.

    Raises ValueError, naming the field, when it does not fit.
    """
    return cast(T, _decode(cls, raw))


def _message(classes: dict[str, type], raw: Mapping[str, Json]) -> object:
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(f"unknown kind {kind!r:.80}")
    return _dataclass(classes[kind], dict(raw))


def _key(field: Field[object]) -> str:
    return "at" if field.name == "at_s" else field.name


def _misfit(expected: str, raw: object) -> ValueError:
    return ValueError(f"expected {expected}, not {raw!r:.80}")


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
        raise _misfit(f"{cls.__name__}, an object", raw)
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
            raise _misfit(f"one of {args}", raw)
        return raw
    if origin in (tuple, list, set):
        return _sequence(cast(type, origin), args, raw)
    if origin is dict:
        if not isinstance(raw, dict):
            raise _misfit("an object", raw)
        as_int = args[0] is int
        return {int(k) if as_int else k: _decode(args[1], v) for k, v in raw.items()}
    if isinstance(hint, type):
        return _plain(hint, raw)
    raise TypeError(f"no JSON form for {hint!r}")


def _sequence(origin: type, args: tuple[object, ...], raw: Json) -> object:
    if not isinstance(raw, list):
        raise _misfit("a list", raw)
    if origin is tuple and args[-1] is not Ellipsis:
        if len(raw) != len(args):
            raise _misfit(f"{len(args)} items", raw)
        return tuple(_decode(arg, one) for arg, one in zip(args, raw, strict=True))
    return cast("Callable[..., object]", origin)(_decode(args[0], one) for one in raw)


def _plain(hint: type, raw: Json) -> object:
    if hint is Attempt:
        found = _ATTEMPT.match(raw) if isinstance(raw, str) else None
        if found is None:
            raise _misfit("an attempt, 'term.counter'", raw)
        return Attempt(int(found[1]), int(found[2]))
    if hint is RestorePoint and isinstance(raw, dict):
        raw = [raw.get("step"), raw.get("attempt")]
    if issubclass(hint, tuple):
        hints: dict[str, object] = get_type_hints(hint)
        items = cast("tuple[object, ...]", _sequence(tuple, tuple(hints.values()), raw))
        return cast("Callable[..., object]", hint)(*items)
    if is_dataclass(hint):
        return _dataclass(hint, raw)
    if hint is float and type(raw) is int:
        return float(raw)
    if type(raw) is not hint:
        raise _misfit(hint.__name__, raw)
    return raw
