/* Batch normalization from C and C++, by the kernels of the Python package numbabn.
 *
 * Python compiles the kernels and hands over a table of functions (`numbabn_import`). From then on
 * a call touches no Python object and needs no GIL: any thread may call, many at a time, each for
 * arrays of its own. Results are bit for bit those of the Python functions of the same names.
 *
 * A call is a struct. Set it to zeros, then what is there: an address that is NULL means that
 * there is no such array. Include Python.h first in the file that calls `numbabn_import`; no other
 * needs it. See docs/c.md.
 */
#ifndef NUMBABN_H
#define NUMBABN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Which edition of the structs below this is; a library of another one is refused. */
#define NUMBABN_ABI 1
#define NUMBABN_MAX_NDIM 32

/* What a call returns; `numbabn_message` has the text. Nothing has been written on an error. */
typedef enum numbabn_status {
    NUMBABN_OK = 0,
    NUMBABN_NOT_LOADED = 1,
    NUMBABN_NDIM = 2,
    NUMBABN_SHAPE = 3,
    NUMBABN_AXIS = 4,
    NUMBABN_MISSING_X = 5,
    NUMBABN_MISSING_Y = 6,
    NUMBABN_MISSING_RUNNING = 7,
    NUMBABN_MISSING_DY = 8,
    NUMBABN_MISSING_DX = 9,
    NUMBABN_MISSING_STATISTICS = 10,
    NUMBABN_MISSING_GRADIENTS = 11,
    NUMBABN_PARAMETERS = 12,
    NUMBABN_EPS = 13,
    NUMBABN_MOMENTUM = 14,
    NUMBABN_CORRECTION = 15,
    NUMBABN_VALUES = 16,
    NUMBABN_MASK = 17,
    NUMBABN_MEMORY = 18
} numbabn_status;

/* Arrays of data, all of one shape and of the table's dtype: float16 and bfloat16 as uint16_t.
 * Strides are in bytes, one per axis, and may be anything; NULL means C order. */
typedef struct numbabn_input {
    const void *data;
    const int64_t *strides;
} numbabn_input;

typedef struct numbabn_output {
    void *data;
    const int64_t *strides;
} numbabn_output;

/* What all calls begin with. */
typedef struct numbabn_batch {
    const int64_t *shape; /* ndim sizes */
    int32_t ndim;         /* 2 to NUMBABN_MAX_NDIM */
    int32_t axis;         /* the channel's, C numbers long; negative counts from the end */
    int32_t threads;      /* of Numba's, at most; 0 or 1: the calling thread does it all */
    /* Beside float16 and bfloat16: not 0 if the per-channel arrays are float32. Otherwise those
     * that are `void *` are of the dtype of the data. */
    int32_t float32_parameters;
} numbabn_batch;

/* Per-channel arrays hold C numbers without a gap. What is written must not overlap other memory
 * of the call, except that y may be x or residual, and dx may be dy or x, by the same strides. */

/* Mean, and sum of squared deviations from it, of each channel. */
typedef struct numbabn_statistics_call {
    numbabn_batch batch;
    numbabn_input x;
    double *mean; /* written, as m2 */
    double *m2;
} numbabn_statistics_call;

/* y = act((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual) */
typedef struct numbabn_inference_call {
    numbabn_batch batch;
    numbabn_input x;
    numbabn_input residual; /* or none */
    numbabn_output y;
    const void *running_mean;
    const void *running_var;
    const void *weight; /* or NULL: ones */
    const void *bias;   /* or NULL: zeros */
    double eps;
    int32_t relu; /* not 0: act is a ReLU */
} numbabn_inference_call;

/* The same by the batch's own mean and biased variance; running statistics are updated. */
typedef struct numbabn_forward_call {
    numbabn_batch batch;
    numbabn_input x;
    numbabn_input residual; /* or none */
    numbabn_output y;
    /* Written, if it is there, all (elements + 7) / 8 bytes; NULL without relu. Bit i % 8 of byte
     * i / 8 says whether element i of y, in C order, passed the ReLU. */
    uint8_t *mask;
    const void *weight; /* or NULL: ones */
    const void *bias;   /* or NULL: zeros */
    void *running_mean; /* or NULL; (1 - momentum) * running + momentum * batch */
    void *running_var;  /* or NULL; the batch's is divided by count - correction */
    double *mean;       /* written, as invstd, for the backward pass */
    double *invstd;
    double eps;
    double momentum;
    double correction;
    int32_t relu;
} numbabn_forward_call;

/* Gradients by x, residual, weight and bias, from the gradient by y. */
typedef struct numbabn_backward_call {
    numbabn_batch batch;
    numbabn_input dy;
    numbabn_input x;
    numbabn_output dx;
    numbabn_output dresidual; /* or none; dy through the ReLU */
    const uint8_t *mask;      /* as the forward pass left it; or NULL */
    const void *weight;       /* or NULL: ones */
    const double *mean;
    const double *invstd;
    void *dweight;
    void *dbias;
    int32_t eval; /* not 0: mean and invstd are constants, as of a layer in eval mode */
} numbabn_backward_call;

/* The functions for one dtype. They are NULL until they have been imported. */
typedef struct numbabn_api {
    int32_t abi;
    int32_t size; /* of this struct: later ones may be longer */
    const char *dtype;
    int32_t itemsize;
    int32_t threads; /* that a call may use at most; 1 unless parallel kernels were imported */
    const void *kernels;
    int32_t (*statistics)(const void *kernels, const numbabn_statistics_call *call);
    int32_t (*inference)(const void *kernels, const numbabn_inference_call *call);
    int32_t (*forward)(const void *kernels, const numbabn_forward_call *call);
    int32_t (*backward)(const void *kernels, const numbabn_backward_call *call);
    const char *const *messages;
    int32_t message_count;
} numbabn_api;

#define NUMBABN_CALL(name)                                                                     \
    static inline int numbabn_##name(const numbabn_api *api, const numbabn_##name##_call *call) \
    {                                                                                          \
        return api->name ? api->name(api->kernels, call) : NUMBABN_NOT_LOADED;                 \
    }
NUMBABN_CALL(statistics)
NUMBABN_CALL(inference)
NUMBABN_CALL(forward)
NUMBABN_CALL(backward)
#undef NUMBABN_CALL

/* What went wrong: the argument, and what was expected. */
static inline const char *numbabn_message(const numbabn_api *api, int status)
{
    return status >= 0 && status < api->message_count ? api->messages[status] : "unknown status";
}

#ifdef Py_PYTHON_H
/* Give the table for a dtype: "float32", "float64", "float16" or "bfloat16". NULL with a Python
 * exception set if that cannot be.
 *
 * `operations` are names separated by spaces, NULL for all four. `parallel` says whether calls may
 * run over Numba's threads. What has not been compiled before on this machine is compiled now, for
 * some seconds each. Needs the GIL. The table lives until Python is finalized, after which no
 * function may be called; what is imported later is added to it. */
static inline const numbabn_api *numbabn_import(
    const char *dtype, const char *operations, int parallel)
{
    const numbabn_api *api = NULL;
    PyObject *capsule = NULL;
    PyObject *module = PyImport_ImportModule("numbabn.c");
    if (module) {
        capsule = PyObject_CallMethod(module, "capsule", "iszi", NUMBABN_ABI, dtype, operations,
            parallel);
        Py_DECREF(module);
    }
    if (capsule) {
        api = (const numbabn_api *)PyCapsule_GetPointer(capsule, "numbabn.c.table");
        Py_DECREF(capsule);
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif

#endif
