"""Two LoRA adapters on one model, switched between requests.

An adapter changes K and V, so what one adapter computed is of no use to another, nor to the bare model. Each
has pages of its own: the first request under an adapter is computed, later ones reuse it, in whatever order
the adapters take turns.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from saved import Saved, counting

import kvhybrid
from kvhybrid.model.load import load_model

TURNS = ["courtly", "plain", None, "courtly", None, "plain", "plain", "courtly"]  # None: no adapter
OPENING = """The court of King Richard, in the tower. Enter the King with his train, and after him the
Messenger. The King speaks to everyone who comes before him, and none may sit while he stands. It is night,
the ships are late, and nobody has seen the Duke of York since the bells rang for the evening.

"""
PROMPTS = [OPENING + line for line in ("KING RICHARD:\n", "MESSENGER:\n")]


def with_adapters() -> tuple[PeftModel, object]:
    """Return the embedded model with two adapters; ``PeftModel.from_pretrained`` loads trained ones."""
    torch.manual_seed(0)
    model, tokenizer = load_model()
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora, adapter_name="courtly")
    adapted.add_adapter("plain", lora)
    return adapted.eval(), tokenizer


def answer(model: PeftModel, tokenizer, adapter: str | None) -> list[str]:
    """Write one line for each prompt under ``adapter``."""
    if adapter is not None:
        model.set_adapter(adapter)
    texts = []
    with model.disable_adapter() if adapter is None else nullcontext():
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
            texts.append(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]))
    return texts


def main() -> Saved:
    """Let the adapters take turns, without kvhybrid and with it."""
    model, tokenizer = with_adapters()
    with counting(model) as plain:
        expected = [answer(model, tokenizer, adapter) for adapter in TURNS]

    answers, seen = [], 0
    with kvhybrid.attach(model) as attachment, counting(model) as cached:
        for adapter in TURNS:
            answers.append(answer(model, tokenizer, adapter))
            found = int(attachment.cache.get_stats()["cached_tokens"]) - seen
            seen += found
            print(f"{adapter or 'no adapter':>10}: {found:>3} tokens from cache  {answers[-1][0]!r}")

    saved = Saved(plain.tokens, cached.tokens, answers == expected)
    print(saved)
    return saved


if __name__ == "__main__":
    main()
