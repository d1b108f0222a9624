"""What the module does of its own to start soon is equal to what the library does."""

from __future__ import annotations

import copy
import typing

import pytest

from tests.seam import program


def declare(base: typing.Any) -> typing.Any:
    """A named tuple as the module declares them, of either kind."""

    class Row(base):  # type: ignore[misc]
        name: str
        size: int
        note: str = "none"

    return Row


def test_a_named_tuple_is_as_the_librarys():
    ours, theirs = declare(vars(program)["NamedTuple"]), declare(typing.NamedTuple)
    given: typing.Any
    named: typing.Any
    for given, named in [(("a", 1), {}), (("a",), {"size": 1}), ((), {"name": "a", "size": 1, "note": "b"})]:
        one, other = ours(*given, **named), theirs(*given, **named)
        assert tuple(one) == tuple(other)
        assert (repr(one), one._asdict(), one._fields) == (repr(other), other._asdict(), other._fields)
        assert (one.name, one.size, one.note, hash(one)) == (other.name, other.size, other.note, hash(other))
        assert tuple(one._replace(size=5)) == tuple(other._replace(size=5))
        assert type(copy.copy(one)) is ours and copy.deepcopy(one) == one
        match one:
            case ours(name, size):
                assert (name, size) == ("a", 1)
    for given, named in [((), {}), (("a", 1, "b", 2), {}), (("a",), {"name": "b", "size": 1}), (("a", 1), {"no": 1})]:
        for kind in (ours, theirs):
            with pytest.raises(TypeError, match=r"Row|__new__"):
                kind(*given, **named)
    with pytest.raises(AttributeError):
        ours("a", 1).size = 2


def test_every_pattern_compiles():
    """An error in one would show only at its first use."""
    patterns = [value for value in vars(program).values() if isinstance(value, program._LazyPattern)]
    assert len(patterns) > 40
    for pattern in patterns:
        assert pattern.pattern == pattern.compile().pattern
        assert vars(pattern)["pattern"]  # and the next use does not come by the way of the first
