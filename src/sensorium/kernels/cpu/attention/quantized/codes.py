"""Vectors of float32 to integers and a scale: keys, values and queries, and weights of tokens.

The codes and scales of keys and values are those of ``int8_cache``.
"""

from __future__ import annotations

from typing import Any

from numba import types

from sensorium.kernels import int8_cache
from sensorium.kernels.cpu.attention.quantized.pairs import (
    counted_product,
    exchange1,
    exchange2,
    exchange4,
    exchange8,
    rounded_up,
    store_bytes,
    store_shorts,
)
from sensorium.kernels.cpu.attention.softmax import hide_and_peak
from sensorium.kernels.cpu.linear.integer.rows import largest_magnitude, magnitudes
from sensorium.kernels.cpu.numeric import (
    INLINE,
    OUTLINE,
    WIDTH,
    exp16,
    f32,
    largest,
    load16,
    load_part,
    njit,
    peak,
    pointer,
    recast,
    shifted,
    splat,
    store,
    store16,
    store_part,
    total,
)

SHORT_LIMIT = f32(32767.0)
"""Largest integer of a query or weight. Times 127 and summed over 512 it still fits int32."""
MOST_HEAD_DIM = 512
_LIMIT, _LEAST = f32(int8_cache.LIMIT), f32(int8_cache.LEAST)
_MOST = f32(3.4028234663852886e38)
_NAN = f32("nan")


@njit(**INLINE)
def padded(number: Any, multiple: Any) -> Any:
    """Return a number, rounded up to a multiple."""
    return (number + multiple - 1) // multiple * multiple


@njit(**OUTLINE)
def transform(row: Any, dim: Any) -> None:
    """Compute ``int8_cache.hadamard`` of a row of float32 in place."""
    size = dim & -dim
    for i in range(0, dim, WIDTH):
        count = min(WIDTH, dim - i)
        x = load_part(row, i, count)
        if size > 1:
            x = exchange1(x)
        if size > 2:
            x = exchange2(x)
        if size > 4:
            x = exchange4(x)
        if size > 8:
            x = exchange8(x)
        store_part(row, i, x, count)
    step = WIDTH
    while step < size:
        for base in range(0, dim, 2 * step):
            for j in range(base, base + step, WIDTH):
                a, b = load16(row, j), load16(row, j + step)
                store16(row, j, a + b)
                store16(row, j + step, a - b)
        step *= 2


@njit(**INLINE)
def largest_of(row: Any, dim: Any) -> Any:
    """Return the largest magnitude of a row; infinite or NaN if one number is."""
    peaks = splat(f32(0.0))
    for i in range(0, dim, WIDTH):
        peaks = magnitudes(peaks, load_part(row, i, min(WIDTH, dim - i)))
    return largest_magnitude(peaks)


@njit(**INLINE)
def write_codes(row: Any, dim: Any, codes: Any) -> Any:
    """Quantize a row (D,) of any element type to int8 codes, and return their scale.

    Codes behind D, to a multiple of 16, are zero.
    """
    top = largest_of(row, dim)
    scale, inverse = f32(0.0), f32(0.0)
    if not top <= _MOST:
        scale = _NAN
    elif top >= _LEAST:
        scale = rounded_up(top / _LIMIT)
        inverse = f32(1.0) / scale
    for i in range(0, dim, WIDTH):
        store_bytes(codes, i, load_part(row, i, min(WIDTH, dim - i)), splat(inverse))
    return scale


@njit(**OUTLINE)
def write_key(
    key: Any, dim: Any, codes: Any, k_cache: Any, record: Any, offset: Any, block_size: Any
) -> None:
    """Quantize a key (float32, overwritten) into column ``offset`` of the record at a byte.

    codes: scratch of D bytes, padded to a multiple of 16.
    """
    transform(key, dim)
    scale = write_codes(key, dim, codes)
    depth = padded(dim, 2)
    own = shifted(k_cache, record)
    columns, pairs = recast(own, types.int16), recast(codes, types.int16)
    for pair in range(depth // 2):
        columns[pair * block_size + offset] = pairs[pair]
    store(recast(shifted(own, depth * block_size), types.uint16), offset, scale)


@njit(**INLINE)
def write_value(
    value: Any, dim: Any, codes: Any, v_cache: Any, record: Any, offset: Any, block_size: Any
) -> None:
    """Quantize a value (stored type) into row ``offset`` of the record at a byte.

    codes: as for ``write_key``.
    """
    scale = write_codes(value, dim, codes)
    width = padded(dim, WIDTH)
    own = shifted(v_cache, record)
    row = shifted(own, offset // 2 * 2 * width + offset % 2)
    for d in range(width):
        row[2 * d] = codes[d]
    store(recast(shifted(own, width * block_size), types.uint16), offset, scale)


@njit(**OUTLINE)
def write_query(query: Any, dim: Any, out: Any) -> Any:
    """Quantize a query (float32, overwritten) to int16, and return the factor of the integers.

    out: D int16, padded with zeros to a multiple of 16.
    """
    transform(query, dim)
    top = largest_of(query, dim)
    factor, inverse = f32(0.0), f32(0.0)
    if not top <= _MOST:
        factor = _NAN
    elif top >= _LEAST:
        factor, inverse = top / SHORT_LIMIT, SHORT_LIMIT / top
    for i in range(0, dim, WIDTH):
        store_shorts(out, i, load_part(query, i, min(WIDTH, dim - i)), splat(inverse))
    return factor


@njit(**OUTLINE)
def write_weights(
    scores: Any,
    v_scales: Any,
    first: Any,
    low: Any,
    visible: Any,
    count: Any,
    top: Any,
    out: Any,
) -> Any:
    """Turn one row of scores into int16 weights e^(score - new top) times the scales of values.

    Tokens [low, visible) are seen. Weights of other columns from ``first`` (a multiple of 16) to
    ``count``, padded to a multiple of 16, are zero. This is one step of the online softmax. Returns
    (new top, sum without the scales, factor of the integers). The scores are overwritten.
    """
    begin, end = low // WIDTH * WIDTH, padded(visible, WIDTH)
    new_top = hide_and_peak(scores, begin, low, visible, end, top)
    base, summed, products, tops = (
        splat(new_top),
        splat(f32(0.0)),
        splat(f32(0.0)),
        splat(f32(0.0)),
    )
    for j in range(begin, end, WIDTH):
        weight = exp16(load16(scores, j) - base)
        summed = weight + summed
        product = counted_product(weight, load16(v_scales, j))
        store16(scores, j, product)
        products, tops = product + products, largest(product, tops)
    most = peak(tops)
    factor, inverse = f32(0.0), f32(0.0)
    # ``largest`` passes over NaN, the sum does not.
    if not total(products) <= _MOST:
        factor = _NAN
    elif most >= _LEAST:
        factor, inverse = most / SHORT_LIMIT, SHORT_LIMIT / most
    for j in range(first, begin):
        out[j] = types.int16(0)
    for j in range(begin, end, WIDTH):
        store_shorts(out, j, load16(scores, j), splat(inverse))
    for j in range(end, padded(count, WIDTH)):
        out[j] = types.int16(0)
    return new_top, total(summed), factor


@njit(**INLINE)
def record_sizes(dim: Any, block_size: Any) -> Any:
    """Return the bytes of a record's keys and values: codes, all, codes, all."""
    key_codes, value_codes = padded(dim, 2) * block_size, padded(dim, WIDTH) * block_size
    return key_codes, key_codes + 2 * block_size, value_codes, value_codes + 2 * block_size


@njit(**INLINE)
def write_pair(key: Any, value: Any, dim: Any, k_cache: Any, v_cache: Any, place: Any) -> None:
    """Quantize a key and a value into their records; arguments as for ``rotary.write_pair``."""
    index, offset, block_size = place
    _, key_bytes, _, value_bytes = record_sizes(dim, block_size)
    codes = recast(shifted(key, padded(dim, WIDTH)), types.int8)
    keys, values = pointer(k_cache, types.int8), pointer(v_cache, types.int8)
    write_key(key, dim, codes, keys, index * key_bytes, offset, block_size)
    write_value(value, dim, codes, values, index * value_bytes, offset, block_size)
