"""Whatever a file holds, it is the checkpoint that was saved, or is refused in one line: nothing in it is
run, no traceback, no hang, no memory beyond a bound.

Thousands of mutations of a checkpoint, the same ones each time. Many more, and others each time:

    FUZZ=50000 python -m pytest -n 0 -q tests/test_checkpoint_fuzz.py -k mutat
"""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commands import config
from common.errors import UsageError
from training.checkpoint import (
    Checkpoint,
    Progress,
    _plain_content,
    adam_state,
    digest_of,
    load_checkpoint,
    save_checkpoint,
)

EXAMPLES = int(os.environ.get("FUZZ", "0"))
SECONDS, MEGABYTES = 10, 512  # of CPU time and of memory, for one file


def mutations(share: float) -> Any:
    """Settings of a test that has this share of all mutations."""
    return settings(
        max_examples=int(share * (EXAMPLES or 2200)), derandomize=not EXAMPLES, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def everything() -> Checkpoint:
    """A small checkpoint that has all that one can have."""
    weights = {"0.weight": torch.randn(3, 2), "0.bias": torch.randn(3), "inner_lr.0.bias": torch.rand(2)}
    curve = {"iteration": [5, 10], "query_loss": [1.5, 0.5]}
    of_classes = curve | {"query_accuracy": [0.5, 1.0]}
    progress = Progress(-0.5, 10, {"query_loss": 1.25}, 2, curve, of_classes, "x.pt, iteration 7")
    return Checkpoint(
        config.resolve({"learner_args": ("width=3",), "inner_clip": 10.0, "seed": 2**40}), 12, weights,
        adam_state(12, *({n: torch.rand_like(w) for n, w in weights.items()} for _ in range(2))),
        asdict(progress),
        {"1.statistics": torch.rand(2, 2, 3)},
        {"2.mean": torch.rand(3), "2.seen": torch.tensor(3), "2.on": torch.tensor(True)},
        {"train": ["a", "\N{GREEK SMALL LETTER ALPHA}"], "validation": [], "test": ["b"]},
        {"torch": "2.11", "threads": 1},
    )  # fmt: skip


class File:
    """A checkpoint: what it holds, its bytes, and a place for what becomes of them."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.path = folder / "last.pt"
        self.said = ""
        saved = everything()
        self.content = _plain_content(saved)
        save_checkpoint(self.path, saved)
        self.bytes = self.path.read_bytes()
        with zipfile.ZipFile(self.path) as zipped:
            self.parts = {name: zipped.read(name) for name in zipped.namelist()}
        self.pickle = self.parts["archive/data.pkl"]
        places = [position for *_, position in pickletools.genops(self.pickle)]
        ends = [*places[1:], len(self.pickle)]
        self.instructions = [self.pickle[place:end] for place, end in zip(places, ends, strict=True)]

    def archive(self, program: bytes, **options: Any) -> bytes:
        """The checkpoint with another pickle, its checksums right."""
        return archive(self.parts | {"archive/data.pkl": program}, **options)

    def loaded(self, content: bytes) -> Checkpoint | None:
        """What comes of these bytes; None where they are refused, as they should be."""
        self.path.write_bytes(content)
        with at_most(SECONDS, MEGABYTES):
            try:
                return load_checkpoint(self.path)
            except UsageError as error:
                said = str(error)
        assert "\n" not in said and len(said) < 400 + len(str(self.path)) and said.startswith(str(self.path))
        assert "does not fit the memory" not in said
        self.said = said
        return None

    def check(self, content: bytes) -> None:
        """The law, of bytes that nobody has signed again."""
        found = self.loaded(content)
        assert found is None or digest_of(_plain_content(found)) == digest_of(self.content)


def archive(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as zipped:
        for name, part in parts.items():
            zipped.writestr(name, part)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> File:
    return File(tmp_path_factory.mktemp("fuzz"))


def test_what_is_saved_with_everything_in_it_is_loaded(file):
    found = file.loaded(file.bytes)
    assert found is not None and digest_of(_plain_content(found)) == digest_of(file.content)
    assert file.loaded(file.archive(file.pickle)) is not None  # so what the others refuse is not the packing
    plain = torch.load(io.BytesIO(file.bytes), weights_only=True)  # as anybody else reads it
    assert digest_of(plain) == digest_of(file.content)


# ---- thousands of mutations -----------------------------------------------------------------


NUMBERS = st.integers(0, 2**20)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set", "cut", "insert", "repeat", "move")),
        NUMBERS,
        NUMBERS,
        st.binary(max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, first, second, some in edits:
        size = max(1, len(content))
        at, to = first % size, second % size
        low, high = sorted((at, to))
        if kind == "flip":
            content = (
                content[:at] + bytes(b ^ 1 << second % 8 for b in content[at : at + 1]) + content[at + 1 :]
            )
        elif kind == "set":
            content = content[:at] + some + content[at + len(some) :]
        elif kind == "cut":
            content = content[:low] + (b"" if second % 2 else content[high:])
        elif kind == "insert":
            content = content[:at] + some + content[at:]
        elif kind == "repeat":
            content = content[:high] + content[low:high] + content[high:]
        else:
            content = content[:at] + content[to : to + 64] + content[at + 64 :]
    return content


@mutations(0.3)
@given(edits=EDITS)
def test_mutated_bytes(file, edits):
    file.check(edited(file.bytes, edits))


@mutations(0.15)
@given(edits=EDITS)
def test_mutated_bytes_of_the_pickle_with_a_right_checksum(file, edits):
    file.check(file.archive(edited(file.pickle, edits)))


OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]
HOSTILE = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n", b"ctorch\nload\n",
           b"ctorch\nFloatStorage\n", b"cnumpy\ndtype\n", b"r\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 9,
           b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"h\x00", b"h\x01",
           b"J\xff\xff\xff\x7f"]  # fmt: skip
INSTRUCTIONS = st.one_of(
    st.sampled_from(OPCODES),
    st.tuples(st.sampled_from(OPCODES), st.binary(max_size=9)).map(b"".join),
    st.sampled_from(HOSTILE),
)
CHANGES = st.tuples(st.sampled_from(("replace", "insert", "remove", "copy")), NUMBERS, NUMBERS, INSTRUCTIONS)


@mutations(0.25)
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_mutated_instructions_of_the_pickle(file, changes):
    program = list(file.instructions)
    for kind, first, second, other in changes:
        at = first % len(program)
        other = program[second % len(program)] if kind == "copy" else other
        program[at : at + (kind in ("replace", "remove", "copy"))] = [] if kind == "remove" else [other]
    file.check(file.archive(b"".join(program)))


@mutations(0.1)
@given(data=st.data())
def test_mutated_archives(file, data):
    names = list(file.parts)
    kinds = ("rename", "leave", "swap", "grow", "shrink", "packed", "twice", "field")
    kind = data.draw(st.sampled_from(kinds))
    one, two = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    parts = dict(file.parts)
    if kind == "rename":
        other = data.draw(st.sampled_from(["archive/../x", "/etc/x", "other/x", "/", one + "x", "a" * 3000]))
        parts = {other if name == one else name: part for name, part in parts.items()}
    elif kind == "leave":
        del parts[one]
    elif kind == "swap":
        parts[one], parts[two] = parts[two], parts[one]
    elif kind == "grow":
        parts[one] += data.draw(st.binary(min_size=1, max_size=64))
    elif kind == "shrink":
        parts[one] = parts[one][: data.draw(NUMBERS) % max(1, len(parts[one]))]
    elif kind == "twice":
        buffer = io.BytesIO(archive(parts))
        with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(buffer, "a") as zipped:
            zipped.writestr(one, parts[two])
        return file.check(buffer.getvalue())
    content = archive(parts, zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED)
    if kind == "field":  # of the table of contents, or of its end
        start = content.index(b"PK\x01\x02")
        at = start + data.draw(NUMBERS) % (len(content) - start - 3)
        field = data.draw(
            st.sampled_from([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\x01\0\0\0"])
        )
        content = content[:at] + field + content[at + 4 :]
    return file.check(content)


TENSORS = [
    *(torch.zeros(shape) for shape in ((3,), (), (0,), (3, 2))), torch.zeros(3, 2, dtype=torch.float64),
    torch.zeros(3, dtype=torch.int64), torch.zeros(1).expand(3, 2), torch.full((3, 2), torch.nan),
    torch.zeros(2, 3).T, torch.zeros(3, dtype=torch.complex64), torch.eye(2).to_sparse(),
    torch.zeros(3, dtype=torch.bool), torch.zeros(3, device="meta"), torch.nn.Parameter(torch.zeros(3)),
]  # fmt: skip
SPECIAL = [2**31, 2**53, 2**63, 2**70, -1, "\x1b[2J", "\ud800", "a\nb", "x" * 5000, (), {}, [], set(), 1j,
           "omniglot", "conv", "auto", "maml", 10**400]  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9),
    st.sampled_from(TENSORS), st.sampled_from(SPECIAL),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.lists(part, max_size=3),
        st.lists(part, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(-1, 3)), part, max_size=3),
        part.map(lambda value: [value] * 3),  # one thing in several places
    ),
    max_leaves=6,
)


def with_value_at(tree: Any, number: int, value: Any) -> Any:
    """The tree with another value at its place of that number, counted from above."""
    places: list[list[Any]] = [[key] for key in tree]
    for place in places:
        at = tree
        for key in place:
            at = at[key]
        if isinstance(at, dict | list):
            places += [[*place, key] for key in (at if isinstance(at, dict) else range(len(at)))]

    def replaced(at: Any, place: list[Any]) -> Any:
        if not place:
            return value
        items = at.items() if isinstance(at, dict) else enumerate(at)
        changed = {key: replaced(item, place[1:]) if key == place[0] else item for key, item in items}
        return changed if isinstance(at, dict) else list(changed.values())

    return replaced(tree, places[number % len(places)])


@mutations(0.2)
@given(number=NUMBERS, value=VALUES, version=st.sampled_from((1, 2)), signed=st.booleans())
def test_mutated_values_of_any_type_at_any_place(file, number, value, version, signed):
    content = with_value_at(file.content | {"version": version}, number, value)
    if version == 1:
        content.pop("digest", None)
    if signed and "digest" in content and content["digest"] is file.content["digest"]:
        content.pop("digest")
        try:
            content["digest"] = digest_of(content)
        except (RuntimeError, NotImplementedError):  # of a tensor that has no numbers
            return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if version == 2 and not signed:
        file.check(buffer.getvalue())
    else:
        file.loaded(buffer.getvalue())  # another checkpoint, maybe, but one that is well formed


# ---- attacks by name ------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(key: str, count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Instructions for a float32 tensor of a storage."""

    def plain(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1].replace(b"q\x00", b"")

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + plain(count) + b"tQ"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + plain(offset) + plain(size) + plain(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


TOUCH, WRITE = "touch {}", "open({!r}, 'w')"
CALLS = {
    "os.system": (TOUCH, b"cos\nsystem\n%s\x85R"),
    "posix.system": (TOUCH, text("posix") + text("system") + b"\x93%s\x85R"),
    "nt.system": (TOUCH, b"(%sint\nsystem\n"),
    "builtins.eval": (WRITE, b"cbuiltins\neval\n%s\x85R"),
    "builtins.getattr": ("", b"cbuiltins\ngetattr\n%s"),
    "pathlib.Path.touch": ("", b"cpathlib\nPath.touch\ncpathlib\nPath\n%s\x81\x85R"),
    "torch.hub.load": ("a/b", b"ctorch\nhub.load\n%s\x85R"),
    "torch.load": ("a", text("torch") + text("load") + b"\x93%s\x85R"),
    "torch.storage._load_from_bytes": ("", b"ctorch.storage\n_load_from_bytes\n%s\x85R"),
    "numpy.core.multiarray.scalar": ("O8", b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n%s\x85R"),
    "builtins.bytearray": ("", b"cbuiltins\nbytearray\n\x8a\x06\0\x10\xa5\xd4\xe8\0\x85R%s"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_named_and_refused_before_any_of_it_runs(file, tmp_path, name):
    victim = tmp_path / "victim"
    argument, code = CALLS[name]
    code %= text(argument.format(str(victim)))
    file.path.write_bytes(file.archive(b"\x80\x02}" + text("format") + code + b"s."))
    with pytest.raises(UsageError, match=f"would call {name}: it was not loaded"):
        load_checkpoint(file.path)
    assert not victim.exists()


def many(count: int, instructions: bytes) -> bytes:
    return b"\x80\x02](" + count * instructions + b"e."


def branching(levels: int) -> bytes:
    """Tuples of a hundred times the same tuple, of a hundred times the same tuple ..."""
    inner = b"".join(b"(" + 100 * (b"h%c" % level) + b"tq%c" % (level + 1) for level in range(levels))
    return b"\x80\x02(]q\x00" + inner + b"t."


BOMBS = {
    "a place in memory far away": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a text of 8 EB": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a tree of 10^16 leaves": branching(8),
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a hundred thousand lists in each other": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "a hundred thousand tuples in each other": b"\x80\x02)" + b"\x85" * 10**5 + b".",
    "a million lists": many(10**6, b"]"),
    "ten million marks": b"\x80\x02" + b"(" * 10**7,
    "a storage longer than its part": b"\x80\x02" + tensor("0", 10**9, (10**9,), (1,)) + b".",
    "a tensor longer than its storage": b"\x80\x02" + tensor("0", 6, (7,), (1,)) + b".",
    "a tensor behind its storage": b"\x80\x02" + tensor("0", 6, (1,), (1,), offset=6) + b".",
    "a tensor before its storage": b"\x80\x02" + tensor("0", 6, (1,), (1,), offset=-1) + b".",
    "a tensor with long steps": b"\x80\x02" + tensor("0", 6, (2, 2), (5, 1)) + b".",
    "a tensor with steps back": b"\x80\x02" + tensor("0", 6, (2,), (-1,), offset=1) + b".",
    "one number a million times": b"\x80\x02" + tensor("0", 6, (10**6,), (0,)) + b".",
    "sizes that overflow": b"\x80\x02" + tensor("0", 6, (2**33, 2**33, 0), (1, 1, 1)) + b".",
    "a long text ten thousand times": b"\x80\x02](" + text(10**5 * "a") + b"q\x00" + 10**4 * b"h\x00" + b"e.",
    "a part of another folder": b"\x80\x02" + tensor("../data.pkl", 6, (6,), (1,)) + b".",
    "no end": b"\x80\x02}",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(file, name):
    assert file.loaded(file.archive(BOMBS[name])) is None
    assert "it cannot be read" in file.said  # not: it was read, and is no checkpoint


def test_a_program_that_is_longer_than_any_checkpoint_is_refused(file, monkeypatch):
    assert file.loaded(file.bytes) is not None
    monkeypatch.setattr("training.archive.MOST_STEPS", 100)  # of ten million
    assert file.loaded(file.bytes) is None


def test_the_parts_of_these_bombs_are_there_so_that_the_sizes_are_what_is_refused(file):
    file.path.write_bytes(file.archive(b"\x80\x02" + tensor("0", 6, (2, 3), (3, 1)) + b"."))
    with pytest.raises(UsageError, match=r"last.pt is not a checkpoint of this tool$"):
        load_checkpoint(file.path)


def test_a_thousand_names_of_one_long_storage_are_refused(file):
    program = many(1000, tensor("long", 2**18, (2**18,), (1,)))
    parts = file.parts | {"archive/data.pkl": program, "archive/data/long": bytes(2**20)}
    assert file.loaded(archive(parts)) is None
    assert "it cannot be read" in file.said


def test_what_is_compressed_is_refused_unread(file):
    assert file.loaded(file.archive(bytes(2**25), compression=zipfile.ZIP_DEFLATED)) is None


def test_a_table_of_contents_that_says_it_is_gigabytes_is_not_read(file):
    with file.path.open("wb") as sparse:
        sparse.truncate(2**40)
        sparse.seek(2**40)
        sparse.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 2**32 - 2, 0, 0))
    with at_most(SECONDS, MEGABYTES), pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(file.path)
    file.path.unlink()


def test_a_storage_of_a_terabyte_of_nothing_is_refused(file):
    name, size = b"archive/data.pkl", 2**40
    place = struct.pack("<HHQQ", 1, 16, size, size)  # sizes above 4 GB are here
    large = 2**32 - 1
    sizes = (large, large, len(name), len(place))
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 45, 45, *[0] * 5, *sizes, *[0] * 5)
    table = entry + name + place
    with file.path.open("wb") as sparse:
        sparse.seek(2**40 + 2**20)
        sparse.write(table)
        end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(table), 2**40 + 2**20)
        sparse.write(end + struct.pack("<4sLQL", b"PK\x06\x07", 0, 2**40 + 2**20 + len(table), 1))
        sparse.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(table), large, 0))
    with at_most(SECONDS, MEGABYTES), pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(file.path)
    file.path.unlink()
