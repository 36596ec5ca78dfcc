"""Pickles read without running them: which classes and functions they mention, which opcodes they use."""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from compress.errors import ModelFileError

# Names a file may mention: `compress.checkpoint` puts an inert stand-in in the place of each.
HARMLESS_GLOBALS = frozenset(
    {
        "argparse.Namespace",
        "types.SimpleNamespace",
        "collections.defaultdict",
        "collections.deque",
        *(f"builtins.{n}" for n in ("list", "dict", "tuple", "frozenset", "int", "float", "str", "bool")),
        *(f"datetime.{n}" for n in ("datetime", "date", "time", "timedelta", "timezone")),
        *(
            f"{module}.{kind}"
            for module in ("pathlib", "pathlib._local")
            for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
        ),
        *(f"numpy.{core}.multiarray.{n}" for core in ("core", "_core") for n in ("scalar", "_reconstruct")),
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{n}" for n in ("bool_", "bool", "float16", "float32", "float64")),
        *(f"numpy.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    }
)

# What `torch.load(weights_only=True)` knows by itself. Only a classification: torch stays the gate.
_PLAIN = re.compile(
    r"""collections\.(OrderedDict|Counter) | _codecs\.encode | builtins\.(bytearray|set|complex)
      | torch\.nn\.parameter\.Parameter | torch\.serialization\._get_layout
      | torch\.(Size|Tensor|device) | torch\.(cuda\.)?(sparse\.)?\w+Tensor
      | torch\.(storage\.|cuda\.)?\w+Storage
      | torch\.(u?int\d+|float\d+(_\w+)?|bfloat16|complex\d+|bool|half|double)
      | torch\.(bits\w+|q\w*int\w+|bcomplex\d+)
      | torch\.per_(tensor|channel)_(affine|symmetric)(_float_qparams)?
      | torch\._utils\._rebuild_\w+ | torch\._tensor\._rebuild_from_type_v2""",
    re.VERBOSE,
)
# Opcodes of the weights-only unpickler; anything else (protocol 4 and up, for one) makes it give up.
_WEIGHTS_ONLY_OPCODES = re.compile(
    """PROTO | STOP | GLOBAL | NEWOBJ | REDUCE | BUILD | APPENDS? | SETITEMS? | MARK | TUPLE[123]? | NONE
     | NEWFALSE | NEWTRUE | EMPTY_(TUPLE|LIST|DICT|SET) | BINPERSID | BININT[12]? | BINFLOAT
     | (LONG_)?BIN(GET|PUT) | BINUNICODE | SHORT_BINSTRING | LONG1""",
    re.VERBOSE,
)
# what torch.save wrote first before it wrote zip archives
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LARGEST_PICKLE = 256 << 20  # bytes; the pickle of a model with 10,000 tensors has two million


@dataclass
class PickleScan:
    """What one or several pickles mention.

    Args:
        names: every ``module.name``; ``<computed>`` where the pickle works the name out while loading.
        strange: opcodes weights-only loading does not know.
    """

    names: set[str] = field(default_factory=set)
    strange: set[str] = field(default_factory=set)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why weights-only loading will refuse: names that are more than weights, and opcodes."""
        names = {n for n in self.names if n not in HARMLESS_GLOBALS and not _PLAIN.fullmatch(n)}
        return (*sorted(names), *(f"pickle opcode {o}" for o in sorted(self.strange)))


class Bounded:
    """A reader that never asks the file for more than is left in it or than a pickle may be long."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = min(size - file.tell(), LARGEST_PICKLE)

    def read(self, count: int) -> bytes:
        return self._count(self._file.read(min(count, self._left)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left))

    def tell(self) -> int:
        return self._file.tell()

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def scan_pickle(path: Path, stream: IO[bytes], scan: PickleScan) -> None:
    """Read one pickle up to its STOP and add what it mentions to `scan`.

    Raises:
        ModelFileError: this is no pickle, or it is cut off.
    """
    memo: dict[int, str | None] = {}
    recent: list[str | None] = []  # what the last opcodes pushed: a string, or None for anything else
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            slot = argument if isinstance(argument, int) else -1
            if not _WEIGHTS_ONLY_OPCODES.fullmatch(name):
                scan.strange.add(name)
            if name in ("GLOBAL", "INST"):
                scan.names.add(_modern(*str(argument).split(" ", 1)))
                recent.append(None)
            elif name == "STACK_GLOBAL":
                pair = recent[-2:]
                known = len(pair) == 2 and pair[0] is not None and pair[1] is not None
                scan.names.add(_modern(str(pair[0]), str(pair[1])) if known else "<computed>")
                recent.append(None)
            elif name in ("EXT1", "EXT2", "EXT4"):
                scan.names.add("<computed>")
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[slot] = recent[-1] if recent else None
            elif name == "MEMOIZE":
                memo[len(memo)] = recent[-1] if recent else None
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                recent.append(memo.get(slot))
            elif name not in ("PROTO", "FRAME"):
                recent.append(argument if isinstance(argument, str) else None)
            del recent[:-2]
    except Exception as error:  # the bytes are arbitrary, and genops promises no particular error
        raise ModelFileError(
            f"{path} begins like a pickle, but is truncated or damaged ({error})",
            fix="copy or download it again",
        ) from error


def _modern(module: str, name: str) -> str:
    """The name as Python 3 has it; torch.save writes Python 2 names such as ``__builtin__.set``."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[(module, name)]
    else:
        module = IMPORT_MAPPING.get(module, module)
    return f"{module}.{name}"
