"""The small language model that ships inside the package.

It lets the tests, the demo and a first try run offline, through the same classes as any other
model: nothing here knows how it was made or what a cache is. Its card is `embedded/README.md`.
"""

from pathlib import Path

import torch

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError("the embedded model needs transformers: pip install kvhybrid[transformers]") from error


def embedded_model_path() -> Path:
    """Return the folder of the weights, configuration, tokenizer and model card."""
    return Path(__file__).parent / "embedded"


def load_embedded_model(
    device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, in evaluation mode, and its tokenizer; no network is used.

    Args:
        device: where the weights go, as torch names it.
        dtype: what they are computed in. They are stored in float16.
    """
    path = embedded_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model.to(device)  # type: ignore[arg-type]  # the wrapper around `to` hides its signature
    return model, tokenizer
