"""A training state as a flat table, and back into the objects it came from.

`state` is what torch.distributed.checkpoint takes: nested dicts and lists of tensors, DTensors,
plain values, and objects with `state_dict` and `load_state_dict` (models, optimizers, schedulers,
loaders). A path joins the keys with dots. A container without a tensor inside is one leaf as a
whole (so `param_groups` or a loader's position keep their shape, whatever it was when saved).

**Per-rank state** carries its rank as a key: `{"rng": {"rank3": ...}}`. Such entries belong to that
rank alone; everything else is taken to be equal on all ranks, is written once, and must have the
same names everywhere (the commit is refused otherwise).

Nothing is copied here: the table refers to the live tensors, so that a restore fills them in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from perdure.checkpoint.errors import StateError

_RANK_KEY = re.compile(r"^rank(\d+)$")


@dataclass(slots=True)
class _Stateful:
    """An object with a state_dict; `box[0]` is the dict that goes back into it."""

    target: Any
    box: list[Any]


@dataclass(slots=True)
class Flat:
    """`tensors` are the live ones. `leaves` are plain values, whole containers."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    leaves: dict[str, object] = field(default_factory=dict)
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    _homes: dict[str, tuple[Any, Any] | None] = field(default_factory=dict)
    _stateful: dict[str, _Stateful] = field(default_factory=dict)

    def put_back(self, leaves: dict[str, object]) -> None:
        """Set `leaves` where they came from and hand every object its state, innermost first.

        Values inside a tuple cannot be set in place; they are only in what restore returns.
        """
        for path, value in leaves.items():
            if path in self.leaves and (home := self._homes[path]) is not None:
                container, key = home
                container[key] = _merged(container[key], value)
        for stateful in reversed(self._stateful.values()):
            stateful.target.load_state_dict(stateful.box[0])

    def state_of(self, path: str) -> dict[Any, Any]:
        """The state_dict of the object at `path`, as it will be loaded."""
        inner: dict[Any, Any] = self._stateful[path].box[0]
        return inner

    def add_tensor(self, path: str, tensor: torch.Tensor) -> None:
        """One more tensor to be filled (an entry that a fresh optimizer does not have yet)."""
        self._claim(path, None)
        self.tensors[path] = tensor

    def _claim(self, path: str, home: tuple[Any, Any] | None) -> None:
        if path in self._homes:
            raise StateError(
                f"two entries of the state have the same name {path!r}",
                hint="a key with dots in it spells the path of another entry: rename one of them",
            )
        self._homes[path] = home


def flatten(state: Any) -> Flat:
    """Raises StateError on keys that are neither str nor int, and on names that collide."""
    flat = Flat()
    if not isinstance(state, dict) and not _is_stateful(state):
        raise StateError(
            f"the state is a {type(state).__name__}",
            hint='give a dict: {"model": model, "optimizer": optimizer, "step": step}',
        )
    _walk(flat, state, "", None, root=True)
    return flat


def _walk(
    flat: Flat, value: Any, path: str, home: tuple[Any, Any] | None, *, root: bool = False
) -> None:
    if isinstance(value, torch.Tensor):
        flat._claim(path, home)
        flat.tensors[path] = value
    elif _is_stateful(value):
        box = [value.state_dict()]
        flat._stateful[path] = _Stateful(value, box)
        if isinstance(value, torch.optim.Optimizer):
            flat.optimizers[path] = value
        always = isinstance(value, torch.optim.Optimizer)  # its state may be empty as yet
        _walk(flat, box[0], path, (box, 0), root=root or always)
    elif isinstance(value, dict | list | tuple) and (root or _has_parts(value)):
        for key, child in _children(value, path):
            inner = None if isinstance(value, tuple) else (value, key)
            _walk(flat, child, f"{path}.{key}" if path else str(key), inner)
    else:
        flat._claim(path, home)
        flat.leaves[path] = value


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _has_parts(value: Any) -> bool:
    """Whether something in `value` needs a name of its own: a tensor, an object, a rank's key."""
    if isinstance(value, torch.Tensor) or _is_stateful(value):
        return True
    if isinstance(value, dict):
        return any(
            (isinstance(key, str) and _RANK_KEY.match(key)) or _has_parts(child)
            for key, child in value.items()
        )
    return isinstance(value, list | tuple) and any(_has_parts(child) for child in value)


def _children(value: Any, path: str) -> Iterator[tuple[Any, Any]]:
    if not isinstance(value, dict):
        yield from enumerate(value)
        return
    for key, child in value.items():
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise StateError(
                f"the key {key!r} at {path or 'the top'!r} is a {type(key).__name__}",
                hint="keys of the state are strings or whole numbers",
            )
        yield key, child


def _merged(old: Any, new: Any) -> Any:
    """Fill a dict or list in place where there is one: the script may hold on to it."""
    if isinstance(old, dict) and isinstance(new, dict):
        old.clear()
        old.update(new)
        return old
    if isinstance(old, list) and isinstance(new, list):
        old[:] = new
        return old
    return new


def rank_of(path: str) -> int | None:
    """The rank that a per-rank entry names in its path, None for an entry of all ranks."""
    for part in path.split("."):
        if found := _RANK_KEY.match(part):
            return int(found[1])
    return None
