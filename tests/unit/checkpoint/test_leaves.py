"""Plain values come back as themselves, or are refused by name."""

from __future__ import annotations

import enum
import json
import math
import random
from collections import OrderedDict, namedtuple

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.checkpoint.errors import FormatError, StateError
from perdure.checkpoint.leaves import leaf_from_json, leaf_to_json

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=8,
)


def there_and_back(value: object) -> object:
    text = json.dumps(leaf_to_json(value, "x"), allow_nan=False)
    return leaf_from_json(json.loads(text))


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_values_come_back_with_their_types(value: object) -> None:
    back = there_and_back(value)
    assert repr(back) == repr(value)  # repr tells 1 from 1.0 and True, 0.0 from -0.0, NaN from None


def test_the_states_of_generators_come_back() -> None:
    generator = random.Random(7)
    state = there_and_back(generator.getstate())
    expected = generator.random()
    generator.setstate(state)  # type: ignore[arg-type]
    assert generator.random() == expected


def test_special_floats() -> None:
    assert leaf_to_json(math.inf, "x") == {"float": "inf"}
    assert math.isnan(there_and_back(math.nan))  # type: ignore[arg-type]


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        numpy.float64(1.0),
        numpy.arange(3),
        {1, 2},
        object(),
        print,
        namedtuple("P", "x")(1),
        {1.5: "x"},
        {True: "x"},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_come_back_is_refused_with_its_path(value: object) -> None:
    with pytest.raises(StateError, match=r"optimizer\.groups\[1\]") as told:
        leaf_to_json({"groups": [0, value]}, "optimizer")
    assert told.value.hint


def test_an_ordered_dict_comes_back_as_a_dict() -> None:
    assert there_and_back(OrderedDict(b=1, a=2)) == {"b": 1, "a": 2}


def test_a_value_that_contains_itself_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(StateError, match="contains itself"):
        leaf_to_json(endless, "x")


@pytest.mark.parametrize(
    "raw",
    [
        {"tuple": 3},
        {"dict": [[1]]},
        {"dict": [[[1], 2]]},
        {"bytes": "0g"},
        {"bytes": 3},
        {"complex": [1]},
        {"complex": ["a", "b"]},
        {"float": "1e5"},
        {"pickle": "gASV"},
        {"tuple": [], "list": []},
        {},
    ],
    ids=str,
)
def test_an_altered_value_is_refused(raw: object) -> None:
    with pytest.raises(FormatError):
        leaf_from_json(raw)
