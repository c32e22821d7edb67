"""Quantized pages, held against the format's own words in float64: sizes, bytes, bounds, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhybrid.cache import codec_torch
from kvhybrid.cache.codec import Codec
from kvhybrid.errors import LayoutError

KINDS = ("keys", "values")


def encoded(codec, kind, pages, ids=None, records=None, record_ids=None):
    """Quantize pages; the records and which pages were accepted."""
    count, heads, block, width = pages.shape
    size = (codec.key_bytes if kind == "keys" else codec.value_bytes)(width, block)
    if records is None:
        records = torch.full((count, heads, size), 0xEE, dtype=torch.uint8)
    quantize = codec.quantize_keys if kind == "keys" else codec.quantize_values
    return records, quantize(pages, ids, records, record_ids)


def decoded(codec, kind, records, block, width, dtype=torch.float32):
    out = torch.empty(*records.shape[:2], block, width, dtype=dtype)
    (codec.dequantize_keys if kind == "keys" else codec.dequantize_values)(records, None, out)
    return out


def steps_and_numbers(record, bits, kind, block, width):
    """Read one record by the format's definition: float64 steps and numbers, both ``[block, width]``."""
    record = record.numpy()
    groups, members = (width, block) if kind == "keys" else (block, width)
    row = members if bits == 8 else -(-members // 2)
    codes = record[: groups * row].reshape(groups, row)
    if bits == 4:
        codes = np.concatenate((codes & 15, codes >> 4), 1)
        assert not codes[:, members:].any()
        codes = codes[:, :members]
    scale = record[groups * row :][: 2 * groups].copy().view("<f2").astype(np.float64)[:, None]
    minimum = record[groups * (row + 2) :][: 2 * groups].copy().view("<f2").astype(np.float64)[:, None]
    numbers, steps = codes * scale + minimum, scale + 0 * codes
    if kind == "keys":
        end = groups * (row + 4)
        numbers, steps = numbers.T, steps.T
    else:
        end = groups * (row + 4) + width
        exponents = 2.0 ** record[groups * (row + 4) : end].copy().view("i1")
        numbers, steps = numbers * exponents, steps * exponents
    assert len(record) == -(-end // 16) * 16
    assert not record[end:].any(), "padding is zero"
    return steps, numbers


def random_pages(count, heads, block, width, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, heads, block, width, generator=generator).to(dtype)


def assert_within_half_a_step(codec, kind, pages, records):
    block, width = pages.shape[2:]
    for page, record in zip(pages.flatten(0, 1), records.flatten(0, 1), strict=True):
        steps, numbers = steps_and_numbers(record, codec.bits, kind, block, width)
        true = page.double().numpy()
        # Codes are computed in float32: their distance is half a step and what that rounds.
        bound = steps * (0.5 + 1e-4) + np.abs(true) * 2.0**-23 + 2.0**-80
        assert (np.abs(numbers - true) <= bound).all()
        if kind == "keys":
            # The range is divided into all levels, but for what rounding scale and minimum outwards costs.
            spread = true.max(0) - true.min(0)
            least = true.min(0)
            outwards = spread * 2.0**-9 + np.abs(least) * 2.0**-9 + 2.0**-24 * 300
            outwards += 1.01 * np.maximum(least - 65504, 0)  # what float16 has no minimum for is in the range
            assert (steps[0] * (2**codec.bits - 1) <= spread + outwards).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block", "width"), [(16, 1), (16, 5), (64, 40), (32, 80), (64, 96), (128, 31), (64, 128)]
)
def test_every_number_comes_back_within_half_a_step(kind, bits, dtype, block, width):
    codec = Codec(bits)
    pages = random_pages(3, 2, block, width, dtype=dtype)
    records, accepted = encoded(codec, kind, pages)
    assert accepted.tolist() == [True] * 3
    assert_within_half_a_step(codec, kind, pages, records)
    for out_dtype in (torch.float32, dtype):
        numbers = decoded(codec, kind, records, block, width, out_dtype)
        for page, record in zip(numbers.flatten(0, 1), records.flatten(0, 1), strict=True):
            wanted = torch.from_numpy(steps_and_numbers(record, bits, kind, block, width)[1])
            limit = torch.finfo(out_dtype).eps * 2
            torch.testing.assert_close(page.double(), wanted, rtol=limit, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_finite_page_that_is_accepted_comes_back_within_half_a_step(kind, bits, data):
    block = data.draw(st.sampled_from([16, 32]))
    width = data.draw(st.integers(1, 9))
    numbers = st.one_of(
        st.floats(-65504, 65504, width=32),
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 6e-8, 0.1, 65504.0, -65504.0, 1e5, -1e5]),
    )
    flat = data.draw(st.lists(numbers, min_size=1, max_size=block * width))
    pages = torch.tensor([flat[i % len(flat)] for i in range(block * width)]).view(1, 1, block, width)
    codec = Codec(bits)
    records, accepted = encoded(codec, kind, pages)
    if accepted.item():
        assert_within_half_a_step(codec, kind, pages, records)
    else:
        assert pages.abs().max() > 65504 / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_constant_groups_come_back_exactly_where_float16_has_them(kind, bits):
    codec = Codec(bits)
    for number in (0.0, -1.5, 1024.0, 2.0**-24):
        pages = torch.full((1, 1, 16, 7), number)
        records, accepted = encoded(codec, kind, pages)
        assert accepted.all()
        assert torch.equal(decoded(codec, kind, records, 16, 7), pages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_page_with_nan_or_infinity_is_refused_and_its_neighbours_are_not(kind, bits, dtype, bad):
    codec = Codec(bits)
    for place in ((1, 0, 0, 0), (1, 1, 31, 20), (1, 0, 17, 11)):
        pages = random_pages(3, 2, 32, 21, dtype=dtype)
        pages[place] = bad
        records, accepted = encoded(codec, kind, pages)
        assert accepted.tolist() == [True, False, True]
        assert_within_half_a_step(codec, kind, pages[::2], records[::2])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_page_beyond_what_float16_can_scale_is_refused(bits):
    codec = Codec(bits)
    for numbers in ((0.0, 3e38), (-1e5, 0.0), (-3e38, 3e38)):
        pages = torch.tensor(numbers).repeat(8)[None, None, :, None].expand(1, 1, 16, 3).contiguous()
        for kind in KINDS:
            assert encoded(codec, kind, pages)[1].tolist() == [False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_float16_never_becomes_infinite(kind, bits):
    codec = Codec(bits)
    pages = torch.full((1, 1, 16, 4), 65504.0, dtype=torch.float16)
    pages[0, 0, ::2, ::2] = -65504.0
    records, accepted = encoded(codec, kind, pages)
    assert accepted.all()
    assert decoded(codec, kind, records, 16, 4, torch.float16).isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_channel_of_the_values_costs_the_others_nothing(bits):
    codec = Codec(bits)
    pages = random_pages(2, 2, 64, 24)
    plain = decoded(codec, "values", encoded(codec, "values", pages)[0], 64, 24)
    pages[..., 5] *= 100
    records, _ = encoded(codec, "values", pages)
    error = (decoded(codec, "values", records, 64, 24) - pages).abs()
    others = [channel for channel in range(24) if channel != 5]
    assert error[..., others].max() < 2 * (plain - pages)[..., others].abs().max()
    exponents = records[0, 0, 64 * 24 * bits // 8 + 4 * 64 :][:24].view(torch.int8)
    assert exponents[5] in (6, 7)  # about 2 to the 6.6
    assert not exponents[others].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_sizes_are_what_the_format_says(bits):
    codec = Codec(bits)
    assert codec.key_bytes(128, 64) == 128 * 64 * bits // 8 + 4 * 128
    assert codec.value_bytes(128, 64) == 64 * 128 * bits // 8 + 4 * 64 + 128
    assert codec.value_bytes(5, 16) == {8: 80 + 64 + 5 + 11, 4: 48 + 64 + 5 + 11}[bits]


@pytest.mark.parametrize("kind", KINDS)
def test_pages_go_where_their_ids_say_and_touch_nothing_else(kind):
    codec = Codec(8)
    pages = random_pages(5, 2, 16, 8)
    size = (codec.key_bytes if kind == "keys" else codec.value_bytes)(8, 16)
    records = torch.full((7, 2, size), 0xEE, dtype=torch.uint8)
    _, accepted = encoded(codec, kind, pages, torch.tensor([4, 1, 1]), records, torch.tensor([0, 6, 2]))
    assert accepted.tolist() == [True, True, True]
    assert (records[[1, 3, 4, 5]] == 0xEE).all()
    assert torch.equal(records[6], records[2])
    # Back into a view of tokens side by side, as a gather has it.
    room = torch.full((2, 4 * 16, 8), 9.0)
    view = room.unflatten(1, (4, 16)).transpose(0, 1)
    back = codec.dequantize_keys if kind == "keys" else codec.dequantize_values
    back(records, torch.tensor([0, 6]), view, torch.tensor([3, 1]))
    torch.testing.assert_close(room[:, 48:], pages[4], atol=0.02, rtol=0)
    torch.testing.assert_close(room[:, 16:32], pages[1], atol=0.02, rtol=0)
    assert (room[:, :16] == 9).all()
    assert (room[:, 32:48] == 9).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "width"), [(32, 19), (16, 1), (64, 40)])
def test_what_torch_makes_of_a_page_is_what_the_core_makes(kind, bits, dtype, block, width):
    """A device's records may move to the host, and back: same bytes, but for what rounds the other way."""
    codec = Codec(bits)
    pages = random_pages(4, 3, block, width, dtype=dtype)
    pages[..., width // 2] *= 50
    pages[2, 1, 3, 0] = math.nan
    records, accepted = encoded(codec, kind, pages)
    made = torch.full_like(records, 0xEE)
    ids = torch.arange(4)
    assert torch.equal(accepted, codec_torch.quantize(kind, bits, pages, ids, made, ids))
    assert accepted.tolist() == [True, True, False, True]
    different = (made != records)[accepted].float().mean()
    assert different < 0.01
    assert_within_half_a_step(codec, kind, pages[accepted], made[accepted])
    for out_dtype in (torch.float32, dtype):
        read = torch.empty_like(pages[accepted], dtype=out_dtype)
        codec_torch.dequantize(kind, bits, records, ids[accepted], read, torch.arange(3))
        numbers = decoded(codec, kind, records[accepted], block, width, out_dtype)
        places = torch.finfo(out_dtype).eps * 2
        torch.testing.assert_close(read, numbers, rtol=places, atol=1e-5)


def test_nothing_to_do_is_done():
    records, accepted = encoded(Codec(8), "keys", torch.empty(0, 2, 16, 8))
    assert accepted.tolist() == []
    assert decoded(Codec(8), "keys", records, 16, 8).shape == (0, 2, 16, 8)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    codec = Codec(4)
    pages = torch.zeros(4, 2, 16, 8)
    records = torch.full((4, 2, codec.key_bytes(8, 16)), 7, dtype=torch.uint8)
    first, second = torch.tensor([0, 1]), torch.tensor([2, 3])
    for arguments, message in (
        ((pages[0], None, records, None), "dimensions"),
        ((pages.double(), None, records, None), "float64"),
        ((pages, None, records.to(torch.int8), None), "int8"),
        ((pages, None, records[..., :-1], None), r"\[2, \d+\]"),
        ((pages[:, :1], None, records, None), "1 heads"),
        ((pages.transpose(2, 3).contiguous().transpose(2, 3), None, records, None), "side by side"),
        ((pages, None, records.transpose(0, 1).contiguous().transpose(0, 1), None), "contiguous"),
        ((pages, first, records, torch.tensor([2])), "2 pages cannot become 1"),
        ((pages, first.int(), records, second), "int64"),
        ((pages, first, records, torch.tensor([2, 2])), "twice"),
        ((torch.zeros(4, 2, 8, 8), None, records, None), "at least 16"),
        ((torch.zeros(4, 2, 24, 8), None, records, None), "power of two"),
    ):
        with pytest.raises(LayoutError, match=message):
            codec.quantize_keys(*arguments)
    for ids, record_ids in (
        (torch.tensor([0, 4]), second),
        (torch.tensor([-1, 0]), second),
        (first, torch.tensor([4, 0])),
    ):
        with pytest.raises(IndexError, match="not within 4 pages"):
            codec.quantize_keys(pages, ids, records, record_ids)
    assert (records == 7).all()
    with pytest.raises(LayoutError, match="twice"):
        codec.dequantize_keys(records, first, pages, torch.tensor([1, 1]))
    with pytest.raises(LayoutError, match="share a place"):
        codec.dequantize_keys(records, None, torch.zeros(1, 2, 16, 8).expand(4, 2, 16, 8))
    with pytest.raises(LayoutError, match="not 5"):
        Codec(5)
