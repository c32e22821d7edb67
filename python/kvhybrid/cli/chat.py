"""``kvhybrid chat``: a conversation at the terminal, kept in the cache from turn to turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio import to_thread
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging

from kvhybrid.config import KVCacheConfig
from kvhybrid.engine.engine import KVEngine
from kvhybrid.model.load import load_model

if TYPE_CHECKING:
    from pathlib import Path

console = Console(highlight=False)


def run_chat(path: Path | None, *, device: str, max_length: int, temperature: float) -> None:
    """Read lines and answer them until the input ends. Raises what loading the model raises."""
    logging.disable_progress_bar()  # ours says more
    model, tokenizer = load_model(path, device=device)
    assert tokenizer is not None  # a model from a path or our own always has one
    engine = KVEngine(model, KVCacheConfig(block_size=16), tokenizer=tokenizer)
    anyio.run(_talk, engine, max_length, temperature)


async def _talk(engine: KVEngine, max_length: int, temperature: float) -> None:
    console.print("[dim]an empty line or Ctrl-D ends the conversation[/]")
    async with engine:
        session = engine.session("chat", keep_reasoning=True)
        while line := await _read_line():
            stream = session.stream(line, max_length=max_length, temperature=temperature)
            async for piece in stream:
                console.print(escape(piece), end="")
            console.print()
            if answer := stream.answer():
                console.print(
                    f"[dim]{answer['cached_tokens']} of {answer['prompt_tokens']} prompt tokens reused, "
                    f"first token after {answer['time_to_first_token_ms']:.0f} ms[/]"
                )


async def _read_line() -> str:
    try:
        # A daemon-less wait: Ctrl-C reaches input() itself, so the thread always comes back.
        return (await to_thread.run_sync(console.input, "[bold]> [/]")).strip()
    except (EOFError, KeyboardInterrupt):
        return ""
