"""Which cases to time: suites of shapes of real networks, or shapes as they are written."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..command import CommandError, split
from .cases import LAYOUTS, Case, layouts_of

BATCH = 32
Shape = tuple[int, ...]


class Suite(NamedTuple):
    """Shapes without their batch, which ``--batch`` may change, and shapes that have their own."""

    images: tuple[Shape, ...] = ()  # C, H, W
    whole: tuple[Shape, ...] = ()  # N, C
    layouts: tuple[str, ...] = ("nchw", "nc")


SUITES = {
    # All of ResNet-50 at 224x224 as first published, its strides in the 1x1 convolutions.
    "resnet50": Suite((
        (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28),
        (256, 14, 14), (1024, 14, 14), (512, 7, 7), (2048, 7, 7),
    )),
    # MobileNetV2 at 224x224: the stem, expanded and projected channels of each resolution.
    "mobilenet": Suite((
        (32, 112, 112), (16, 112, 112), (96, 112, 112), (144, 56, 56), (24, 56, 56),
        (192, 28, 28), (32, 28, 28), (576, 14, 14), (96, 14, 14),
        (960, 7, 7), (160, 7, 7), (1280, 7, 7),
    )),
    # Inception v3 at 299x299: odd places, which no vector divides.
    "inception": Suite((
        (32, 149, 149), (32, 147, 147), (64, 147, 147), (80, 73, 73), (192, 71, 71),
        (48, 35, 35), (96, 35, 35), (160, 17, 17), (192, 17, 17), (384, 17, 17),
        (320, 8, 8), (448, 8, 8),
    )),
    # The last two lie across a size at which cuDNN once became 20 times slower.
    "mlp": Suite(whole=((128, 1024), (4096, 1024), (65536, 64), (120000, 512))),
    "quick": Suite(
        ((64, 56, 56), (256, 14, 14), (512, 7, 7)), ((4096, 1024),), layouts=LAYOUTS
    ),
}  # fmt: skip


def parse_shape(text: str) -> Shape:
    """Read ``NxC`` or ``NxCxHxW``, of any rank from 2 on and with every size above 0."""
    shape = tuple(map(int, text.split("x"))) if re.fullmatch(r"\d+(x\d+)+", text) else ()
    if math.prod(shape) == 0 or not shape:
        raise CommandError(
            f"expected a suite ({', '.join(SUITES)}) or a shape like 32x64x56x56, got {text!r}"
        )
    return shape


def choose(
    what: Sequence[str],
    ops: Sequence[str],
    layouts: Sequence[str] | None,
    dtypes: Sequence[str],
    batch: int,
) -> list[Case]:
    """Make the cases that the command line asks for, each once, ordered by op and layout.

    Parameters
    ----------
    what : sequence of str
        Suites and shapes, or several of them with commas between.
    ops, dtypes : sequence of str
        All of them for each shape.
    layouts : sequence of str, or None
        Those of them that a shape has; None means the suite's own, or the shape's usual one.
    batch : int
        N of the shapes of images.
    """
    laid: dict[str, list[Shape]] = {layout: [] for layout in layouts or LAYOUTS}
    for name in [name for text in what for name in split(text)]:
        suite = SUITES.get(name) or Suite(whole=(parse_shape(name),))
        wanted = layouts or suite.layouts
        fits = False
        for shape in (*((batch, *image) for image in suite.images), *suite.whole):
            for layout in layouts_of(shape):
                if layout in wanted:
                    fits = True
                    laid[layout].append(shape)
        if not fits:
            raise CommandError(f"--layout: {name} has no layout {' or '.join(wanted)}")
    return [
        Case(op, layout, dtype, shape)
        for op in ops
        for layout, shapes in laid.items()
        for dtype in dtypes
        for shape in dict.fromkeys(shapes)
    ]
