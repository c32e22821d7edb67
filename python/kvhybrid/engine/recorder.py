"""``Recorder``: what an engine served, as a workload that ``kvhybrid simulate`` replays.

Hashes only: a block is written as a number, given out in order of first sight to a keyed hash of its tokens
and all before them. The key is made anew for every file and never written. No text, no token, no name of a
session or a tenant leaves the process; lengths, times, and which prompts begin alike do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import secrets
import time
from collections import OrderedDict
from itertools import count
from typing import IO, TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from pathlib import Path

    from kvhybrid.engine.running import Running

MOST_BLOCKS: Final = 1 << 20
"""Blocks whose numbers are remembered, about 200 MiB; one that comes back later gets another number."""


class Recorder:
    """Writes requests, as they end, to a new file at ``path``, gzip'd when it ends in ``.gz``.

    Equal texts of two tenants are two texts where ``by_tenant``. Raises ``OSError``; the file must be new.
    """

    def __init__(
        self, path: Path, *, block_size: int, by_tenant: bool = True, most_blocks: int = MOST_BLOCKS
    ) -> None:
        opened = gzip.GzipFile(path, "xb") if path.suffix == ".gz" else path.open("xb")
        self._file = cast("IO[bytes]", opened)
        self._block_size = block_size
        self._most = most_blocks
        self._by_tenant = by_tenant
        self._key = secrets.token_bytes(32)
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._next = count()
        self._began = time.monotonic()
        self.requests = 0
        name = path.name.split(".", 1)[0]
        header = {"name": name, "block_tokens": block_size, "partial_tail_block": False, "times": "real"}
        self._write({**header, "source": "recorded by kvhybrid", "flat": False})

    def record(self, running: Running) -> None:
        """Write a request that has ended; nothing once this was closed."""
        if self._file.closed:
            return
        tokens = running.tokens.tobytes(0, running.num_prompt_tokens)
        space = running.request.tenant if self._by_tenant else ""
        self.write(tokens, len(running.generated), space)

    def write(self, tokens: bytes, output: int, space: str = "") -> None:
        """Write one request: the prompt's ``tokens`` as uint32, and how many were generated after it.

        ``space`` names what the prompt's pages are kept apart by; equal texts of two spaces share nothing.
        """
        digest = hashlib.blake2b(space.encode(), key=self._key, digest_size=16).digest()
        digests, size = [], 4 * self._block_size
        for end in range(size, len(tokens) + 1, size):
            block = tokens[end - size : end]
            digest = hashlib.blake2b(digest + block, key=self._key, digest_size=16).digest()
            digests.append(digest)
        runs: list[int] = []
        for number in self._number(digests):
            if runs and number == runs[-2] + runs[-1]:
                runs[-1] += 1
            else:
                runs += [number, 1]
        when = round(1e3 * (time.monotonic() - self._began))
        self._write({"t": when, "s": -1, "in": len(tokens) // 4, "out": output, "h": runs})
        self.requests += 1

    def _number(self, digests: list[bytes]) -> list[int]:
        numbers = []
        for digest in digests:
            if digest not in self._numbers:
                self._numbers[digest] = next(self._next)
            numbers.append(self._numbers[digest])
        # The deepest is the first to be forgotten: a block is remembered no longer than the one before it.
        for digest in reversed(digests):
            self._numbers.move_to_end(digest)
        while len(self._numbers) > self._most:
            self._numbers.popitem(last=False)
        return numbers

    def _write(self, item: dict[str, object]) -> None:
        self._file.write(json.dumps(item, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Finish the file. Idempotent."""
        self._file.close()
