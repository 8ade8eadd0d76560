// A batch normalization layer in C++: vectors for memory, exceptions for statuses.
//
// The layer is trained on a small problem with data that lie channels last, [N, H, W, C]: its
// weight and bias, found by gradient descent, must undo a scale and a shift that the target has.
// Its gradients are also compared with differences of the loss.
//
//   c++ -O2 -std=c++17 batch_norm.cpp $(python3-config --includes --ldflags --embed)
//       -I$(python3 -c "import numbabn.c; print(numbabn.c.get_include())")
//   ./a.out $(command -v python3)
#include <Python.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numbabn.h>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Python, from here to the end of the program.
class Interpreter {
public:
    explicit Interpreter(const char *python)
    {
        PyConfig config;
        PyConfig_InitPythonConfig(&config);
        PyConfig_SetBytesString(&config, &config.program_name, python);
        PyStatus status = Py_InitializeFromConfig(&config);
        PyConfig_Clear(&config);
        if (PyStatus_Exception(status))
            throw std::runtime_error(status.err_msg);
    }
    ~Interpreter() { Py_FinalizeEx(); }
    Interpreter(const Interpreter &) = delete;
    Interpreter &operator=(const Interpreter &) = delete;

    const numbabn_api *numbabn(const char *dtype) const
    {
        const numbabn_api *api = numbabn_import(dtype, "forward backward", 0);
        if (!api) {
            PyErr_Print();
            throw std::runtime_error("numbabn could not be imported");
        }
        return api;
    }
};

// A layer of float64 on data [N, H, W, C].
class BatchNorm {
public:
    std::vector<double> weight, bias, grad_weight, grad_bias, running_mean, running_var;

    BatchNorm(const numbabn_api *api, std::vector<int64_t> shape)
        : weight(shape.back(), 1.0), bias(shape.back(), 0.0), grad_weight(shape.back()),
          grad_bias(shape.back()), running_mean(shape.back(), 0.0), running_var(shape.back(), 1.0),
          api_(api), shape_(shape), mean_(shape.back()), invstd_(shape.back())
    {
    }

    std::vector<double> forward(const std::vector<double> &x)
    {
        std::vector<double> y(x.size());
        x_ = x;
        mask_.assign((x.size() + 7) / 8, 0);
        numbabn_forward_call call = {};
        call.batch = batch();
        call.x.data = x_.data();
        call.y.data = y.data();
        call.mask = mask_.data();
        call.weight = weight.data();
        call.bias = bias.data();
        call.running_mean = running_mean.data();
        call.running_var = running_var.data();
        call.mean = mean_.data();
        call.invstd = invstd_.data();
        call.eps = 1e-5;
        call.momentum = 0.1;
        call.correction = 1;
        call.relu = 1;
        check(numbabn_forward(api_, &call));
        return y;
    }

    std::vector<double> backward(const std::vector<double> &dy)
    {
        std::vector<double> dx(dy.size());
        numbabn_backward_call call = {};
        call.batch = batch();
        call.dy.data = dy.data();
        call.x.data = x_.data();
        call.dx.data = dx.data();
        call.mask = mask_.data();
        call.weight = weight.data();
        call.mean = mean_.data();
        call.invstd = invstd_.data();
        call.dweight = grad_weight.data();
        call.dbias = grad_bias.data();
        check(numbabn_backward(api_, &call));
        return dx;
    }

private:
    numbabn_batch batch() const
    {
        numbabn_batch batch = {};
        batch.shape = shape_.data();
        batch.ndim = static_cast<int32_t>(shape_.size());
        batch.axis = -1;
        return batch;
    }

    void check(int status) const
    {
        if (status != NUMBABN_OK)
            throw std::invalid_argument(numbabn_message(api_, status));
    }

    const numbabn_api *api_;
    std::vector<int64_t> shape_;
    std::vector<double> mean_, invstd_, x_;
    std::vector<uint8_t> mask_;
};

double loss_of(const std::vector<double> &y, const std::vector<double> &target)
{
    double loss = 0;
    for (size_t i = 0; i < y.size(); i++)
        loss += (y[i] - target[i]) * (y[i] - target[i]) / 2;
    return loss / static_cast<double>(y.size());
}

std::vector<double> slope_of(const std::vector<double> &y, const std::vector<double> &target)
{
    std::vector<double> dy(y.size());
    for (size_t i = 0; i < y.size(); i++)
        dy[i] = (y[i] - target[i]) / static_cast<double>(y.size());
    return dy;
}

void require(bool truth, const std::string &what)
{
    if (!truth)
        throw std::runtime_error(what);
}

void run(const char *python)
{
    Interpreter interpreter(python);
    const numbabn_api *api = interpreter.numbabn("float64");
    const std::vector<int64_t> shape = {16, 28, 28, 32};
    const size_t channels = 32, size = 16 * 28 * 28 * channels;

    std::mt19937 random(1);
    std::normal_distribution<double> normal;
    std::vector<double> x(size), target(size);
    for (size_t i = 0; i < size; i++) {
        double value = normal(random);
        x[i] = 5 + 3 * value;
        target[i] = std::fmax(0.0, 0.5 + 2 * value);
    }

    BatchNorm layer(api, shape);
    const double before = loss_of(layer.forward(x), target);
    const double rate = 2.0 * static_cast<double>(channels);
    for (int step = 0; step < 60; step++) {
        std::vector<double> y = layer.forward(x);
        layer.backward(slope_of(y, target));
        for (size_t c = 0; c < channels; c++) {
            layer.weight[c] -= rate / 2 * layer.grad_weight[c];
            layer.bias[c] -= rate / 2 * layer.grad_bias[c];
        }
    }
    const double after = loss_of(layer.forward(x), target);
    std::printf("loss %.4f, after 60 steps %.6f\n", before, after);
    std::printf("weight %.3f, bias %.3f, running mean %.3f, running variance %.3f\n",
        layer.weight[0], layer.bias[0], layer.running_mean[0], layer.running_var[0]);
    require(after < before / 100, "the layer did not learn");

    // The gradients by x, weight and bias against differences of the loss.
    layer.weight.assign(channels, 1.5);
    std::vector<double> y = layer.forward(x);
    std::vector<double> dx = layer.backward(slope_of(y, target));
    const double dweight = layer.grad_weight[7], dbias = layer.grad_bias[7], step = 1e-4;
    auto difference = [&](double &number) {
        const double kept = number;
        number = kept + step;
        const double above = loss_of(layer.forward(x), target);
        number = kept - step;
        const double below = loss_of(layer.forward(x), target);
        number = kept;
        return (above - below) / (2 * step);
    };
    const double by_weight = difference(layer.weight[7]), by_bias = difference(layer.bias[7]);
    const double by_x = difference(x[12345]);
    std::printf("dweight %.6f, by differences %.6f; dbias %.6f, %.6f; dx %.3e, %.3e\n", dweight,
        by_weight, dbias, by_bias, dx[12345], by_x);
    require(std::fabs(dweight - by_weight) < 1e-6, "dweight is wrong");
    require(std::fabs(dbias - by_bias) < 1e-6, "dbias is wrong");
    require(std::fabs(dx[12345] - by_x) < 1e-9, "dx is wrong");

    // What is wrong with a call arrives as an exception.
    try {
        BatchNorm(api, {1, 1, 1, 32}).forward(std::vector<double>(32));
        require(false, "one value per channel was accepted");
    } catch (const std::invalid_argument &error) {
        std::printf("refused: %s\n", error.what());
    }
}

} // namespace

int main(int argc, char **argv)
{
    try {
        run(argc > 1 ? argv[1] : "python3");
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
