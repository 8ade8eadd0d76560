"""The cases that are measured: operations and dtypes on the shapes of ``numbabn bench quick``."""

from itertools import product

from yardstick.cli.bench.cases import Case
from yardstick.cli.bench.suites import BATCH, SUITES, parse_shape

# Those of ``numbabn bench``, whose traffic has a limit, and the other ways through the kernels.
OPS = ["forward", "inference", "backward", "add_relu"]
MORE_OPS = ["statistics", "eval_backward"]

IMAGES = ["x".join(map(str, (BATCH, *image))) for image in SUITES["quick"].images]
ROWS = ["x".join(map(str, shape)) for shape in SUITES["quick"].whole]


class Grid:
    """Cases of one layout: every op, dtype and shape."""

    layout: str
    param_names = ("op", "dtype", "shape")
    params: tuple[list[str], list[str], list[str]]

    def case(self, op: str, dtype: str, shape: str) -> Case:
        return Case(op, self.layout, dtype, parse_shape(shape))

    def cases(self) -> list[Case]:
        return [self.case(*each) for each in product(*self.params)]


class NCHW(Grid):
    """Channels first."""

    layout = "nchw"
    params = (OPS + MORE_OPS, ["float32"], IMAGES)


class Float16(Grid):
    """Channels first, two bytes each."""

    layout = "nchw"
    params = (["forward", "inference"], ["float16"], IMAGES)


class NHWC(Grid):
    """Channels last."""

    layout = "nhwc"
    params = (OPS + MORE_OPS, ["float32"], IMAGES[:2])


class NC(Grid):
    """No places."""

    layout = "nc"
    params = (OPS + MORE_OPS, ["float32"], ROWS)


class Small(Grid):
    """So little that the call itself counts, and one thread does it."""

    layout = "nchw"
    params = (["inference"], ["float32"], ["4x16x8x8"])
