/* Batch normalization in a C program, which embeds Python to compile the kernels.
 *
 * A batch of images [N, C, H, W] is made in C and normalized by its own statistics, in one thread
 * and then in several: channels are independent, so that each thread takes some, in place in the
 * same memory. Inference is shared among the threads by images. No thread but the first ever
 * touches Python.
 *
 *   cc -O2 batch_norm.c $(python3-config --includes --ldflags --embed) \
 *      -I$(python3 -c "import numbabn.c; print(numbabn.c.get_include())") -lpthread -lm
 *   ./a.out $(command -v python3)
 */
#include <Python.h>

#include <math.h>
#include <numbabn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { N = 32, C = 64, H = 56, W = 56, PLACES = H * W, SIZE = N * C * PLACES };
enum { THREADS = 4, REPEATS = 5 };

static const int64_t SHAPE[] = {N, C, H, W};
static const int64_t STRIDES[] = {
    (int64_t)sizeof(float) * C * PLACES, (int64_t)sizeof(float) * PLACES, sizeof(float) * W,
    sizeof(float)};

static const numbabn_api *api;
static float *x, *y, *again;
static float weight[C], bias[C], running_mean[C], running_var[C];
static double mean[C], invstd[C];

static void check(int status)
{
    if (status != NUMBABN_OK) {
        fprintf(stderr, "numbabn: %s\n", numbabn_message(api, status));
        exit(EXIT_FAILURE);
    }
}

static double seconds(void)
{
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Give the table of float32, or end with Python's own message. */
static const numbabn_api *load(const char *python)
{
    const numbabn_api *loaded;
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    /* As this interpreter would, Python then finds the packages of its virtual environment. */
    PyConfig_SetBytesString(&config, &config.program_name, python);
    PyStatus status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    loaded = numbabn_import("float32", "forward inference", 0);
    if (!loaded) {
        PyErr_Print();
        exit(EXIT_FAILURE);
    }
    return loaded;
}

/* Images whose channels differ in mean and spread: a wave and some noise. */
static void make_images(void)
{
    uint32_t state = 1;
    for (int i = 0; i < SIZE; i++) {
        int c = i / PLACES % C;
        state = state * 1664525u + 1013904223u;
        x[i] = (float)c + (float)(c % 8 + 1) * (sinf((float)(i % W)) + (float)(state >> 8) * 0x1p-24f);
    }
    for (int c = 0; c < C; c++) {
        weight[c] = 1.0f + 0.01f * (float)c;
        bias[c] = -0.5f;
        running_var[c] = 1.0f;
    }
}

/* The training pass on channels `first` to `last`, as a call of its own. */
static int forward(int first, int last, float *into)
{
    int64_t shape[] = {N, last - first, H, W};
    numbabn_forward_call call;
    memset(&call, 0, sizeof call);
    call.batch.shape = shape;
    call.batch.ndim = 4;
    call.batch.axis = 1;
    call.x.data = x + first * PLACES;
    call.x.strides = STRIDES;
    call.y.data = into + first * PLACES;
    call.y.strides = STRIDES;
    call.weight = weight + first;
    call.bias = bias + first;
    call.running_mean = running_mean + first;
    call.running_var = running_var + first;
    call.mean = mean + first;
    call.invstd = invstd + first;
    call.eps = 1e-5;
    call.momentum = 0.1;
    call.correction = 1;
    return numbabn_forward(api, &call);
}

/* Inference on images `first` to `last`. */
static int inference(int first, int last, float *into)
{
    int64_t shape[] = {last - first, C, H, W};
    numbabn_inference_call call;
    memset(&call, 0, sizeof call);
    call.batch.shape = shape;
    call.batch.ndim = 4;
    call.batch.axis = 1;
    call.x.data = x + (size_t)first * C * PLACES;
    call.y.data = into + (size_t)first * C * PLACES;
    call.running_mean = running_mean;
    call.running_var = running_var;
    call.weight = weight;
    call.bias = bias;
    call.eps = 1e-5;
    call.relu = 1;
    return numbabn_inference(api, &call);
}

typedef struct task {
    int (*run)(int first, int last, float *into);
    int first, last;
    float *into;
    int status;
} task;

static void *run_task(void *argument)
{
    task *t = argument;
    t->status = t->run(t->first, t->last, t->into);
    return NULL;
}

/* Share `count` channels or images among threads that know nothing of Python. */
static void in_threads(int (*run)(int, int, float *), int count, float *into)
{
    pthread_t threads[THREADS];
    task tasks[THREADS];
    for (int t = 0; t < THREADS; t++) {
        task mine = {run, count * t / THREADS, count * (t + 1) / THREADS, into, NUMBABN_OK};
        tasks[t] = mine;
        if (pthread_create(&threads[t], NULL, run_task, &tasks[t]))
            exit(EXIT_FAILURE);
    }
    for (int t = 0; t < THREADS; t++) {
        pthread_join(threads[t], NULL);
        check(tasks[t].status);
    }
}

static void alone(int (*run)(int, int, float *), int count, float *into)
{
    check(run(0, count, into));
}

typedef void sharing(int (*run)(int, int, float *), int count, float *into);

static double best_time(sharing *share, int (*run)(int, int, float *), int count, float *into)
{
    double best = INFINITY;
    for (int k = 0; k < REPEATS; k++) {
        double begun = seconds();
        share(run, count, into);
        best = fmin(best, seconds() - begun);
    }
    return 1e3 * best;
}

static double copy_time(void)
{
    double best = INFINITY;
    for (int k = 0; k < REPEATS; k++) {
        double begun = seconds();
        memcpy(y, x, SIZE * sizeof *x);
        best = fmin(best, seconds() - begun);
    }
    return 1e3 * best;
}

static void expect_same(const char *what)
{
    if (memcmp(y, again, SIZE * sizeof *y)) {
        fprintf(stderr, "%s: the bits depend on the threads\n", what);
        exit(EXIT_FAILURE);
    }
}

int main(int argc, char **argv)
{
    double begun = seconds();
    api = load(argc > 1 ? argv[1] : "python3");
    printf("kernels for %s after %.1f s\n", api->dtype, seconds() - begun);
    PyThreadState *state = PyEval_SaveThread(); /* nothing below needs the GIL */

    x = malloc(SIZE * sizeof *x);
    y = malloc(SIZE * sizeof *y);
    again = malloc(SIZE * sizeof *again);
    if (!x || !y || !again)
        return EXIT_FAILURE;
    make_images();

    check(forward(0, C, y));
    for (int c = 0; c < C; c += 21)
        printf("channel %2d: mean %7.3f, std %6.3f; running %6.3f, %6.3f\n", c, mean[c],
            1 / invstd[c], (double)running_mean[c], (double)running_var[c]);
    double total = 0, squares = 0;
    for (int n = 0; n < N; n++)
        for (int i = 0; i < PLACES; i++) {
            double value = (double)y[(n * C + 42) * PLACES + i];
            total += value / (N * PLACES);
            squares += value * value / (N * PLACES);
        }
    double std = sqrt(squares - total * total);
    printf("y of channel 42: mean %.4f, std %.4f\n", total, std);
    if (fabs(total + 0.5) > 1e-4 || fabs(std - 1.42) > 1e-4)
        return EXIT_FAILURE;

    in_threads(forward, C, again);
    expect_same("forward");
    check(inference(0, N, y));
    in_threads(inference, N, again);
    expect_same("inference");

    printf("a copy: %.2f ms\n", copy_time());
    printf("forward: %.2f ms", best_time(alone, forward, C, y));
    printf(", in %d threads %.2f ms\n", THREADS, best_time(in_threads, forward, C, y));
    printf("inference: %.2f ms", best_time(alone, inference, N, y));
    printf(", in %d threads %.2f ms\n", THREADS, best_time(in_threads, inference, N, y));

    /* A status says which argument is wrong, and nothing has been written. */
    numbabn_inference_call wrong;
    memset(&wrong, 0, sizeof wrong);
    wrong.batch.shape = SHAPE;
    wrong.batch.ndim = 4;
    wrong.batch.axis = 4;
    printf("a wrong call: %s\n", numbabn_message(api, numbabn_inference(api, &wrong)));

    free(x);
    free(y);
    free(again);
    PyEval_RestoreThread(state);
    return Py_FinalizeEx() ? EXIT_FAILURE : EXIT_SUCCESS;
}
