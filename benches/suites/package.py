"""What the package costs before it does anything: importing it, downloading it, keeping its books."""

import io
import zipfile
from pathlib import Path

import numpy as np

import kvhybrid
from kvhybrid._core import Batch, PagePool


def timeraw_import():
    """Importing the package, in a fresh interpreter."""
    return "import kvhybrid"


def timeraw_import_configuration():
    """The same with the configuration, which brings pydantic."""
    return "from kvhybrid import KVCacheConfig"


def track_wheel_bytes():
    """The package's files, compressed as in a wheel."""
    archive = io.BytesIO()
    root = Path(kvhybrid.__file__).parent
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                wheel.write(path, path.relative_to(root))
    return len(archive.getvalue())


track_wheel_bytes.unit = "bytes"


def track_bytes_per_block():
    """Bookkeeping of one cached block of 16 tokens, token ids not counted."""
    block, blocks, length = 16, 8192, 1024
    pool = PagePool(blocks, block)
    for first in range(0, blocks * block, length):
        sequence = pool.open(np.arange(first, first + length, dtype=np.int32))
        plan = Batch(pool, [sequence]).plan()
        plan.commit()
        sequence.close()
    return pool.bookkeeping_bytes() / blocks


track_bytes_per_block.unit = "bytes"
