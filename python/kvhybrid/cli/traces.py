"""Reading recorded workloads: gzip'd or plain JSON lines of requests, or one key a line.

The first line is a header: ``name``, ``block_tokens``, ``partial_tail_block``; ``flat`` says that every
further line is one decimal key, a request of one block. Otherwise it is a request in order of arrival,
``{"t": ms, "in": prompt tokens, "out": generated tokens, "h": [first, count, first, count, ...]}``, where
``h`` names the prompt's blocks as runs of consecutive ids, each id standing for a block and all before it.
"""

from __future__ import annotations

import gzip
import json
from array import array
from contextlib import closing
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from kvhybrid._core import Trace
from kvhybrid.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BATCH = 4096
GZIP = b"\x1f\x8b"


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

    Raises ``TraceError`` naming file and line when it is none, and ``OSError``.
    """
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
        header = json.loads(lines.readline())
        flat = bool(header.get("flat", False))
        partial = bool(header.get("partial_tail_block", False))
        trace = Trace(
            1 if flat else int(header["block_tokens"]),
            join=join,
            full_blocks_only=full_blocks_only and partial,
        )
        number, position = 2, 0
        for requests, runs in _batches(lines, flat=flat):
            trace.extend(requests, runs)
            number += len(requests) // 4
            if tick is not None:
                tick(file.tell() - position)
                position = file.tell()
    except _Line as wrong:
        raise TraceError(f"{path}, line {number + wrong.offset}: {wrong}") from wrong.__cause__
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        EOFError,
        gzip.BadGzipFile,
    ) as error:
        raise TraceError(f"{path}, from line {number} on: {error!s} ({type(error).__name__})") from error
    if not len(trace):
        raise TraceError(f"{path}: no requests")
    return Workload(name=str(header.get("name", path.name)), path=path, trace=trace)


class _Line(Exception):  # noqa: N818  # never leaves this file
    """A line of a batch is no request."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def _batches(lines: IO[bytes], *, flat: bool) -> Iterator[tuple[array[int], array[int]]]:
    requests, runs, when = array("q"), array("q"), 0
    for line in lines:
        before = len(requests) // 4
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
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise _Line(f"no request: {line[:60]!r}", before) from error
        if len(requests) >= 4 * BATCH:
            yield requests, runs
            requests, runs = array("q"), array("q")
    yield requests, runs
