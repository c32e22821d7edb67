"""Sessions as bytes: tokens, and K and V as they lie in the pages, under a checksum or a signature.

The format is msgpack, version 1, behind the 32 bytes of a BLAKE2b digest (keyed, when there is a key).
"""

from __future__ import annotations

import hmac
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgpack  # type: ignore[import-untyped]  # has neither stubs nor types
import numpy as np
import torch

from kvhybrid.errors import CorruptPageError, InvalidRequestError, LayoutError, UnsupportedError
from kvhybrid.model.released import Released

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.model.session_rows import SessionRows

FORMAT: Final = "kvhybrid session 1"
DIGEST: Final = 32


def export(rows: SessionRows, fingerprint: str | None, *, key: bytes = b"") -> bytes:
    """Return the session's computed text, with K and V when there is a ``fingerprint`` of the model.

    Raises ``InvalidRequestError`` when its pages were evicted, ``UnsupportedError`` when they are compressed.
    """
    was_released = rows.rows is None
    text = rows.text()
    layers = None
    # K and V alone do not go on from where layers keep a state, too: those are computed again.
    if fingerprint is not None and rows.rows is not None and rows.rows.is_compressed:
        raise UnsupportedError(
            f"session {rows.name!r} is compressed: its K and V are of no whole text, export(pages=False) "
            "gives its tokens"
        )
    if fingerprint is not None and text.columns and rows.states is None:
        try:
            tensors = [rows.materialise(layer) for layer in range(len(rows.cache.storage.keys))]
        finally:
            if was_released:
                rows.release()
        layers = [[_bytes(keys), _bytes(values)] for keys, values in tensors]
    body: bytes = msgpack.packb(
        {
            "format": FORMAT,
            "texts": [tokens.astype("<u4").tobytes() for tokens in text.texts],
            "pads": text.pads,
            "columns": text.columns,
            "layout": rows.cache.layout.fingerprint,
            "model": fingerprint,
            "layers": layers,
        }
    )
    return _digest(body, key) + body


def import_into(rows: SessionRows, data: bytes, fingerprint: Callable[[], str], *, key: bytes = b"") -> None:
    """Replace the session's text with an exported one, K and V included when they are there.

    Raises ``CorruptPageError``, ``LayoutError``, or ``CapacityError`` when its pages find no room; the
    session is then as it was.
    """
    found = _read(data, key)
    text = _text(found, rows)
    layers = found.get("layers")
    if layers is None or rows.states is not None:
        rows.restore(text)
        return
    if found.get("layout") != rows.cache.layout.fingerprint:
        raise LayoutError("the session was exported from another layout (shape, dtype or block_size)")
    if found.get("model") != (known := fingerprint()):
        raise LayoutError(
            "the session was exported from other weights, hooks or settings of a model: fingerprint "
            f"{found.get('model')}, not {known}"
        )
    tensors = _tensors(layers, text, rows)
    before = rows.text()
    rows.restore(text)
    # On a grid, only what was computed on it may be used.
    if rows.grid.width or (lost := rows.reopen()) is None:
        rows.release()
        return
    # Where these pages go the model has the name that it had a moment ago: its fingerprint must be of that.
    if found.get("model") != fingerprint():
        rows.restore(before)
        raise LayoutError("the model's weights or modules changed while a session was imported")
    ids, mask = lost
    start = text.columns - ids.shape[1]
    try:
        for stop in rows.stops(ids.shape[1], len(ids)):
            first = rows.columns
            rows.begin(ids[:, first - start : stop - start], mask[:, :stop])
            assert rows.step is not None
            for layer, (keys, values) in enumerate(tensors):
                rows.step.write(layer, keys[:, :, first:stop], values[:, :, first:stop])
            rows.finish(success=True)
    except BaseException:
        rows.finish(success=False)
        rows.restore(before)
        raise
    rows.release()


def _digest(body: bytes, key: bytes) -> bytes:
    if not isinstance(key, bytes):
        raise InvalidRequestError(f"key must be bytes, got {type(key).__name__}")
    if len(key) > blake2b.MAX_KEY_SIZE:
        raise InvalidRequestError(f"key has {len(key)} bytes, at most {blake2b.MAX_KEY_SIZE} are taken")
    return blake2b(body, digest_size=DIGEST, key=key, person=b"kvhybrid-session").digest()


def _read(data: bytes, key: bytes) -> dict[str, Any]:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InvalidRequestError(f"an exported session is bytes, got {type(data).__name__}")
    digest, body = bytes(data[:DIGEST]), bytes(data[DIGEST:])
    if not hmac.compare_digest(digest, _digest(body, key)):
        raise CorruptPageError("the exported session was changed, cut short or signed with another key")
    try:
        found = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise CorruptPageError(f"no exported session: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CorruptPageError(f"no exported session of format {FORMAT!r}")
    return found


def _text(found: dict[str, Any], rows: SessionRows) -> Released:
    """Return the text, checked: whoever knows the key may still have written nonsense."""
    try:
        texts = [np.frombuffer(tokens, "<u4").astype(np.uint32) for tokens in found["texts"]]
        pads, columns = [int(pad) for pad in found["pads"]], int(found["columns"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CorruptPageError(f"no text in the exported session: {error!r}") from None
    # Padding costs the one who writes it nothing, and us a mask as wide.
    widest = max(rows.cache.pool.num_pages * rows.cache.layout.block_size, *map(len, texts), 0)
    fits = len(pads) == len(texts) and 0 <= columns <= (widest if texts else 0)
    fits = fits and all(
        0 <= pad <= widest and len(text) == max(columns - pad, 0)
        for pad, text in zip(pads, texts, strict=True)
    )
    if not fits or any(len(text) and int(text.max()) >= rows.vocab_size for text in texts):
        raise CorruptPageError("the exported session's tokens do not fit together, or another vocabulary")
    return Released(texts, pads, columns)


def _tensors(layers: Any, text: Released, rows: SessionRows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    storage = rows.cache.storage
    if not isinstance(layers, list) or len(layers) != len(storage.keys):
        raise CorruptPageError(f"the exported session does not hold {len(storage.keys)} layers")
    tensors = []
    for layer, pair in enumerate(layers):
        if not isinstance(pair, list) or len(pair) != 2:
            raise CorruptPageError(f"layer {layer} of the exported session is no pair of K and V")
        found = []
        for raw, pages in zip(pair, (storage.keys[layer], storage.values[layer]), strict=True):
            shape = (len(text.texts), pages.shape[1], text.columns, pages.shape[3])
            if not isinstance(raw, bytes) or len(raw) != int(np.prod(shape)) * pages.element_size():
                raise CorruptPageError(f"layer {layer} of the exported session is not {list(shape)}")
            flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            found.append(flat.view(storage.dtype).view(shape).to(pages.device))
        tensors.append((found[0], found[1]))
    return tensors


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).cpu().numpy())
