"""A driver that does nothing but remember what it was asked, for the tests of launches."""

from cuda.bindings import driver as real

OK = real.CUresult.CUDA_SUCCESS
CAPTURING = real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
IDLE = real.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


class Driver:
    """What `launch` and `driver` use of the driver: one device, blocks two to a multiprocessor."""

    def __init__(self):
        self.contexts = []
        self.launches = []
        self.attributes = []
        self.capturing = set()
        self.error = OK

    def __getattr__(self, name):
        return getattr(real, name)

    def cuInit(self, flags):  # noqa: N802
        return (OK,)

    def cuDeviceGet(self, ordinal):  # noqa: N802
        return OK, ordinal

    def cuDevicePrimaryCtxRetain(self, device):  # noqa: N802
        return OK, real.CUcontext(100 + device)

    def cuCtxGetCurrent(self):  # noqa: N802
        return OK, self.contexts[-1] if self.contexts else real.CUcontext(0)

    def cuCtxPushCurrent(self, context):  # noqa: N802
        self.contexts.append(context)
        return (OK,)

    def cuCtxPopCurrent(self):  # noqa: N802
        return OK, self.contexts.pop()

    def cuStreamIsCapturing(self, stream):  # noqa: N802
        return OK, CAPTURING if stream in self.capturing else IDLE

    def cuKernelGetFunction(self, kernel):  # noqa: N802
        return OK, real.CUfunction(int(kernel))

    def cuKernelSetAttribute(self, name, value, kernel, device):  # noqa: N802
        self.attributes.append(value)
        return (OK,)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, shared):  # noqa: N802
        return OK, 2
