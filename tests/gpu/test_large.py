"""More than 2**31 elements of float16, against sums that are known."""

import gc
import math

import on_device
import pytest

import numbabn

pytestmark = pytest.mark.gpu

ARRAYS = 4  # x, y and dy, dx
SPARE = 12 << 30  # for what is compared, and what blocks share
CHUNK = 1 << 27  # elements
OFFSETS = (0.5, 1.0, 1.5)


@pytest.fixture
def torch():
    library = on_device.Torch()
    library.torch.cuda.empty_cache()
    yield library.torch
    gc.collect()
    library.torch.cuda.empty_cache()


def chunks(line):
    """Cut one channel of one image, or one column of rows, into what fits in memory twice."""
    return [(start, line[start : start + CHUNK]) for start in range(0, len(line), CHUNK)]


def alternate(torch, chunk, start, every):
    """Give 1, -1, 1, ... for the places of a chunk, each `every` times."""
    places = torch.arange(start, start + len(chunk), device=chunk.device)
    return 1 - 2 * (places // every % 2).to(chunk.dtype)


def skip_without(torch, size):
    needed = ARRAYS * 2 * size + SPARE
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{free >> 30} GiB of memory are free, {needed >> 30} needed")


def check(torch, shape, axis, lines, shift):
    """Forward and backward; x alternates by places around its channel's offset.

    `lines` gives (channel, places of one image) for each, as views of an array; every other one
    of a channel begins with the other sign, so that all signs of a channel cancel.
    """
    size, C = math.prod(shape), shape[axis]
    skip_without(torch, size)

    def empty():
        return torch.empty(size + shift, dtype=torch.float16, device="cuda")[shift:].view(shape)

    x, dy = empty(), empty()
    wide = torch.zeros(3, C, dtype=torch.float64, device="cuda")  # sums of x - offset, dy, both
    for k, ((c, ours), (_, other)) in enumerate(zip(lines(x), lines(dy), strict=True)):
        flip = -1 if k // C % 2 else 1
        for (start, part), (_, dy_part) in zip(chunks(ours), chunks(other), strict=True):
            sign = flip * alternate(torch, part, start, 1)
            part.copy_(sign + OFFSETS[c % 3])
            dy_part.copy_(alternate(torch, part, start, 2) + sign / 2)
            wide[0, c] += sign.sum(dtype=torch.float64)
            wide[1, c] += dy_part.sum(dtype=torch.float64)
            wide[2, c] += (sign * dy_part).sum(dtype=torch.float64)
    count = size // C
    off, dy_sum, both = wide
    offset = torch.tensor([OFFSETS[c % 3] for c in range(C)], dtype=torch.float64, device="cuda")
    mean = off / count + offset
    var = 1 - (off / count) ** 2
    invstd = (var + 1e-5) ** -0.5
    weight = torch.linspace(0.5, 2, C, device="cuda")
    bias = torch.linspace(-1, 1, C, device="cuda")

    y = empty().fill_(math.nan)
    result = numbabn.batch_norm_forward(x, weight, bias, axis=axis, out=y)
    torch.testing.assert_close(result.mean, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.invstd, invstd, rtol=1e-6, atol=0)
    dx = empty().fill_(math.nan)
    gradients = numbabn.batch_norm_backward(
        dy, x, weight, result.mean, result.invstd, axis=axis, out=dx
    )
    dweight = (both - off / count * dy_sum) * invstd
    torch.testing.assert_close(gradients.dbias.double(), dy_sum, rtol=1e-6, atol=1e-7 * count)
    torch.testing.assert_close(gradients.dweight.double(), dweight, rtol=1e-6, atol=1e-7 * count)

    scale = weight.double() * invstd
    for (c, ours), (_, other), (_, y_line), (_, dx_line) in zip(
        lines(x), lines(dy), lines(y), lines(dx), strict=True
    ):
        for parts in zip(*map(chunks, (ours, other, y_line, dx_line)), strict=True):
            x_part, dy_part, y_part, dx_part = (part for _, part in parts)
            normal = x_part.float() - mean[c].float()
            expected = normal * scale[c].float() + bias[c]
            assert (y_part.float() - expected).abs().max() < 4e-3
            slope = (dweight[c] * invstd[c] / count).float()
            expected = dy_part.float() - (dy_sum[c] / count).float() - normal * slope
            expected *= scale[c].float()
            assert (dx_part.float() - expected).abs().max() < 4e-3


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "one number at a time"])
def test_planes(torch, shift):
    shape = (2, 3, 2**29 + 8 - 7 * shift)

    def lines(array):
        return [(c, array[n, c]) for n in range(2) for c in range(3)]

    check(torch, shape, 1, lines, shift)


def test_a_plane_alone(torch):
    def lines(array):
        return [(0, array[0, 0])]

    check(torch, (1, 1, 2**31 + 16), 1, lines, 0)


def test_rows(torch):
    def lines(array):
        return [(c, array[:, c]) for c in range(40)]

    check(torch, (2**26 + 2, 40), 1, lines, 0)


def test_short_planes(torch):
    shape = (2**20 + 2, 294, 7)
    size = math.prod(shape)
    skip_without(torch, size)
    x = torch.ones(shape, dtype=torch.float16, device="cuda")
    x[shape[0] // 2 :] = 3
    stats = numbabn.batch_stats(x)
    count = size // shape[1]
    torch.testing.assert_close(stats.mean, torch.full_like(stats.mean, 2), rtol=1e-7, atol=0)
    torch.testing.assert_close(stats.m2, torch.full_like(stats.m2, count), rtol=1e-6, atol=0)
    y = numbabn.batch_norm(x, training=True, out=x)
    for half, expected in ((y[: shape[0] // 2], -1), (y[shape[0] // 2 :], 1)):
        assert [value.item() for value in half.aminmax()] == [expected, expected]


def test_beyond_the_blocks_of_a_grid(torch):
    """Channels of a few numbers each, more of them than a grid has blocks."""
    C = 3 * 2**20 + 1
    x = torch.randn((2, C, 33), dtype=torch.float16, device="cuda")
    y = numbabn.batch_norm(x, training=True)
    wide = x.double()
    mean = wide.mean((0, 2), keepdim=True)
    var = wide.var((0, 2), correction=0, keepdim=True)
    expected = (wide - mean) * (var + 1e-5).rsqrt()
    assert (y.double() - expected).abs().max() < 4e-3 * expected.abs().max()
