"""Getting a model and its tokenizer: the embedded one, one from a local path, or one loaded already."""

from __future__ import annotations

from pathlib import Path

import torch

from kvhybrid.errors import ConfigError, UnsupportedError

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
except ImportError as error:
    raise ImportError("models need transformers: pip install kvhybrid[transformers]") from error

__all__ = ["load_model", "load_weights"]


def load_model(
    model: PreTrainedModel | str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the model in evaluation mode, and its tokenizer. Nothing is downloaded.

    ``model``: None for the embedded model, the path of any local Hugging Face model, or a loaded one,
    which stays where it is and as it is. ``dtype`` defaults to float32 on a CPU and to what the weights
    are stored in elsewhere. A loaded model without a ``tokenizer`` gets the one that lies beside its
    weights, if any.

    Raises ``ConfigError`` when there is no readable model at the path, ``UnsupportedError`` for what is
    no causal language model of transformers.
    """
    if model is None:
        from kvhybrid.model.embedded_model import load_embedded_model

        loaded, own = load_embedded_model(str(device), dtype if dtype is not None else torch.float32)
        return loaded, tokenizer if tokenizer is not None else own
    if isinstance(model, str | Path):
        loaded = load_weights(model, torch.device(device), dtype)
        return loaded, tokenizer if tokenizer is not None else _load_tokenizer(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"model must be a transformers model or the path of one, got {type(model).__name__}"
        )
    home = model.name_or_path
    if tokenizer is None and home and Path(home, "tokenizer_config.json").is_file():
        tokenizer = _load_tokenizer(home)
    return model.eval(), tokenizer


def load_weights(path: str | Path, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model at ``path`` in evaluation mode, as ``load_model`` does; its tokenizer is not read."""
    chosen = dtype if dtype is not None else torch.float32 if device.type == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, local_files_only=True)
    except (OSError, ValueError) as error:
        if (kind := _kind_of(path)) is not None and "AutoModelForCausalLM" in str(error):
            raise UnsupportedError(
                f"model={str(path)!r} is of the kind {kind!r}, which transformers has no causal language "
                "model for: only decoders are served"
            ) from error
        what = error if Path(path).exists() else "there is nothing there, and nothing is downloaded"
        raise ConfigError(f"model={str(path)!r}: no readable local Hugging Face model: {what}") from error
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"model={str(path)!r} is a {type(model).__name__}, no transformers model")
    model.to(device)  # type: ignore[arg-type]  # the wrapper around `to` hides its signature
    loaded: PreTrainedModel = model.eval()
    return loaded


def _kind_of(path: str | Path) -> str | None:
    """Return what the configuration at ``path`` calls its model; None when it does not say."""
    try:
        kind: str | None = AutoConfig.from_pretrained(path, local_files_only=True).model_type
    except (OSError, ValueError):
        return None
    return kind


def _load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={str(path)!r}: no readable tokenizer beside the model: {error}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
