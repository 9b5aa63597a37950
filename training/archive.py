"""PyTorch's files, read as data: nothing in them is run, and no size in them is believed.

`torch.save` writes a zip archive of a pickle, which is a program for a stack machine, and of the bytes of
each tensor's storage. Here is that machine, with those of its instructions that plain values in dictionaries,
lists and tuples and dense tensors need. It knows a dozen names and calls none of them. What else a file may
hold is refused where it is met. Time and memory are in proportion to the file's size; what comes out is a
tree: nothing but text is in two places.
"""

from __future__ import annotations

import math
import pickle as codes
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from common.errors import UsageError

MOST_DIRECTORY = (
    2**22
)  # bytes of the archive's table of contents, which `zipfile` reads at once: 60,000 parts
MOST_PICKLE = 2**26  # bytes; a million points of four curves are half of it
MOST_REPETITION = 16  # characters of texts that are named again, for each byte of the pickle
MOST_STEPS = 10**7  # instructions
MOST_CONTAINERS = 10**6
MOST_LEVELS = 16  # of dictionaries in dictionaries; a checkpoint has 5
MOST_MARKS = 100  # at a time
CHUNK = 2**20  # bytes

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class NotPlainError(Exception):
    """Why a file was not read: a clause without its subject."""


def read_archive(path: Path) -> Any:
    """What `torch.save` has written: plain values and tensors, on the CPU.

    Raises NotPlainError for whatever else there may be, and for files that are damaged; UsageError for what
    is no file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such checkpoint")
    with path.open("rb") as file:
        try:
            return _Program(_Archive(file)).result()
        except NotPlainError:
            raise
        except (MemoryError, RuntimeError) as error:  # PyTorch says so where there is no memory
            raise NotPlainError("does not fit the memory of this machine") from error


# ---- the archive ---------------------------------------------------------------------------------


class _InPieces:
    """A file for `zipfile`, which would read as much at once as the file says there is."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.seekable, self.whole = file.seekable, file

    def read(self, size: int = -1) -> bytes:
        found = self.whole.read(size if 0 <= size <= MOST_DIRECTORY else MOST_DIRECTORY + 1)
        if len(found) > MOST_DIRECTORY:
            _damaged()
        return found


class _Archive:
    """The parts of an archive as PyTorch writes it: in one folder, each by a name of its own, uncompressed.

    A part that is read has the checksum that the archive says it has.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.size = file.seek(0, 2)
        try:
            self.zip = zipfile.ZipFile(_InPieces(file))  # type: ignore[arg-type]
        except zipfile.BadZipFile as error:
            raise NotPlainError("is not a checkpoint of this tool: it was not loaded") from error
        except Exception as error:  # it may meet any bytes, and stumble in any way
            raise _damage() from error
        found = self.zip.infolist()
        self.parts = {info.filename.partition("/")[2]: info for info in found}
        if (
            len(self.parts) < len(found)
            or len({info.filename.partition("/")[0] for info in found}) != 1
            or any(info.compress_type or info.compress_size != info.file_size for info in found)
            or any(info.flag_bits & 0x1 for info in found)  # encrypted
            or sum(info.file_size for info in found) > self.size
        ):
            _damaged()

    def size_of(self, name: str) -> int:
        """Of a part, in bytes."""
        if name not in self.parts:
            _damaged()
        return self.parts[name].file_size

    def read(self, name: str) -> Tensor:
        """The bytes of a part, as a vector of them."""
        found = torch.empty(self.size_of(name), dtype=torch.uint8)
        left = memoryview(found.numpy())  # type: ignore[arg-type]
        try:
            with self.zip.open(self.parts[name]) as part:
                while read := part.read(CHUNK):  # the last one compares the checksum
                    left[: len(read)] = read
                    left = left[len(read) :]
        except Exception as error:  # as above
            raise _damage() from error
        if left:
            _damaged()
        return found

    def text(self, name: str, most: int) -> bytes:
        """The same, of a short part."""
        if self.size_of(name) > most:
            _damaged()
        return self.read(name).numpy().tobytes()


# ---- the pickle ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    """What the pickle may name, and what it stands for: one of `STORAGES`, or something that is made here."""

    kind: str
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class _Storage:
    numbers: Tensor  # [numbers]


TENSOR, DICTIONARY = _Name("tensor"), _Name("dictionary")
NAMES = {("torch", name): _Name("storage", dtype) for name, dtype in STORAGES.items()} | {
    ("torch._utils", "_rebuild_tensor_v2"): TENSOR,
    ("collections", "OrderedDict"): DICTIONARY,
}


class _Program:
    """The stack machine, for one pickle of an archive."""

    def __init__(self, archive: _Archive) -> None:
        if "byteorder" in archive.parts and archive.text("byteorder", 16) != sys.byteorder.encode():
            raise NotPlainError("is from a machine with the bytes in another order: it was not loaded")
        self.archive = archive
        self.code = archive.text("data.pkl", MOST_PICKLE)
        self.at = 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below the marks
        self.memo: list[Any] = []
        self.storages: dict[str, _Storage] = {}
        self.bytes_left = archive.size  # for tensors, which may not all be views of one storage
        self.containers = 0
        self.characters_left = 2**20 + MOST_REPETITION * len(self.code)  # of texts that are named again

    def result(self) -> Any:
        """What the pickle stands for."""
        code, instructions = self.code, INSTRUCTIONS
        try:
            for _ in range(MOST_STEPS):
                instruction = code[self.at]
                self.at += 1
                if instruction == STOP:
                    break
                instructions.get(instruction, _Program.unknown)(self)
            else:
                _damaged()
            (tree,) = self.stack
        except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
            raise _damage() from error  # its end is missing, or there is something else than there should be
        if self.outer:
            _damaged()
        _check_tree(tree)
        return tree

    def take(self, size: int) -> bytes:
        """The next bytes of the program."""
        found = self.code[self.at : self.at + size]
        if len(found) < size:
            _damaged()
        self.at += size
        return found

    def line(self) -> str:
        end = self.code.index(b"\n", self.at, self.at + 1000)
        found = self.code[self.at : end]
        self.at = end + 1
        return found.decode("utf-8", "replace")

    def unpack(self, form: struct.Struct) -> Any:
        (value,) = form.unpack(self.take(form.size))
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_container(self, value: Any) -> None:
        self.containers += 1
        if self.containers > MOST_CONTAINERS:
            _damaged()
        self.stack.append(value)

    # ---- instructions -----------------------------------------------------------------------

    def mark(self) -> None:
        if len(self.outer) == MOST_MARKS:
            _damaged()
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.outer.pop()
        return found

    def put(self, place: int) -> None:
        if place != len(self.memo):
            _damaged()
        self.memo.append(self.stack[-1])

    def get(self, place: int) -> None:
        value = self.memo[place]
        if type(value) not in (str, _Name):  # what is in two places makes trees of any size
            _damaged()
        if type(value) is str:
            self.characters_left -= len(value)
            if self.characters_left < 0:
                _damaged()
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            _damaged()
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push_container(items)

    def long(self) -> None:
        size = self.take(1)[0]
        if size > 8:
            _damaged()
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self) -> None:
        self.push(self.take(self.unpack(UINT32)).decode("utf-8", "surrogatepass"))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            _damaged()
        target += items

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if (
            type(target) is not dict
            or len(items) % 2
            or any(type(key) not in (str, int) for key in items[::2])
        ):
            _damaged()
        target.update(zip(items[::2], items[1::2], strict=True))

    def protocol(self) -> None:
        if self.take(1) != b"\x02":
            _damaged()

    def name(self) -> None:
        names = self.line(), self.line()
        if names not in NAMES:
            _would_call(names)
        self.push(NAMES[names])

    def name_of_stack(self) -> None:
        module, name = self.stack[-2:]
        _would_call((module, name))

    def unknown(self) -> None:
        _damaged()

    def storage(self) -> None:
        """The bytes of a part of the archive as numbers, exactly as many as there are."""
        word, name, key, location, count = self.stack.pop()
        if (
            word != "storage"
            or type(name) is not _Name
            or name.dtype is None
            or type(key) is not str
            or type(location) is not str
            or type(count) is not int
            or count * name.dtype.itemsize != self.archive.size_of(f"data/{key}")
        ):
            _damaged()
        if key not in self.storages:
            self.storages[key] = _Storage(self.archive.read(f"data/{key}").view(name.dtype))
        if self.storages[key].numbers.dtype != name.dtype:
            _damaged()
        self.push(self.storages[key])

    def call(self) -> None:
        """The two things that are made by calls: an empty dictionary, and a tensor of a storage."""
        function, arguments = self.stack[-2:]
        del self.stack[-2:]
        if function is DICTIONARY and type(arguments) is tuple and not arguments:
            self.push_container({})
        elif function is TENSOR:
            self.push_container(self.tensor(*arguments))
        else:
            _damaged()

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, learned: Any, hooks: Any) -> Tensor:
        """A dense tensor that lies within the storage."""
        if (
            type(storage) is not _Storage
            or type(size) is not tuple
            or type(stride) is not tuple
            or len(size) != len(stride)
            or len(size) > 64
            or not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *size, *stride))
            or type(learned) is not bool
            or type(hooks) is not dict
            or hooks
        ):
            _damaged()
        numbers = storage.numbers
        count = math.prod(size)
        end = (
            offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
            if count
            else offset
        )
        self.bytes_left -= count * numbers.dtype.itemsize
        if end > len(numbers) or self.bytes_left < 0 or math.prod(n or 1 for n in size) >= 2**62:
            _damaged()
        return numbers.as_strided(size, stride, offset)


UINT16, UINT32, INT32, DOUBLE = map(struct.Struct, ("<H", "<I", "<i", ">d"))
(STOP,) = codes.STOP
INSTRUCTIONS: dict[int, Callable[[_Program], None]] = {
    code[0]: instruction
    for code, instruction in {
        codes.PROTO: _Program.protocol,
        codes.MARK: _Program.mark,
        codes.NONE: lambda p: p.push(None),
        codes.NEWTRUE: lambda p: p.push(True),
        codes.NEWFALSE: lambda p: p.push(False),
        codes.BININT1: lambda p: p.push(p.take(1)[0]),
        codes.BININT2: lambda p: p.push(p.unpack(UINT16)),
        codes.BININT: lambda p: p.push(p.unpack(INT32)),
        codes.LONG1: _Program.long,
        codes.BINFLOAT: lambda p: p.push(p.unpack(DOUBLE)),
        codes.BINUNICODE: _Program.text,
        codes.BINPUT: lambda p: p.put(p.take(1)[0]),
        codes.LONG_BINPUT: lambda p: p.put(p.unpack(UINT32)),
        codes.BINGET: lambda p: p.get(p.take(1)[0]),
        codes.LONG_BINGET: lambda p: p.get(p.unpack(UINT32)),
        codes.EMPTY_DICT: lambda p: p.push_container({}),
        codes.EMPTY_LIST: lambda p: p.push_container([]),
        codes.EMPTY_TUPLE: lambda p: p.push(()),
        codes.TUPLE1: lambda p: p.tuple_of(1),
        codes.TUPLE2: lambda p: p.tuple_of(2),
        codes.TUPLE3: lambda p: p.tuple_of(3),
        codes.TUPLE: lambda p: p.push_container(tuple(p.since_mark())),
        codes.APPEND: lambda p: p.append([p.stack.pop()]),
        codes.APPENDS: lambda p: p.append(p.since_mark()),
        codes.SETITEM: lambda p: p.set_items([p.stack.pop(-2), p.stack.pop()]),
        codes.SETITEMS: lambda p: p.set_items(p.since_mark()),
        codes.GLOBAL: _Program.name,
        codes.INST: lambda p: _would_call((p.line(), p.line())),
        codes.STACK_GLOBAL: _Program.name_of_stack,
        codes.BINPERSID: _Program.storage,
        codes.REDUCE: _Program.call,
    }.items()
}


def _check_tree(tree: Any) -> None:
    """Raises NotPlainError where values are in too many others, or left over from the making of tensors."""
    level = [tree]
    for _ in range(MOST_LEVELS):
        below: list[Any] = []
        for value in level:
            if type(value) is dict:
                below += value.values()
            elif type(value) in (list, tuple):
                below += value
            elif type(value) not in (int, float, str, bool, type(None), Tensor):
                _damaged()
        level = below
    if level:
        _damaged()


# ---- refusals ------------------------------------------------------------------------------------


def _damage() -> NotPlainError:
    return NotPlainError("is damaged or not a checkpoint: it cannot be read")


def _damaged() -> NoReturn:
    raise _damage()


def _would_call(names: tuple[Any, Any]) -> NoReturn:
    name = ".".join(str(each) for each in names)
    shown = "".join(c if c.isprintable() else "?" for c in name[:80])
    raise NotPlainError(f"is not a checkpoint of this tool: it would call {shown}: it was not loaded")
