"""Call numbabn by address, through ctypes: the way for memory that no array library knows.

Feature maps lie in shared memory, as another process or a driver would leave them there. Python's
threads normalize them in place, each some of the images; ctypes releases the GIL during a call.
Then the middle of every image is summed where it lies, by strides.
"""

import ctypes
import mmap
import threading
import time

import numpy as np

import numbabn
from numbabn import c

N, C, H, W = 32, 64, 56, 56
THREADS = 4
FLOAT = ctypes.sizeof(ctypes.c_float)

# The memory, and its address. The arrays are for this example's own data and checks alone.
memory = mmap.mmap(-1, N * C * H * W * FLOAT)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
images = np.frombuffer(memory, np.float32).reshape(N, C, H, W)
rng = np.random.default_rng(0)
images[...] = rng.standard_normal(images.shape, np.float32) * 3 + 5
running_mean, running_var = (ctypes.c_float * C)(*[5.0] * C), (ctypes.c_float * C)(*[9.0] * C)

table = c.table("float32", "inference statistics")


def check(status):
    """Raise what the status says."""
    if status:
        raise ValueError(table.messages[status].decode())


def normalize(first, last):
    """Normalize images `first` to `last` in place."""
    shape = (ctypes.c_int64 * 4)(last - first, C, H, W)
    call = c.InferenceCall(
        running_mean=ctypes.addressof(running_mean),
        running_var=ctypes.addressof(running_var),
        eps=1e-5,
        relu=True,
    )
    call.batch.shape, call.batch.ndim, call.batch.axis = ctypes.addressof(shape), 4, 1
    call.x.data = call.y.data = start + first * C * H * W * FLOAT
    check(table.inference(table.kernels, call))


expected = numbabn.batch_norm_inference(
    images, np.array(running_mean), np.array(running_var), activation="relu"
)
threads = [
    threading.Thread(target=normalize, args=(N * t // THREADS, N * (t + 1) // THREADS))
    for t in range(THREADS)
]
begun = time.perf_counter()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"{N} images in {THREADS} threads: {1e3 * (time.perf_counter() - begun):.1f} ms")
assert np.array_equal(images, expected)  # bit for bit

# The middle of each image: sizes of its own, the strides of the whole.
edge = 14
shape = (ctypes.c_int64 * 4)(N, C, H - 2 * edge, W - 2 * edge)
strides = (ctypes.c_int64 * 4)(C * H * W * FLOAT, H * W * FLOAT, W * FLOAT, FLOAT)
mean, m2 = (ctypes.c_double * C)(), (ctypes.c_double * C)()
call = c.StatisticsCall(mean=ctypes.addressof(mean), m2=ctypes.addressof(m2))
call.batch.shape, call.batch.ndim, call.batch.axis = ctypes.addressof(shape), 4, 1
call.x.data = start + (edge * W + edge) * FLOAT
call.x.strides = ctypes.addressof(strides)
check(table.statistics(table.kernels, call))
middle = numbabn.batch_stats(images[:, :, edge:-edge, edge:-edge])
assert np.array_equal(mean, middle.mean)
assert np.array_equal(m2, middle.m2)
count = N * (H - 2 * edge) * (W - 2 * edge)
print(f"the middle of channel 0: mean {mean[0]:.4f}, variance {m2[0] / count:.4f}")

# A wrong call changes nothing and says what is wrong.
call.batch.axis = 4
try:
    check(table.statistics(table.kernels, call))
except ValueError as error:
    print("refused:", error)
