"""Time on a CUDA device, whatever the host takes to enqueue.

The device is held by a kernel that waits for the host's word, which comes once all calls of a
sample are enqueued; two events around these then tell what the device alone took. To let it wait
for a number of cycles instead, one would have to know beforehand how long enqueuing takes.
"""

from typing import Any

import numpy as np
from numba import cuda

from ..sampling import Call, Sample

LEAST = 4e-4  # seconds of a sample at least
MOST = 96  # calls of one: a stream takes some 1000 launches before the host must wait
NAP = 1000  # nanoseconds, about, between two looks at the gate
LOOKS = 50_000  # until the device gives up: a twentieth of a second or more


def hold(gate: Any, looks: Any) -> None:
    """Wait until ``gate[0]`` is set; set ``gate[1]`` if that takes too long."""
    for _ in range(looks):
        if gate[0] != 0:
            return
        cuda.nanosleep(NAP)
        cuda.threadfence_system()  # else the compiler, or a cache, would keep what was read once
    gate[1] = 1


_hold: Any = cuda.jit(hold)


class CudaClock:
    """Times calls on the legacy default stream, Numba's and any other library's."""

    least = LEAST
    most = MOST

    def __init__(self) -> None:
        self._stream = cuda.legacy_default_stream()
        self._start, self._end = cuda.event(timing=True), cuda.event(timing=True)
        self._gate = cuda.mapped_array(2, np.uint32)  # memory of the host that the device sees
        self.time(lambda: None, 1)  # compiles and loads

    def time(self, call: Call, calls: int) -> Sample:
        """Time calls in a row; disturbed are those for which the device did not wait to the end."""
        gate, stream = self._gate, self._stream
        gate[:] = 0
        # To free memory the host would wait for the device: results are kept until the end.
        with cuda.defer_cleanup():
            try:
                _hold[1, 1, stream](gate, LOOKS)
                self._start.record(stream)
                results = [call() for _ in range(calls)]
                self._end.record(stream)
            finally:
                gate[0] = 1
            self._end.synchronize()
            del results
        seconds = self._start.elapsed_time(self._end) / 1e3 / calls
        return Sample(seconds, bool(gate[1]))
