"""``kvhybrid record``: requests through an engine that writes its own trace."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
from rich.console import Console
from rich.progress import track
from transformers.utils import logging

from kvhybrid.engine.engine import KVEngine
from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from pathlib import Path


def run_record(prompts: Path, out: Path, *, model: Path | None, device: str, max_length: int) -> None:
    """Serve the requests of ``prompts``, one after the other, and write the trace to ``out``.

    Raises ``InvalidRequestError`` naming the line of what is no request, ``OSError``, and what loading the
    model and serving raise; requests served before are in the trace.
    """
    logging.disable_progress_bar()  # ours says more
    requests = read_requests(prompts, max_length)
    engine = KVEngine(model, device=device)
    anyio.run(_serve, engine, requests, out)


def read_requests(path: Path, max_length: int) -> list[dict[str, Any]]:
    """Return the requests of a file of JSON lines. Raises ``InvalidRequestError`` naming file and line."""
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise InvalidRequestError(f"{path}, line {number}: {error}") from error
        if not isinstance(request, dict):
            raise InvalidRequestError(f"{path}, line {number}: a request is an object, not {line[:60]!r}")
        requests.append({"max_length": max_length, **request})
    if not requests:
        raise InvalidRequestError(f"{path}: no requests")
    return requests


async def _serve(engine: KVEngine, requests: list[dict[str, Any]], out: Path) -> None:
    console = Console(stderr=True)
    async with engine:
        recorder = engine.record(out)
        for request in track(requests, "serving", console=console, transient=True):
            await engine.process_request(request)
        stats = engine.get_stats()
    console.print(
        f"{recorder.requests:,} requests in {out}; {stats['hit_rate']:.1%} of the prompt tokens were cached. "
        f"What another size would do: kvhybrid simulate {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
