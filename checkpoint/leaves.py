"""Plain values as JSON and back, exactly, with their types, and without pickle.

JSON knows neither tuples, bytes, complex numbers, NaN nor keys that are numbers; a value that came
back as something else would make a resumed run differ from an unbroken one without a word. So what
JSON has (None, bool, int, finite float, str, list) is written as it is, and everything else as an
object with one key that names the type: {"tuple": [...]}, {"dict": [[key, value], ...]},
{"bytes": "<hex>"}, {"complex": [re, im]}, {"float": "nan" | "inf" | "-inf"}.

Only exact types are taken: a subclass (an enum, a numpy scalar, a named tuple) would not come back
as itself. The one exception is OrderedDict, which comes back as a dict: dicts have been ordered for
long, and torch hands them out everywhere.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from perdure.checkpoint.errors import FormatError, StateError

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_DEPTH_MAX = 100


def leaf_to_json(value: object, path: str, depth: int = 0) -> object:
    """Raises StateError naming `path` when the value holds what cannot come back as itself."""
    if depth > _DEPTH_MAX:
        raise StateError(f"{path} is nested more than {_DEPTH_MAX} deep, or contains itself")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if math.isfinite(value):
            return value
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if type(value) is complex:
        parts = (value.real, value.imag)
        return {"complex": [leaf_to_json(part, path) for part in parts]}
    if type(value) is bytes:
        return {"bytes": value.hex()}
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        items = [leaf_to_json(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, dict)
        return {"dict": [_pair(key, v, path, depth) for key, v in value.items()]}
    raise StateError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint "
        "cannot hold: nothing is pickled",
        hint="Store it as numbers, strings, bytes, lists, tuples, dicts or tensors: for example "
        "float(x) for a numpy number, torch.from_numpy(x) for an array, x.value for an enum.",
    )


def _pair(key: object, value: object, path: str, depth: int) -> list[object]:
    if type(key) not in (str, int):
        raise StateError(
            f"{path} has the key {key!r} of type {type(key).__qualname__}",
            hint="Keys of dicts in a checkpoint are strings or whole numbers.",
        )
    return [key, leaf_to_json(value, f"{path}.{key}", depth + 1)]


def leaf_from_json(raw: object) -> object:
    """The value that `leaf_to_json` was given. Raises FormatError on anything else."""
    if raw is None or isinstance(raw, bool | int | float | str):
        return raw
    if isinstance(raw, list):
        return [leaf_from_json(item) for item in raw]
    if isinstance(raw, dict) and len(raw) == 1:
        ((tag, body),) = raw.items()
        if tag in _DECODERS:
            try:
                return _DECODERS[tag](body)
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"a stored value of type {tag} is altered: {error}") from error
    raise FormatError(f"a stored value has an unknown form: {str(raw)[:80]}")


def _items(body: object) -> list[object]:
    if not isinstance(body, list):
        raise TypeError("not a list")
    return [leaf_from_json(item) for item in body]


def _dict(body: object) -> dict[object, object]:
    if not isinstance(body, list):
        raise TypeError("not a list")
    return {key: leaf_from_json(value) for key, value in body}


def _complex(body: object) -> complex:
    real, imaginary = _items(body)
    if type(real) is not float or type(imaginary) is not float:
        raise TypeError("not two floats")
    return complex(real, imaginary)


def _bytes(body: object) -> bytes:
    if not isinstance(body, str):
        raise TypeError("not text")
    return bytes.fromhex(body)


_DECODERS: dict[str, Callable[[object], object]] = {
    "bytes": _bytes,
    "complex": _complex,
    "dict": _dict,
    "float": lambda body: _SPECIAL[str(body)],
    "tuple": lambda body: tuple(_items(body)),
}
