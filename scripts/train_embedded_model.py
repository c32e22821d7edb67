"""Train the model that ships inside kvhybrid, measure it, and write its card.

    python scripts/train_embedded_model.py --text tinyshakespeare.txt

The text: https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt. What is written
under `--out` is what `AutoModelForCausalLM` and `AutoTokenizer` read: weights in float16, the
tokenizer with its chat template, and README.md, the model card, whose figures are measured on
the written weights.
"""

import argparse
import time
from dataclasses import fields
from pathlib import Path

import torch
from embedded.card import write_card
from embedded.corpus import split_text
from embedded.export import export, sample
from embedded.measure import validation_loss
from embedded.tokenizer import train_tokenizer
from embedded.training import Progress as Step
from embedded.training import Recipe, train
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

_SHIPPED = Path(__file__).resolve().parents[1] / "python/kvhybrid/model/embedded"


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments; the recipe's fields are options of the same names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the plays, UTF-8")
    parser.add_argument("--out", type=Path, default=_SHIPPED, help="folder to write; default: the package's")
    for field in fields(Recipe):
        option = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(option, action="store_true", help="multiply in bfloat16")
        else:
            kind, default = type(field.default), field.default
            parser.add_argument(option, type=kind, default=default, help=f"default: {default}")
    return parser.parse_args()


def main() -> None:
    """Train, export, measure what was exported, write the card."""
    arguments = parse_arguments()
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    training_text, validation_text = split_text(arguments.text.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(training_text, recipe.vocab_size, recipe.context)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=recipe.steps)

        def report(step: Step) -> None:
            progress.advance(task)
            if step.validation is not None:
                seconds = time.monotonic() - started
                progress.console.print(
                    f"step {step.step}: loss {step.loss:.3f} nats/token, "
                    f"validation {step.validation:.4f} nats/byte, {seconds:.0f} s"
                )

        model, best_step = train(recipe, tokenizer, training_text, validation_text, report)
    minutes = (time.monotonic() - started) / 60
    export(model, tokenizer, arguments.out)

    shipped = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32, local_files_only=True)
    loaded = AutoTokenizer.from_pretrained(arguments.out, local_files_only=True)
    losses = {size: validation_loss(shipped, loaded, validation_text, size) for size in (256, 1024, 4096)}
    write_card(arguments.out, recipe, shipped, best_step, minutes, losses)
    for size, loss in losses.items():
        print(f"windows of {size}: {loss.per_byte:.4f} nats/byte, {loss.per_token:.4f} nats/token")
    print(sample(shipped, loaded, "Who comes here?"))


if __name__ == "__main__":
    main()
