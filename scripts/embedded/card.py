"""Writes the model card: what the weights are, how they were made, and what was measured on them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from embedded.measure import ValidationLoss
from embedded.training import PHASES, Recipe

NAME = "kvhybrid-embedded"
WINDOW = 256
"""Tokens; the window of the figure that the card's metadata gives."""

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

{steps:,} steps of {batch_tokens:,} tokens, {minutes:.0f} minutes of wall clock on {threads} CPU threads
({precision}); kept: step {best_step:,}, the best by validation.
Windows of {windows} tokens up to the step that was kept.
Muon ({muon_lr}) for the layers' matrices, AdamW ({adamw_lr}) for the rest, weight decay {weight_decay},
dropout {dropout} on both residual branches; the rates constant for the first {constant_percent} % of the
steps, then linearly to zero. Seed {seed}. Made by `scripts/train_embedded_model.py{options}`.

The checkpoint was chosen by the text it is measured on, the best of {evaluations} measurements of the run; so
were the recipe's defaults (steps, dropout, decay), after one earlier run of 1,400 steps with dropout 0.2
that was stopped past step 900 at 1.488 nats per byte. The figures below are therefore flattering: no
text was held back from these choices.

## Validation

Mean negative log-likelihood of the last 10 % ({val_bytes:,} bytes, {val_tokens:,} predicted tokens), in
windows that share no context, each starting cold:

| window, tokens | nats per byte | nats per token |
| ---: | ---: | ---: |
{rows}

## Limits

It knows early modern English verse and nothing else: no facts, no instructions, no other
language, and it repeats the views of its source. Replies are plausible for a line or two. It
learnt from no window longer than {longest} tokens; the table shows what becomes of it in longer ones.

## Licence

Apache-2.0.
"""


def write_card(
    folder: Path,
    recipe: Recipe,
    model: PreTrainedModel,
    best_step: int,
    minutes: float,
    losses: Mapping[int, ValidationLoss],
) -> None:
    """Write `folder`/README.md; `losses` are by window in tokens and must include `WINDOW`."""
    main, config = losses[WINDOW], model.config
    # Only what the kept weights learnt from: later phases of the run left nothing in them.
    starts = (0.0, *(until for until, _ in PHASES))
    seen = [
        window for start, (_, window) in zip(starts, PHASES, strict=False) if start < best_step / recipe.steps
    ]
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
                dataset_name=f"Tiny Shakespeare, last 10 %, windows of {WINDOW} tokens",
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
        windows=" and ".join(str(window) for window in seen),
        threads=torch.get_num_threads(),
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
        longest=seen[-1],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")
