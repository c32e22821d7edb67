"""What pages in use are stored in: how many there are of each class, their bytes, and how many stepped down.

Knows the pool's counters and the storage's classes; no tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvhybrid.cache.pages import PageStorage


def stored(counters: Mapping[str, int], storage: PageStorage) -> dict[str, int]:
    """Return flat numbers from ``PagePool.statistics``: of full precision, of both widths of records, of all.

    ``demoted_to_int8_pages`` and ``demoted_to_int4_pages`` count steps from the beginning on.
    """
    size = storage.block_size
    quantized = counters["num_quantized_pages"] - counters["free_quantized_pages"]
    lowest = counters["num_lowest_pages"] - counters["free_lowest_pages"]
    full = counters["num_pages"] - counters["free_pages"] - quantized
    lowered = counters["lowered_pages"]
    found = {
        "full_tokens": full * size,
        "full_bytes": full * storage.layout.bytes_per_page,
        "quantized_tokens": quantized * size,
        "quantized_bits": storage.records[-1].bits if storage.records else 0,
        "int8_pages": 0,
        "int8_bytes": 0,
        "int4_pages": 0,
        "int4_bytes": 0,
        "demoted_to_int8_pages": 0,
        "demoted_to_int4_pages": 0,
    }
    held = (quantized - lowest, lowest)
    steps = (counters["demoted_pages"] - lowered, lowered)
    for records, pages, demoted in zip(storage.records, held, steps, strict=False):
        found[f"int{records.bits}_pages"] = pages
        found[f"int{records.bits}_bytes"] = pages * records.record_bytes
        found[f"demoted_to_int{records.bits}_pages"] = demoted
    found["quantized_bytes"] = found["int8_bytes"] + found["int4_bytes"]
    found["used_bytes"] = found["full_bytes"] + found["quantized_bytes"]
    return found
