"""Reading recorded workloads: gzip'd or plain JSON lines of requests, or one key a line.

The first line is a header: ``name``, ``block_tokens``, ``partial_tail_block``; ``flat`` says that every
further line is one decimal key, a request of one block. Otherwise it is a request in order of arrival,
``{"t": ms, "in": prompt tokens, "out": generated tokens, "h": [first, count, first, count, ...]}``, where
``h`` names the prompt's blocks as runs of consecutive ids, each id standing for a block and all before it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from array import array
from contextlib import closing
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from kvhybrid._core import Trace
from kvhybrid.errors import ConfigError, TraceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BATCH = 4096
GZIP = b"\x1f\x8b"
# Bytes of a line: a prompt of a million blocks fits. A file without line ends would fill the memory.
MOST_LINE = 1 << 24
MOST_JOIN = 1 << 20
MOST_NAME = 200


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace as it will be replayed."""

    name: str
    path: Path
    trace: Trace

    @property
    def num_requests(self) -> int:
        """Requests of the trace."""
        return len(self.trace)


def read_trace(
    path: Path, *, join: int = 1, full_blocks_only: bool = False, tick: Callable[[int], object] | None = None
) -> Workload:
    """Read the trace at ``path``.

    ``join`` makes one block of so many, and ``full_blocks_only`` leaves out last blocks that a prompt fills
    in part. ``tick`` is called with how many bytes of the file were read since the last time.

    Raises ``TraceError`` naming file and line when it is none, ``ConfigError`` for a ``join`` out of range,
    and ``OSError``.
    """
    if not 1 <= join <= MOST_JOIN:
        raise ConfigError(f"join={join}: must be from 1 to {MOST_JOIN}")
    with path.open("rb") as file:
        is_gzip = file.read(2) == GZIP
        file.seek(0)
        if not is_gzip:
            return _read(path, file, file, join, full_blocks_only, tick)
        with closing(cast("IO[bytes]", gzip.GzipFile(fileobj=file))) as lines:
            return _read(path, lines, file, join, full_blocks_only, tick)


def _read(
    path: Path,
    lines: IO[bytes],
    file: IO[bytes],
    join: int,
    full_blocks_only: bool,
    tick: Callable[[int], object] | None,
) -> Workload:
    number = 1
    try:
        header = json.loads(_line(lines))
        flat = bool(header.get("flat", False))
        partial = bool(header.get("partial_tail_block", False))
        trace = Trace(
            1 if flat else int(header["block_tokens"]),
            join=join,
            full_blocks_only=full_blocks_only and partial,
        )
        number, position = 2, 0
        for requests, runs in _batches(lines, flat=flat):
            _extend(trace, requests, runs)
            number += len(requests) // 4
            if tick is not None:
                tick(file.tell() - position)
                position = file.tell()
    except _Line as wrong:
        raise TraceError(f"{_shown(path)}, line {number + wrong.offset}: {wrong}") from wrong.__cause__
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        EOFError,
        RecursionError,
        zlib.error,
        gzip.BadGzipFile,
    ) as error:
        where = f"{_shown(path)}, from line {number} on"
        raise TraceError(f"{where}: {str(error)[:200]} ({type(error).__name__})") from error
    if not len(trace):
        raise TraceError(f"{_shown(path)}: no requests")
    name = str(header.get("name", path.name))[:MOST_NAME]
    return Workload(name=name.encode("utf-8", "replace").decode(), path=path, trace=trace)


def _shown(path: Path) -> str:
    """Return a path as text that any terminal takes: names of files are bytes."""
    return str(path).encode("utf-8", "replace").decode()


def _line(lines: IO[bytes]) -> bytes:
    """Return the next line, empty at the end. Raises ``_Line`` for one that is no line of a trace."""
    line = lines.readline(MOST_LINE + 1)
    if len(line) > MOST_LINE:
        raise _Line(f"longer than {MOST_LINE:,} bytes", 0)
    return line


def _extend(trace: Trace, requests: array[int], runs: array[int]) -> None:
    """Add requests; raises ``_Line`` for the first that is none."""
    try:
        trace.extend(requests, runs)
    except ValueError as error:
        found = re.match(r"request (\d+): (.*)", str(error), re.DOTALL)
        if found is None:
            raise
        raise _Line(found[2], int(found[1])) from error


class _Line(Exception):  # noqa: N818  # never leaves this file
    """A line of a batch is no request."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def _batches(lines: IO[bytes], *, flat: bool) -> Iterator[tuple[array[int], array[int]]]:
    requests, runs, when = array("q"), array("q"), 0
    while True:
        before = len(requests) // 4
        try:
            if not (line := _line(lines)):
                break
        except _Line as wrong:
            wrong.offset = before
            raise
        try:
            if flat:
                requests.extend((when, 1, 0, 2))
                runs.extend((int(line), 1))
                when += 1
            else:
                request: dict[str, Any] = json.loads(line)
                blocks = request["h"]
                requests.extend((int(request["t"]), request["in"], request.get("out", 0), len(blocks)))
                runs.extend(blocks)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise _Line(f"no request: {line[:60]!r}", before) from error
        if requests[-4] < 0:
            raise _Line(f"no request: its time is {requests[-4]}", before)
        if len(requests) >= 4 * BATCH:
            yield requests, runs
            requests, runs = array("q"), array("q")
    yield requests, runs
