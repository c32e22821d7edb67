"""Pages of tensors against plain tensors: what was written is read back, and nothing else was touched."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import KVLayout, LayoutError
from kvhybrid._core import Batch, PagePool
from kvhybrid.cache.page_table import MAX_RUNS, RUN_BYTES
from kvhybrid.cache.pages import PageStorage, PageTable
from kvhybrid.cache.step import Step
from kvhybrid.layout import LayerShape

LAYERS, HEADS, WIDTH, VALUE_WIDTH = 2, 3, 4, 2

dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
sizes = st.sampled_from([1, 2, 4, 16])
counts = st.lists(st.integers(1, 37), min_size=1, max_size=4)

# So large that only MAX_RUNS decides what is gathered.
PAGE_BYTES = RUN_BYTES * MAX_RUNS


def storage_of(pages, block_size=4, dtype="float32"):
    layout = KVLayout(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=WIDTH,
        value_head_dim=VALUE_WIDTH,
        dtype=dtype,
        block_size=block_size,
    )
    storage = PageStorage(layout, pages)
    for pages_of_layer in (*storage.keys, *storage.values):
        pages_of_layer.fill_(-1)
    return storage


def new_tokens(count, generator, *lead):
    """K and V of ``count`` tokens, in float32 as a model gives them."""
    shape = (*lead, HEADS, count)
    return (
        torch.randn(*shape, WIDTH, generator=generator),
        torch.randn(*shape, VALUE_WIDTH, generator=generator),
    )


def everything(storage):
    return [pages.clone() for pages in (*storage.keys, *storage.values)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def tables_for(rows, size, shuffle, generator):
    """Disjoint tables for rows of so many tokens, scattered or in order, and how many pages there are."""
    needs = [-(-sum(row) // size) for row in rows]
    total = sum(needs) + 2
    order = torch.randperm(total, generator=generator) if shuffle else torch.arange(total)
    return [PageTable(ids) for ids in order[: sum(needs)].split(needs)], order[sum(needs) :], total


def read(storage, layer, table, start, stop):
    out = (
        torch.full((HEADS, stop - start, WIDTH), 7.0, dtype=storage.dtype),
        torch.full((HEADS, stop - start, VALUE_WIDTH), 7.0, dtype=storage.dtype),
    )
    storage.gather(layer, table, start, stop, out)
    return out


@given(
    rows=st.lists(counts, min_size=1, max_size=3),
    size=sizes,
    dtype=dtypes,
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_what_is_written_in_runs_is_gathered_again(rows, size, dtype, shuffle, seed, data):
    generator = torch.Generator().manual_seed(seed)
    tables, spare, total = tables_for(rows, size, shuffle, generator)
    storage = storage_of(total, size, dtype)
    plain = {}
    for row, (table, runs) in enumerate(zip(tables, rows, strict=True)):
        for layer in range(LAYERS):
            past, parts = 0, []
            for count in runs:
                key, value = new_tokens(count, generator)
                storage.write_run(layer, table, past, key, value)
                parts.append((key, value))
                past += count
            joined = zip(*parts, strict=True)
            plain[row, layer] = [torch.cat(half, dim=1).to(storage.dtype) for half in joined]
    for (row, layer), expected in plain.items():
        length = sum(rows[row])
        start = data.draw(st.integers(0, length))
        stop = data.draw(st.integers(start, length))
        for a, b in ((0, length), (start, stop)):
            found = read(storage, layer, tables[row], a, b)
            assert same(found, [half[:, a:b] for half in expected])
    for page in spare.tolist():
        assert all((pages[page] == -1).all() for pages in (*storage.keys, *storage.values))


@given(
    length=st.integers(1, 150),
    size=sizes,
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_the_pieces_of_a_table_are_its_tokens_in_order(length, size, shuffle, seed, data):
    generator = torch.Generator().manual_seed(seed)
    (table,), _, total = tables_for([[length]], size, shuffle, generator)
    storage = storage_of(total, size)
    key, value = new_tokens(length, generator)
    storage.write_run(0, table, 0, key, value)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    found = []
    for piece in table.pieces(start, stop, size, PAGE_BYTES):
        view = storage.view(0, "k", piece)
        found.append(view.transpose(0, 1).flatten(1, 2) if piece.pages else view)
    joined = torch.cat(found, dim=1) if found else key[:, :0]
    assert torch.equal(joined, key[:, start:stop])


def test_neighbouring_pages_are_one_view_and_scattered_ones_one_copy():
    storage = storage_of(40)
    (run,) = PageTable(torch.arange(5, 25)).pieces(0, 80, 4, PAGE_BYTES)
    assert (run.page, run.pages) == (5, 20)
    assert storage.view(0, "k", run).data_ptr() == storage.keys[0][5].data_ptr()
    scattered = torch.arange(0, 40, 2)
    assert len(scattered) > MAX_RUNS
    (piece,) = PageTable(scattered).pieces(0, 80, 4, PAGE_BYTES)
    out = torch.empty(len(scattered), HEADS, 4, WIDTH)
    view = storage.view(0, "k", piece, out)
    assert view.data_ptr() == out.data_ptr()
    assert torch.equal(view, storage.keys[0][scattered])


@given(
    pasts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    size=sizes,
    dtype=dtypes,
    seed=st.integers(0, 2**32),
)
def test_a_token_a_row_is_written_where_a_run_of_one_would_be(pasts, size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tables, _, total = tables_for([[past + 1] for past in pasts], size, True, generator)
    one, other = storage_of(total, size, dtype), storage_of(total, size, dtype)
    key, value = new_tokens(1, generator, len(pasts))
    pages = torch.stack([table.ids[past // size] for table, past in zip(tables, pasts, strict=True)])
    offsets = torch.tensor([past % size for past in pasts])
    one.write_slots(1, pages, offsets, key[:, :, 0], value[:, :, 0])
    for row, (table, past) in enumerate(zip(tables, pasts, strict=True)):
        other.write_run(1, table, past, key[row], value[row])
    assert same(everything(one), everything(other))


def test_pages_are_copied_whole_in_every_layer_and_the_source_stays():
    storage = storage_of(4)
    generator = torch.Generator().manual_seed(0)
    for pages in (*storage.keys, *storage.values):
        pages.normal_(generator=generator)
    before = everything(storage)
    storage.copy_pages([(0, 2), (3, 1)])
    for pages, old in zip((*storage.keys, *storage.values), before, strict=True):
        assert torch.equal(pages, old[[0, 3, 0, 3]])


def test_copies_are_made_in_order():
    storage = storage_of(3)
    storage.keys[0][0] = 5
    storage.copy_pages([(0, 1), (1, 2)])
    assert (storage.keys[0] == 5).all()


def test_copying_nothing_changes_nothing():
    storage = storage_of(2)
    before = everything(storage)
    storage.copy_pages([])
    assert same(everything(storage), before)


def test_half_precision_pages_take_half_the_room():
    assert storage_of(8, dtype="float16").nbytes * 2 == storage_of(8).nbytes
    storage = storage_of(8, dtype="float16")
    owned = sum(pages.numel() * pages.element_size() for pages in (*storage.keys, *storage.values))
    assert storage.nbytes == owned


def test_writing_nothing_and_reading_nothing_is_allowed():
    storage = storage_of(2)
    table = PageTable(torch.tensor([1]))
    before = everything(storage)
    key, value = new_tokens(0, None)
    storage.write_run(0, table, 3, key, value)
    storage.gather(0, table, 2, 2, new_tokens(0, None))
    assert same(everything(storage), before)


@pytest.fixture
def planned():
    """A step of two rows, of five tokens and three, and where it writes."""
    storage = storage_of(8)
    pool = PagePool(8, 4)
    sequences = [pool.open(np.arange(start, start + count)) for start, count in ((0, 5), (50, 3))]
    return storage, Step.plan(storage, Batch(pool, sequences), places=[(0, 0), (1, 0)]), sequences


def shaped(key, value=None):
    value = key[:3] + (VALUE_WIDTH,) * (len(key) == 4) if value is None else value
    return torch.zeros(key), torch.zeros(value)


FITS = (2, HEADS, 5, WIDTH)


@pytest.mark.parametrize(
    ("layer", "key", "value", "says"),
    [
        (LAYERS, FITS, None, "layer 2 is outside the layout's 2 layers"),
        (-1, FITS, None, "layer -1 is outside the layout's 2 layers"),
        (0, FITS[1:], (2, HEADS, 5, VALUE_WIDTH), "must have 4 dimensions, got 3 and 4"),
        (0, FITS, (HEADS, 5, VALUE_WIDTH), "must have 4 dimensions, got 4 and 3"),
        (0, (2, HEADS + 1, 5, WIDTH), None, "layer 0: K has 4 heads of 4, the layout says 3 of 4"),
        (1, (2, 1, 5, WIDTH), None, "layer 1: K has 1 heads of 4, the layout says 3 of 4"),
        (0, (2, HEADS, 5, WIDTH + 1), None, "layer 0: K has 3 heads of 5, the layout says 3 of 4"),
        (0, FITS, (2, 1, 5, VALUE_WIDTH), "layer 0: V has 1 heads of 2, the layout says 3 of 2"),
        (0, FITS, FITS, "layer 0: V has 3 heads of 4, the layout says 3 of 2"),
        (0, FITS, (2, HEADS, 4, VALUE_WIDTH), "layer 0: K has 5 tokens, V has 4"),
        pytest.param(
            0,
            (2, HEADS, 4, WIDTH),
            None,
            "",
            id="too few tokens for the step",
        ),
        pytest.param(
            0,
            (1, HEADS, 5, WIDTH),
            None,
            "",
            id="too few rows for the step",
        ),
        pytest.param(
            0,
            FITS,
            (1, HEADS, 5, VALUE_WIDTH),
            "",
            id="V has fewer rows than K",
        ),
    ],
)
def test_a_wrong_shape_is_refused_before_anything_is_written(layer, key, value, says, planned):
    storage, step, _ = planned
    before = everything(storage)
    with pytest.raises(LayoutError) as raised:
        step.write(layer, *shaped(key, value))
    assert says in str(raised.value)
    assert same(everything(storage), before)
    step.write(0, *shaped(FITS))


def test_columns_of_no_row_are_left_out(planned):
    storage, step, sequences = planned
    key, value = new_tokens(9, torch.Generator().manual_seed(1), 4)
    for layer in range(storage.layout.num_layers):
        step.write(layer, key, value)
    step.commit()
    for row, (sequence, count) in enumerate(zip(sequences, (5, 3), strict=True)):
        table = PageTable(torch.from_numpy(np.frombuffer(sequence.block_table(), np.int32).copy()).long())
        found = read(storage, 0, table, 0, count)
        assert same(found, (key[row, :, :count], value[row, :, :count]))


def test_few_bytes_in_several_runs_are_gathered_and_many_are_read_in_place():
    ids = torch.tensor([3, 4, 9, 10, 20])
    (gathered,) = PageTable(ids).pieces(0, 20, 4, 64)
    assert gathered.scattered is not None
    runs = PageTable(ids).pieces(0, 20, 4, RUN_BYTES)
    assert [(piece.page, piece.pages) for piece in runs] == [(3, 2), (9, 2), (20, 1)]
    (alone,) = PageTable(torch.arange(5)).pieces(0, 20, 4, 64)
    assert alone.scattered is None


@pytest.fixture
def differing():
    """Three layers: one shape, no K and V, another shape; and a step of two rows over them."""
    shapes = [
        LayerShape(num_kv_heads=1, head_dim=4, value_head_dim=2),
        None,
        LayerShape(num_kv_heads=2, head_dim=8, value_head_dim=8),
    ]
    storage = PageStorage(KVLayout.of_layers(shapes, block_size=4), 8)
    pool = PagePool(8, 4)
    rows = [pool.open(np.arange(count, dtype=np.uint32) + 10 * count) for count in (5, 3)]
    step = Step.plan(storage, Batch(pool, rows), places=[(0, 0), (1, 0)])
    return storage, step, rows


def test_layers_that_differ_are_kept_each_in_its_shape(differing):
    storage, step, rows = differing
    written = {0: (torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 2)), 2: torch.randn(2, 2, 2, 5, 8).unbind()}
    for layer, (key, value) in written.items():
        assert not step.is_complete
        step.write(layer, key, value)
    assert step.is_complete
    step.commit()
    storage.copy_pages([(0, 7)])
    table = PageTable(torch.from_numpy(np.frombuffer(rows[0].block_table(), np.int32).copy()).long())
    for layer, (key, value) in written.items():
        out = torch.empty(key.shape[1:]), torch.empty(value.shape[1:])
        storage.gather(layer, table, 0, 5, out)
        assert same(out, (key[0], value[0]))
    assert storage.nbytes == sum(pages.nbytes for pages in (*storage.keys, *storage.values))


def test_a_layer_that_keeps_nothing_cannot_be_written(differing):
    _, step, _ = differing
    with pytest.raises(LayoutError, match="layer 1 keeps no K and V"):
        step.write(1, torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4))


def test_each_layers_pages_lie_on_its_device():
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)
    devices = [torch.device("cpu"), torch.device("meta")]
    storage = PageStorage(layout, 8, devices=devices)
    assert [pages.device for pages in storage.keys] == devices
    pool = PagePool(8, 4)
    rows = [pool.open(np.arange(3, dtype=np.uint32) + 10 * row) for row in range(2)]
    batch = Batch(pool, rows)
    for tokens in (None, np.array([1, 2], np.uint32)):  # runs, then a token a row
        step = Step.plan(storage, batch, tokens=tokens)
        for layer, device in enumerate(devices):
            step.write(layer, *(torch.zeros(1, 1, step.num_tokens, 4, device=device) for _ in range(2)))
        step.commit()
