"""Writes the model card: what the weights are, how they were made, and what was measured on them."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from embedded.measure import ValidationLoss
from embedded.training import PHASES, VALIDATION_WINDOW, Recipe

NAME = "kvhybrid-embedded"

_BODY = """\
# {name}

A very small Llama-style language model that writes like Shakespeare's plays. It ships inside
kvhybrid so that tests, the demo and a first try need no download; it is no useful assistant.

```python
from kvhybrid.model.embedded_model import load_embedded_model

model, tokenizer = load_embedded_model()
```

## Architecture

`LlamaForCausalLM`, {parameters:,} parameters: {layers} layers of width {hidden}, {heads} query heads and
{kv_heads} key/value heads of {head_dim}, SwiGLU of width {intermediate}, rotary positions (base 10,000),
RMS norm, embedding and output tied. At most {context:,} positions. The weights were trained in float32
and are stored rounded to float16; kvhybrid loads them as float32, and all figures below are of the
stored weights.

## Data

Tiny Shakespeare: 1.1 MB of Shakespeare's plays, text in the public domain, as collected in
[karpathy/char-rnn](https://github.com/karpathy/char-rnn) (`data/tinyshakespeare/input.txt`, MIT).
The first 90 % of the characters were trained on, the last 10 % measured on.

About {chat_percent} % of the training windows show the same text as conversations: neighbouring speeches
become user and assistant turns, some behind a system message.

## Tokens

A byte-level BPE of {vocab:,} tokens, learnt on the training part, {bytes_per_token:.2f} bytes a token on the
validation text. Any text comes back unchanged. Special tokens: `<|bos|>` (opens a chat),
`<|end|>` (ends every message; the end-of-sequence token), `<|pad|>`, `<|system|>`, `<|user|>`,
`<|assistant|>`. Plain text gets none of them.

The chat template renders each message as `<|role|>content<|end|>`, contents untouched, so that a
conversation's rendering is a prefix of its continuation's. Text that spells a special token is
read as that token.

## Training

{steps:,} steps of {batch_tokens:,} tokens, {minutes:.0f} minutes of wall clock on {threads}
({precision}); kept: step {best_step:,}, the best by validation.
Windows in tokens: {windows}.
Muon ({muon_lr}) for the layers' matrices, AdamW ({adamw_lr}) for the rest, weight decay {weight_decay},
dropout {dropout} on both residual branches; the rates constant for the first {constant_percent} % of the
steps, then linearly to zero. Seed {seed}. Made by `scripts/train_embedded_model.py{options}`.

The checkpoint was chosen by the text it is measured on, in windows of {window:,} tokens, the best of
{evaluations} measurements of the run; so was the recipe, after these runs (nats per byte; the first two were
measured in windows of 256 tokens, and learnt from no longer ones than 512):

{earlier}

The figures below are therefore flattering: no text was held back from these choices. Nothing else chose:
what quantized or compressed caches cost the model was measured afterwards.

## Validation

Mean negative log-likelihood of the last 10 % ({val_bytes:,} bytes, {val_tokens:,} predicted tokens), in
windows that share no context, each starting cold:

| window, tokens | nats per byte | nats per token |
| ---: | ---: | ---: |
{rows}

## Limits

It knows early modern English verse and nothing else: no facts, no instructions, no other
language, and it repeats the views of its source. Replies are plausible for a line or two. Few
windows that it learnt from were longer than {window:,} tokens; the table shows what becomes of it there.

## Licence

Apache-2.0.
"""


_EARLIER = (
    "1,400 steps with dropout 0.2, stopped past step 900: 1.488",
    "800 steps with dropout 0.25: 1.4852 (1.5360 at 1,024, 1.7161 at 4,096), the weights shipped until then",
    "1,200 steps with dropout 0.25, no windows of 4,096: 1.4290 (1.4446 at 256, 1.5399 at 4,096)",
)
"""Runs before the shipped one, and what the validation text said of them."""


def _windows_until(step: int, steps: int) -> str:
    """Say which windows a run of ``steps`` draws until ``step``.

    Only what the kept weights learnt from: later phases of the run leave nothing in them.
    """
    phases = []
    start = 0
    for until, sizes in PHASES:
        if start < step:
            shares = ", ".join(
                f"{size:,}" if len(set(sizes)) == 1 else f"{size:,} ({sizes.count(size)} of {len(sizes)})"
                for size in sorted(set(sizes))
            )
            end = min(step, math.floor(until * steps))
            phases.append(f"{shares} until step {end:,}")
            start = end
    return "; ".join(phases)


def write_card(
    folder: Path,
    recipe: Recipe,
    model: PreTrainedModel,
    best_step: int,
    minutes: float,
    losses: Mapping[int, ValidationLoss],
) -> None:
    """Write `folder`/README.md; `losses` are by window in tokens and must include `VALIDATION_WINDOW`."""
    main, config = losses[VALIDATION_WINDOW], model.config
    threads = torch.get_num_threads()
    metrics = {"nats_per_byte": main.per_byte, "nats_per_token": main.per_token}
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        model_name=NAME,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="tinyshakespeare",
                dataset_name=f"Tiny Shakespeare, last 10 %, windows of {VALIDATION_WINDOW:,} tokens",
                metric_type=metric,
                metric_value=round(value, 4),
            )
            for metric, value in metrics.items()
        ],
    )
    body = _BODY.format(
        name=NAME,
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        context=config.max_position_embeddings,
        chat_percent=round(100 * recipe.chat_share),
        vocab=config.vocab_size,
        bytes_per_token=main.bytes / main.tokens,
        steps=recipe.steps,
        batch_tokens=recipe.batch_tokens,
        best_step=best_step,
        minutes=minutes,
        precision="products in bfloat16, all else in float32" if recipe.bfloat16 else "float32",
        options=" --bfloat16" if recipe.bfloat16 else "",
        windows=_windows_until(best_step, recipe.steps),
        window=VALIDATION_WINDOW,
        earlier="\n".join(f"- {run}" for run in _EARLIER),
        threads="one CPU thread" if threads == 1 else f"{threads} CPU threads",
        evaluations=-(-recipe.steps // recipe.eval_every),
        muon_lr=recipe.muon_lr,
        adamw_lr=recipe.adamw_lr,
        weight_decay=recipe.weight_decay,
        dropout=recipe.dropout,
        constant_percent=round(100 * recipe.constant_share),
        seed=recipe.seed,
        val_bytes=main.bytes,
        val_tokens=main.tokens,
        rows="\n".join(
            f"| {size:,} | {loss.per_byte:.4f} | {loss.per_token:.4f} |" for size, loss in losses.items()
        ),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")
