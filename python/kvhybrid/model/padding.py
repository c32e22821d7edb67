"""Reading a padded batch: which tokens of ``input_ids`` are text, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from kvhybrid.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from transformers import PreTrainedModel

    Ids: TypeAlias = npt.NDArray[np.int64]


def read_ids(input_ids: torch.Tensor, num_ids: int) -> Ids:
    """Return ``[batch, tokens]`` ids on the CPU; raises ``InvalidRequestError`` when one is out of range."""
    if input_ids.dim() != 2:
        raise InvalidRequestError(f"input_ids must be [batch, tokens], got {list(input_ids.shape)}")
    if input_ids.numel() == 1:  # most steps, which find nothing of numpy in the processor's caches
        token = int(input_ids.item())
        _check_range(token, token, num_ids)
        return np.array([[token]], np.int64)
    ids: Ids = input_ids.detach().cpu().numpy().astype(np.int64, copy=False)
    if ids.size == 0:
        raise InvalidRequestError(f"the prompt is empty: input_ids is {list(input_ids.shape)}")
    check_ids(ids, num_ids)
    return ids


def column_of(call: dict[str, Any]) -> int | None:
    """Return the column at which a call of ``forward`` says that its tokens begin, None when it does not say.

    The mask tells by its length, positions by their beginning.
    """
    mask, columns, positions = (call.get(n) for n in ("attention_mask", "cache_position", "position_ids"))
    if mask is not None:
        return int(mask.shape[1] - call["input_ids"].shape[1])
    if columns is not None:
        return int(columns[0])
    return None if positions is None else int(positions[..., 0].max())


def vocab_size(model: PreTrainedModel) -> int:
    """Return how many token ids the model has embeddings for."""
    weight = cast("torch.Tensor", model.get_input_embeddings().weight)
    return int(weight.shape[0])


def check_ids(ids: npt.NDArray[np.integer], num_ids: int) -> None:
    """Raise ``InvalidRequestError`` unless every id is in ``[0, num_ids)``."""
    _check_range(int(ids.min()), int(ids.max()), num_ids)


def _check_range(low: int, high: int, num_ids: int) -> None:
    if low < 0 or high >= num_ids:
        wrong = low if low < 0 else high
        raise InvalidRequestError(f"token id {wrong} is outside the vocabulary [0, {num_ids})")


def read_padding(mask: torch.Tensor | None, batch: int, columns: int) -> list[int]:
    """Return how many columns of left padding each row has.

    ``mask``: ``[batch, columns]`` of 0 and 1, or None for no padding. Raises ``UnsupportedError`` for
    masks that hide anything but a row's beginning, or all of it, ``InvalidRequestError`` for other shapes.
    """
    if mask is None:
        return [0] * batch
    if mask.dim() != 2:
        raise UnsupportedError(
            f"attention_mask has {mask.dim()} dimensions; a session takes [batch, tokens] only"
        )
    if mask.shape[0] != batch or mask.shape[1] != columns:
        raise InvalidRequestError(f"attention_mask is {list(mask.shape)}, expected [{batch}, {columns}]")
    seen = (mask == 1).cpu().numpy()
    if seen.all():
        return [0] * batch
    if not (seen | (mask == 0).cpu().numpy()).all():
        # transformers counts positions by adding these up.
        raise UnsupportedError("attention_mask holds other values than 0 and 1")
    pads = seen.argmax(axis=1)
    for row, pad in enumerate(pads.tolist()):
        if not seen[row].any():
            raise UnsupportedError(f"row {row} is empty: attention_mask hides all of its {columns} tokens")
        if not seen[row, pad:].all():
            raise UnsupportedError(
                f"row {row}: attention_mask hides tokens after position {pad}; a session takes left padding "
                "only"
            )
    return [int(pad) for pad in pads]


def has_padding(mask: torch.Tensor, pads: list[int], columns: int) -> bool:
    """Return whether ``mask`` hides the first ``pads`` columns of its rows and nothing else.

    Raises ``InvalidRequestError`` when it is not ``[len(pads), columns]``. A row may be padding alone so far.
    """
    if list(mask.shape) != [len(pads), columns]:
        raise InvalidRequestError(f"attention_mask is {list(mask.shape)}, expected [{len(pads)}, {columns}]")
    if not any(pads):
        return bool(mask.all())
    seen = mask.detach().cpu().numpy().astype(bool)
    return bool((seen == (np.arange(columns) >= np.array(pads)[:, None])).all())
