"""What a transformers configuration says about the K and V of its model.

Reads attributes by name, so that it serves every transformers version and needs none of them.
It does not know what the model computes: a model whose layers disagree is refused, not guessed at.
"""

from typing import Any, TypedDict

from kvhybrid.errors import LayoutError, UnsupportedError

__all__ = ["ModelShape", "read_model_shape"]

ATTENTION_LAYERS = frozenset({"attention", "full_attention", "sliding_attention", "chunked_attention"})


class ModelShape(TypedDict):
    """The layout fields that follow from the model alone; ``dtype`` is a name or torch's object."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: object


def read_model_shape(config: Any) -> ModelShape:
    """Return the shape of one layer's K and V, and in how many layers it is kept.

    Raises ``LayoutError`` naming the missing attribute (a model without attention has no KV cache) and
    ``UnsupportedError`` where layers differ from each other or keep a recurrent state.
    """
    text = _text_config(config)
    name = type(text).__name__
    if _read(text, "is_encoder_decoder"):
        raise UnsupportedError(f"{name}: encoder-decoder models keep a second, cross-attention cache")
    num_heads = _read(text, "num_attention_heads", "n_head", "n_heads")
    if not num_heads:
        raise LayoutError(f"{name} has no num_attention_heads: a model without attention has no KV cache")
    head_dim, value_head_dim = _head_dims(text, name, num_heads)
    return {
        "num_layers": _num_layers(text, name),
        "num_kv_heads": _num_kv_heads(text, num_heads),
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
        "dtype": _dtype(text) or _dtype(config) or "float32",
    }


def _text_config(config: Any) -> Any:
    """The decoder's part of a multimodal configuration, or the configuration itself."""
    if hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return getattr(config, "text_config", None) or config


def _read(config: Any, *names: str) -> Any:
    """The first attribute that is there and not ``None``."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers 5 raises it for attributes that vary by layer
            value = [None]
        if isinstance(value, list | tuple):
            raise UnsupportedError(
                f"{type(config).__name__}.{name} varies by layer: one layout cannot hold it"
            )
        if value is not None:
            return value
    return None


def _dtype(config: Any) -> Any:
    """The weights' dtype; transformers 4 has it under the older name, which 5 warns about."""
    return _read(config, "dtype" if hasattr(config, "dtype") else "torch_dtype")


def _num_layers(config: Any, name: str) -> int:
    num_layers = _read(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if not num_layers:
        raise LayoutError(f"{name} has no num_hidden_layers")
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    if foreign := sorted(kinds - ATTENTION_LAYERS):
        raise UnsupportedError(f"{name} has layers without a plain KV cache: {', '.join(foreign)}")
    # Gemma 3n: the last layers read the K and V of earlier ones and keep none of their own.
    return int(num_layers) - int(_read(config, "num_kv_shared_layers") or 0)


def _num_kv_heads(config: Any, num_heads: int) -> int:
    # Falcon's and GPT-BigCode's flag; Falcon's newer decoder has it set and means nothing by it.
    if _read(config, "multi_query") and not _read(config, "new_decoder_architecture"):
        return 1
    if _read(config, "new_decoder_architecture"):
        return int(_read(config, "num_kv_heads") or num_heads)
    return int(_read(config, "num_key_value_heads") or num_heads)


def _head_dims(config: Any, name: str, num_heads: int) -> tuple[int, int]:
    """Head sizes of keys and of values."""
    nope, rope = _read(config, "qk_nope_head_dim"), _read(config, "qk_rope_head_dim")
    if nope and rope:  # latent attention: `head_dim` names the rotary part alone
        return nope + rope, _read(config, "v_head_dim") or nope + rope
    if head_dim := _read(config, "head_dim"):
        return head_dim, head_dim
    hidden_size = _read(config, "hidden_size", "n_embd", "d_model")
    if not hidden_size:
        raise LayoutError(f"{name} has neither head_dim nor hidden_size")
    if hidden_size % num_heads:
        raise LayoutError(
            f"{name}: hidden_size={hidden_size} is no multiple of num_attention_heads={num_heads}"
        )
    return hidden_size // num_heads, hidden_size // num_heads
