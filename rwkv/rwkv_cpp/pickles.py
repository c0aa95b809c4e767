"""Reads pickles of plain data without Python's unpickler, so that nothing in them can run, and
writes the few that torch.load needs.

A pickle is a program for a small stack machine. This one knows the opcodes that torch.save writes
(protocols 2 to 5): scalars, strings, tuples, lists, dictionaries. A global is looked up in a table
that the caller gives, and only functions out of that table can be called.
"""

import io
import pickletools
import reprlib
import struct
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

MAX_BYTES = 1 << 24
_MAX_OPCODES = 200_000  # the largest RWKV-4 takes 30,000

# The values of these opcodes stand in their argument or in this table.
_ARGUMENT = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANT: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLE_LENGTH = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shorten(value: Any) -> str:
    """repr(value) for messages: printable, and short however large the value is."""
    return _SHORT.repr(value)


def load(
    stream: io.BytesIO,
    allowed: Mapping[tuple[str, str], Any],
    persistent_load: Callable[[Any], Any],
) -> Any:
    """Read one pickle from where the stream stands; the stream stands behind it afterwards.

    `allowed` maps (module, name) to what stands for that global: plain functions may be called by
    the pickle, other values are inert. Raises ValueError for whatever is not plain data, is damaged
    or is of a size that no checkpoint has.
    """
    try:
        return _run(stream, allowed, persistent_load)
    except IndexError:
        raise ValueError("damaged pickle: a value is taken from an empty stack") from None
    except KeyError as error:
        raise ValueError(f"damaged pickle: nothing is remembered as {error}") from None


def _run(
    stream: io.BytesIO,
    allowed: Mapping[tuple[str, str], Any],
    persistent_load: Callable[[Any], Any],
) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each MARK
    memo: dict[int, Any] = {}
    length = len(stream.getbuffer())

    for count, (opcode, argument, position) in enumerate(_opcodes(stream)):
        if count == _MAX_OPCODES:
            raise ValueError(f"a pickle of more than {_MAX_OPCODES} steps")
        name = opcode.name
        if name in _ARGUMENT:
            stack.append(argument)
        elif name in _CONSTANT:
            stack.append(_CONSTANT[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in _TUPLE_LENGTH:
            n = _TUPLE_LENGTH[name]
            if len(stack) < n:
                raise IndexError
            stack[-n:] = [tuple(stack[-n:])]
        elif name == "TUPLE":
            items, stack = stack, below.pop()
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            if name == "APPENDS":
                items, stack = stack, below.pop()
            else:
                items = [stack.pop()]
            _expect(stack[-1], list, name).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEMS":
                items, stack = stack, below.pop()
            else:
                items = [stack.pop(-2), stack.pop()]
            _set_items(_expect(stack[-1], dict, name), items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "GLOBAL":
                module, _, attribute = argument.partition(" ")
            else:
                attribute = _expect(stack.pop(), str, name)
                module = _expect(stack.pop(), str, name)
            if (module, attribute) not in allowed:
                shown = shorten(f"{module}.{attribute}")
                raise ValueError(f"global {shown} is not allowed in a checkpoint")
            stack.append(allowed[module, attribute])
        elif name == "REDUCE":
            arguments = _expect(stack.pop(), tuple, name)
            function = _expect(stack.pop(), FunctionType, name)
            try:
                stack.append(function(*arguments))
            except TypeError:
                raise ValueError(f"{function.__name__} got {shorten(arguments)}") from None
        elif name == "BUILD":  # attributes of a dictionary, such as the _metadata of torch
            _expect(stack.pop(), dict, name)
            _expect(stack[-1], dict, name)
        elif name == "BINPERSID":
            stack.append(persistent_load(stack.pop()))
        elif name == "FRAME":
            if argument > length - stream.tell():
                raise ValueError(f"damaged pickle: a frame of {argument} bytes passes its end")
        elif name == "STOP":
            if below or len(stack) != 1:
                raise ValueError(f"damaged pickle: {len(stack)} values left at its end")
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"opcode {name} at byte {position} is not allowed in a checkpoint")
    raise ValueError("damaged pickle: it ends without STOP")


def _opcodes(stream: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(stream)
    except ValueError as error:
        raise ValueError(f"damaged pickle: {error}") from None


def _expect(value: Any, kind: type, opcode: str) -> Any:
    if type(value) is not kind:
        raise ValueError(
            f"damaged pickle: {opcode} expected a {kind.__name__}, got {shorten(value)}"
        )
    return value


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise IndexError
    for key, value in zip(items[::2], items[1::2], strict=True):
        # A tuple of tuples of tuples can take for ever to hash, and among numbers above 2^61 one
        # finds as many of equal hash as one likes.
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < 1 << 60):
            raise ValueError(f"{shorten(key)} is not allowed as the key of a dictionary")
        if key in target:
            raise ValueError(f"a dictionary holds the key {shorten(key)} twice")
        target[key] = value


class Global(NamedTuple):
    """What unpickling looks up by its name."""

    module: str
    name: str


class Call(NamedTuple):
    """What unpickling makes by calling a function."""

    function: Global
    arguments: tuple[Any, ...]


class Reference(NamedTuple):
    """What unpickling asks persistent_load for."""

    identity: tuple[Any, ...]


def dump(value: Any) -> bytes:
    """The pickle, of protocol 2, of a value made of these, dictionaries, tuples, strings, integers
    and booleans."""
    return b"\x80\x02" + _dumped(value) + b"."


def _dumped(value: Any) -> bytes:
    match value:
        case Global(module, name):
            return b"c" + f"{module}\n{name}\n".encode()
        case Call(function, arguments):
            return _dumped(function) + _dumped(arguments) + b"R"
        case Reference(identity):
            return _dumped(identity) + b"Q"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case str():
            data = value.encode()
            return b"X" + struct.pack("<I", len(data)) + data
        case tuple():
            return b"(" + b"".join(map(_dumped, value)) + b"t"
        case dict():
            items = (_dumped(key) + _dumped(item) for key, item in value.items())
            return b"}(" + b"".join(items) + b"u"
    raise TypeError(f"a pickle of {shorten(value)}")
