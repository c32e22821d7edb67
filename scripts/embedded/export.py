"""Writes the trained model in the form that transformers' Auto classes read, of any recent version."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (safetensors, float16), configuration and tokenizer into `folder`.

    float16 rather than bfloat16: all weights are small, so its three more bits of mantissa are
    worth more than the range.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.8
    model.generation_config.top_p = 0.95
    model.half()
    model.save_pretrained(folder)
    # Written for the owner alone, which a package installed by another user could not read.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    # Version 4 reads the base of the rotary positions from here.
    _rewrite(folder / "config.json", {"rope_theta": 10000.0}, drop=("_name_or_path",))
    # transformers 5 may write a class's name that version 4 does not know; both know this one.
    _rewrite(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, drop=("is_local",)
    )


def _rewrite(path: Path, values: dict[str, object], drop: tuple[str, ...]) -> None:
    """Set `values` in the JSON object at `path` and remove the keys in `drop`."""
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in drop} | values
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Return the model's most likely reply to `question`, special tokens shown."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    generate: Any = model.generate
    output = generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=120, do_sample=False)
    return str(tokenizer.decode(output[0]))
