"""The command tree. Knows names and options; the work is in each command's own file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kvhybrid.errors import KVHybridError

app = typer.Typer(
    help="A KV cache for PyTorch language models: no prompt is computed twice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    Path | None, typer.Option(help="A local Hugging Face model; the embedded one when not given.")
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")]


def _version(wanted: bool) -> None:
    if wanted:
        from kvhybrid import __version__

        typer.echo(f"kvhybrid {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command()
def demo(
    model: Model = None,
    device: Device = "cpu",
    json: Annotated[
        Path | None, typer.Option(help="Write the figures as JSON to this file; - is stdout.")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, max=64, help="Conversations over the shared opening.")] = 4,
    turns: Annotated[int, typer.Option(min=1, max=32, help="Turns of each.")] = 4,
) -> None:
    """Compare: the same conversations without reuse, with a hand-kept cache, and with kvhybrid."""
    from kvhybrid.cli.demo import run_demo

    with _clear_errors():
        equal = run_demo(model, device=device, json_path=json, sessions=sessions, turns=turns)
    raise typer.Exit(0 if equal else 1)


@app.command()
def chat(
    model: Model = None,
    device: Device = "cpu",
    max_length: Annotated[int, typer.Option(min=1, max=2048, help="Most new tokens an answer.")] = 120,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always picks the likeliest token.")] = 0.8,
) -> None:
    """Talk to a model; what it reuses of the conversation is shown after each answer."""
    from kvhybrid.cli.chat import run_chat

    with _clear_errors():
        run_chat(model, device=device, max_length=max_length, temperature=temperature)


@app.command()
def doctor(
    model: Model = None,
    device: Device = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say how a model would be served, and why, or why not; exits with 1 when it is refused."""
    from kvhybrid.cli.doctor import run_doctor

    with _clear_errors():
        served = run_doctor(model, device=device, as_json=json)
    raise typer.Exit(0 if served else 1)


@app.command()
def record(
    prompts: Annotated[
        Path, typer.Argument(help='Requests as JSON lines, {"text": ...} and what else one may say.')
    ],
    out: Annotated[Path, typer.Argument(help="The trace to write, a new file; gzip'd when it ends in .gz.")],
    model: Model = None,
    device: Device = "cpu",
    max_length: Annotated[
        int, typer.Option(min=1, max=2048, help="Most new tokens, where a request does not say.")
    ] = 64,
) -> None:
    """Serve requests and record them for `simulate`: hashes, lengths and times, no text."""
    from kvhybrid.cli.record import run_record

    with _clear_errors():
        run_record(prompts, out, model=model, device=device, max_length=max_length)


@app.command()
def simulate(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="Recorded workloads, gzip'd or not.")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(help="lru, paged or adaptive; again, or with commas, for several.  [default: lru]"),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FRACTION|BLOCKS",
            help="Of the different blocks (0.05, 5%) or a number of them; likewise.  [default: 1%,5%,25%]",
        ),
    ] = None,
    join: Annotated[int, typer.Option(min=1, help="Make one block of so many.")] = 1,
    full_blocks_only: Annotated[
        bool, typer.Option("--full-blocks-only", help="Leave out last blocks that a prompt fills in part.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write what came out as JSON to this file; - is stdout.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw hit ratio against size into this SVG file.")] = None,
) -> None:
    """Replay recorded workloads through the real core, to see what a size or a policy is worth."""
    from kvhybrid.cli.simulate import run_simulate

    with _clear_errors():
        run_simulate(
            traces,
            policies=policy or ["lru"],
            sizes=size or ["1%,5%,25%"],
            join=join,
            full_blocks_only=full_blocks_only,
            json_path=json,
            plot_path=plot,
        )


@app.command()
def quality(
    text: Annotated[Path, typer.Option(help="What to foretell: a text of some thousand words, UTF-8.")],
    model: Model = None,
    device: Device = "cpu",
    prefix: Annotated[int, typer.Option(min=64, help="Tokens that are kept with less.")] = 768,
    scored: Annotated[int, typer.Option(min=1, help="Tokens behind them that are scored.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Parts of the text, at most.")] = 32,
    json: Annotated[
        Path | None, typer.Option(help="Write the figures as JSON to this file; - is stdout.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file: .svg, .png, .pdf.")] = None,
) -> None:
    """Measure what 8 and 4 bits, and keeping fewer tokens, cost a model's perplexity on a text."""
    from kvhybrid.cli.quality import run_quality

    with _clear_errors():
        run_quality(
            model,
            text,
            device=device,
            prefix=prefix,
            scored=scored,
            windows=windows,
            json_path=json,
            plot=plot,
        )


@app.command()
def bench(
    model: Model = None,
    device: Device = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; float32 on a CPU when not given.")
    ] = None,
    prefix: Annotated[
        int | None, typer.Option(min=1, help="Tokens that requests share.  [default: 2048]")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens before a decode step; again for several.  [default: 64, 2048]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short texts, few rounds: a first look.")] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write the figures as JSON to this file; - is stdout.")
    ] = None,
) -> None:
    """Compare a model with and without the cache: first tokens, decode steps, whole answers."""
    from kvhybrid.cli.bench import run_bench

    with _clear_errors():
        equal = run_bench(
            model,
            device=device,
            dtype=dtype,
            prefix=prefix,
            contexts=context,
            quick=quick,
            json_path=json,
        )
    raise typer.Exit(0 if equal else 1)


class _clear_errors:  # noqa: N801  # reads as a statement
    """Print our own errors in one line; a traceback helps nobody who typed a wrong path."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KVHybridError, OSError)):
            # A message may have brackets of its own: "kvhybrid[plot]".
            Console(stderr=True).print(f"[red]kvhybrid:[/] {escape(str(error))}", highlight=False)
            sys.exit(2)
