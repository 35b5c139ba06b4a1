"""Events and commands as JSON, and back: what the journal holds and the wire carries.

`kind` is the class name in snake_case; for the rest see `runtime/jsonform.py`. A command has no time
of its own: whoever writes it down adds `at`, which reading passes over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast, get_args

from perdure.runtime import jsonform
from perdure.runtime.core.commands import Command
from perdure.runtime.core.events import Attempt, Event, Member, RestorePoint

Json = jsonform.Json
JsonObject = jsonform.JsonObject
encode = jsonform.encode
decode = jsonform.decode


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


def attempt_from_text(text: str) -> Attempt:
    """ "2.7" -> Attempt(2, 7). Raises ValueError on anything else."""
    return Attempt.from_json_form(text)


def members_from_json(raw: Json) -> tuple[Member, ...]:
    """[[node, group_rank, first_rank, nproc], ...]. Raises ValueError on anything else."""
    if not isinstance(raw, list):
        raise jsonform.misfit("a list of members", raw)
    return tuple(decode(Member, one) for one in raw)


def restore_from_json(raw: Json) -> RestorePoint | None:
    """{"step", "attempt"} or None. Raises ValueError on anything else."""
    return None if raw is None else decode(RestorePoint, raw)


def _message(classes: dict[str, type], raw: Mapping[str, Json]) -> object:
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(f"unknown kind {kind!r:.80}")
    return decode(classes[kind], dict(raw))
