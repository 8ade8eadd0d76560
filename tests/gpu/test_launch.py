"""What launches ask of the driver, and what it says."""

import math
from concurrent.futures import ThreadPoolExecutor

import on_device
import pytest

import numbabn

pytestmark = pytest.mark.gpu

KERNEL = "normalize", "planes", "float16", 8


@pytest.fixture
def torch():
    return on_device.Torch().torch


@pytest.fixture
def launch(torch):
    from numbabn.cuda import launch

    return launch


@pytest.fixture
def place(torch):
    from numbabn import backends

    (x,) = backends.borrow(None, x=torch.ones(2, 3, device="cuda"))
    return x.place


def nothing():
    """Give arguments of the kernel that have no element."""
    from numbabn.cuda.arguments import Forward, Map, Numbers, Parameters, Settings, Shape

    maps = Forward(*[Map(0, 0, 0, 0)] * 4)
    parameters = Parameters(*[Numbers(0, 0, 0)] * len(Parameters._fields))
    return maps, parameters, Settings(0.0, 0.0, 0.0, 0), Shape(*[0] * len(Shape._fields))


def test_the_device_is_asked(torch, launch, place):
    properties = torch.cuda.get_device_properties(place.device)
    assert launch.l2_bytes(place) == properties.L2_cache_size
    blocks = launch.capacity(place, *KERNEL, 0)
    assert blocks >= properties.multi_processor_count
    assert blocks % properties.multi_processor_count == 0
    most = launch._kernel(place, *KERNEL)._most_shared
    assert launch.capacity(place, *KERNEL, most) == properties.multi_processor_count
    assert launch.capacity(place, *KERNEL, most + 1) == 0


def test_more_blocks_than_fit_are_not_launched_together(torch, launch, place):
    blocks = launch.capacity(place, *KERNEL, 0) + 1
    with (
        launch.on_device(place.device),
        pytest.raises(RuntimeError, match=r"normalize_planes: .*COOPERATIVE_LAUNCH_TOO_LARGE"),
    ):
        launch.launch(place, *KERNEL, blocks, *nothing(), together=True)
    x = torch.randn(4, 6, device="cuda")  # and the context is none the worse
    assert math.isfinite(numbabn.batch_norm(x, training=True).sum().item())


def test_a_thread_has_its_context_as_before(torch):
    from cuda.bindings import driver

    x = torch.randn(4, 6, 5, device="cuda")
    y = torch.empty_like(x)

    def contexts():
        weight = x[0, :, 0].contiguous()
        before = int(driver.cuCtxGetCurrent()[1])
        numbabn.batch_norm_inference(x, weight, weight.abs(), out=y)
        return before, int(driver.cuCtxGetCurrent()[1])

    before, after = contexts()
    assert before == after
    with ThreadPoolExecutor(1) as pool:
        before, after = pool.submit(contexts).result(timeout=60)
    assert before == after
