import gzip
import io
import json
import re
import struct
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from numbabn.cli import demo, digits, main, network, report, training
from numbabn.cli.command import CommandError


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # the demo sets it where it is not
    monkeypatch.chdir(tmp_path)


def run_demo(*arguments):
    assert main(["demo", *arguments, "--json", "demo.json"]) == 0
    with open("demo.json", encoding="utf-8") as file:
        return json.load(file)


def untimed(document):
    """Leave out what may differ between two runs."""
    for series in document["without"], document["with"]:
        del series["seconds"], series["seconds_in_numbabn"]
    return document


# The command from end to end.


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_demo(capsys, model):
    document = run_demo("--model", model, "--steps", "30", "--seed", "3")
    out, err = capsys.readouterr()
    assert err == ""
    assert "scikit-learn digits, 8x8 pixels: 1347 to train on, 450 to test on" in out
    assert "against the float64 oracle: agrees" in out
    for row in "test accuracy at step 30", "steps to reach 90%", "seconds in numbabn":
        assert row in out
    last = f"{document['without']['accuracy'][-1]:.1%}", f"{document['with']['accuracy'][-1]:.1%}"
    assert re.search(rf"at step 30 │ +{last[0]} │ +{last[1]} │", out)
    assert re.search(r"^Picture: .*demo\.png$", out, re.M)

    assert document["settings"] == {
        "model": model,
        "steps": 30,
        "batch_size": 60,
        "learning_rate": {"mlp": 2.0, "conv": 1.0}[model],
        "seed": 3,
    }
    for series in document["without"], document["with"]:
        assert series["steps"] == list(range(31))
        assert len(series["losses"]) == 30
        assert all(0 <= accuracy <= 1 for accuracy in series["accuracy"])
        low, median, high = (np.array(series["percentiles"][p]) for p in ("15", "50", "85"))
        assert len(low) == 31
        assert (low <= median).all()
        assert (median <= high).all()
    assert document["without"]["seconds_in_numbabn"] == 0
    assert 0 < document["with"]["seconds_in_numbabn"] < document["with"]["seconds"]


def test_picture_shows_both_series():
    run_demo("--steps", "20", "--plot", "figure.png")
    picture = imread("figure.png")[..., :3]
    height, width, _ = picture.shape
    assert (width, height) == (1650, 735)
    for color, panels in ((0.784, 0.314, 0.118), "ab"), ((0.043, 0.384, 0.643), "ac"):
        drawn = np.abs(picture - color).max(axis=2) < 0.02
        columns = np.flatnonzero(drawn.any(axis=0)) / width
        thirds = {"abc"[i] for i in (columns[:, np.newaxis] > (0.38, 0.7)).sum(axis=1)}
        assert thirds == set(panels)
        assert drawn.sum() > 500


def test_same_seed_same_bits():
    first, again = (untimed(run_demo("--steps", "60", "--seed", "5")) for _ in range(2))
    other = untimed(run_demo("--steps", "60", "--seed", "6"))
    assert first == again
    assert other["with"]["losses"] != first["with"]["losses"]


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_batch_normalization_gets_there_in_fewer_steps(model):
    document = run_demo("--model", model, "--steps", "2000" if model == "mlp" else "600")
    without, with_ = document["without"], document["with"]
    assert with_["steps_to_goal"] <= 100
    assert without["steps_to_goal"] is None or without["steps_to_goal"] >= 300
    for series in without, with_:
        reached = [s for s, a in zip(series["steps"], series["accuracy"], strict=True) if a >= 0.9]
        assert series["steps_to_goal"] == (reached[0] if reached else None)


def test_json_to_stdout_is_only_json(capsys):
    assert main(["demo", "--steps", "2", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["settings"]["steps"] == 2
    assert "steps to reach 90%" in err


def test_progress_on_a_terminal_only():
    shown = {}
    for terminal in True, False:
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with report.progress(console, "with batch normalization", 3) as step:
            for _ in range(3):
                step()
        shown[terminal] = console.file.getvalue()
    assert "3/3" in shown[True]
    assert shown[False].strip() == ""


def test_disagreement_with_the_oracle_fails(capsys, monkeypatch):
    monkeypatch.setattr(demo, "TOLERANCE", 1e-12)
    assert main(["demo", "--steps", "2"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"numbabn: one batch differs from the oracle by more than 1e-12: y .*\n", err
    )


def test_overflow_fails(capsys):
    assert main(["demo", "--steps", "20", "--learning-rate", "1e300"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"numbabn: overflow at step \d+: try a smaller --learning-rate\n", err)


def test_missing_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo"]) == 2
    message = 'numbabn: matplotlib and rich not found: pip install "numbabn[demo]"\n'
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "cnn"], "invalid choice: 'cnn'"),
        (["--steps", "0"], "--steps: expected a whole number, 1 or more, got '0'"),
        (["--steps", "many"], "--steps: expected a whole number, 1 or more, got 'many'"),
        (["--seed", "-1"], "--seed: expected a whole number, 0 or more, got '-1'"),
        (["--batch-size", "1"], "--batch-size: expected a whole number, 2 or more, got '1'"),
        (["--batch-size", "5000"], "--batch-size: expected at most the 1347 training images"),
        (["--learning-rate", "0"], "--learning-rate: expected a number above 0, got '0'"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0, got 'nan'"),
        (["--plot", "demo.txt"], "--plot: expected a name ending in .png, .pdf, .svg, got 'demo"),
        (["--plot", "no/demo.png"], "--plot: the folder of 'no/demo.png' does not exist"),
        (["--json", "."], "--json: expected a file, got the folder '.'"),
        (["--data", "no/folder"], "no/folder: no such folder"),
    ],
)
def test_wrong_use_takes_one_line(capsys, argv, message):
    assert main(["demo", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in "mlp", "2000", "60", "2.0 for mlp, 1.0 for conv", "0", "demo.png":
        assert f"(default: {default})" in text


# The data.


def idx(array):
    codes = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
    head = struct.pack(
        f">4B{array.ndim}I", 0, 0, codes[array.dtype.str[1:]], array.ndim, *array.shape
    )
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A small data set whose label is the bright row of its image; two of its files gzipped."""
    rng = np.random.default_rng(0)
    for role, n in ("train", 90), ("t10k", 30):
        labels = rng.integers(0, 5, n).astype(np.uint8)
        images = rng.integers(0, 40, (n, 5, 4)).astype(np.uint8)
        images[np.arange(n), labels] += 200
        (tmp_path / f"{role}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{role}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(tmp_path, dtype, pack):
    array = np.arange(-30, 30).reshape(3, 4, 5).astype(dtype)
    path = tmp_path / "data"
    path.write_bytes(pack(idx(array)))
    read = digits.read_idx(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


IDX = idx(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX magic number such as 00000803, found an empty file"),
        (b"\x89PNG\r\n", "expected an IDX magic number such as 00000803, found 89504e47"),
        (b"\0\0\x07\1\0\0\0\0", "expected an IDX magic number such as 00000803, found 00000701"),
        (IDX[:7], "expected a header of 12 bytes, found 7 bytes"),
        (IDX[:-1], "expected 18 bytes for 2x3 values, found 17"),
        (IDX + b"\0", "expected 18 bytes for 2x3 values, found 19"),
        (gzip.compress(IDX)[:-9], "cannot be read: "),
        (b"\x1f\x8b" + IDX, "cannot be read: "),
    ],
)
def test_idx_errors(tmp_path, content, message):
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(CommandError, match=re.escape(f"{path}: {message}")):
        digits.read_idx(path)


def test_folder(folder, capsys):
    data = digits.load_folder(folder)
    assert data.train_images.shape == (90, 1, 5, 4)
    assert data.test_images.shape == (30, 1, 5, 4)
    assert data.train_images.dtype == np.float32
    assert 200 / 255 <= data.train_images.max() <= 1
    assert data.classes == 5
    np.testing.assert_array_equal(data.test_images.mean(axis=(1, 3)).argmax(1), data.test_labels)
    document = run_demo("--data", str(folder), "--steps", "100", "--batch-size", "32")
    assert document["with"]["accuracy"][-1] > 0.9
    assert document["data"]["name"] == folder.name
    assert "5x4 pixels: 90 to train on, 30 to test on" in capsys.readouterr().out


def test_plain_file_takes_the_place_of_its_gzipped_twin(folder):
    labels = np.full(30, 3, np.uint8)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    np.testing.assert_array_equal(digits.load_folder(folder).test_labels, labels)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", None, "expected one file *train*images*, found none"),
        ("t10k-images-idx3-ubyte", None, "expected one file *t10k*images* or *test*images*, found"),
        (
            "emnist-train-images",
            IDX,
            "*train*images*, found emnist-train-images, train-images-idx3-ubyte",
        ),
        ("train-images-idx3-ubyte", np.zeros((90, 5, 4)), "expected unsigned bytes, found float64"),
        ("train-images-idx3-ubyte", np.zeros((9, 5), np.uint8), "expected 3 dimensions, found 2"),
        (
            "train-images-idx3-ubyte",
            np.zeros((0, 5, 4), np.uint8),
            "expected images, found none: its shape is (0, 5, 4)",
        ),
        (
            "t10k-images-idx3-ubyte",
            np.zeros((30, 4, 4), np.uint8),
            "expected 5x4 pixels, found 4x4 pixels",
        ),
        ("t10k-labels-idx1-ubyte", np.zeros((30, 1), np.uint8), "expected 1 dimension, found 2"),
        ("t10k-labels-idx1-ubyte", np.zeros(30), "expected integers, found float64"),
        ("t10k-labels-idx1-ubyte", np.zeros(29, np.uint8), "expected 30 labels, found 29"),
        ("t10k-labels-idx1-ubyte", np.full(30, -1, np.int32), "expected labels of 0 or more"),
    ],
)
def test_folder_errors(folder, capsys, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else idx(content))
    assert main(["demo", "--data", str(folder)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert str(folder) in err


def test_split_has_each_digit_in_both_parts():
    data = digits.load_digits(np.random.default_rng(0))
    train, test = (np.bincount(labels) for labels in (data.train_labels, data.test_labels))
    np.testing.assert_allclose(test / (train + test), 0.25, atol=0.004)
    assert (train + test).sum() == 1797
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)
    both = np.concatenate([data.train_images, data.test_images]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797


# The network, against finite differences in float64.


def numeric_gradient(f, x, step=1e-6):
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + step
        above = f()
        x[i] = kept - step
        gradient[i] = (above - f()) / (2 * step)
        x[i] = kept
    return gradient


RNG = np.random.default_rng(7)
LAYERS = {
    "flatten": (network.Flatten(), (3, 2, 2, 3)),
    "linear": (network.Linear(5, 4, RNG, 1.0), (3, 5)),
    "conv, even": (network.Conv3x3(2, 3, RNG, 1.0), (2, 2, 6, 4)),
    "conv, odd": (network.Conv3x3(1, 2, RNG, 1.0), (3, 1, 5, 7)),
    "conv, one pixel": (network.Conv3x3(1, 2, RNG, 1.0), (2, 1, 1, 1)),
    "bias, rows": (network.Bias(5), (3, 5)),
    "bias, planes": (network.Bias(2), (3, 2, 2, 3)),
    "sigmoid": (network.Sigmoid(), (3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients(name):
    layer, shape = LAYERS[name]
    rng = np.random.default_rng(1)
    for parameter in vars(layer).keys() & {"weight", "bias"}:
        setattr(layer, parameter, rng.standard_normal(getattr(layer, parameter).shape))
    x = rng.standard_normal(shape)
    dy = rng.standard_normal(layer.forward(x).shape)

    def loss():
        return float((layer.forward(x) * dy).sum())

    expected = numeric_gradient(loss, x)
    layer.forward(x)
    np.testing.assert_allclose(layer.backward(dy), expected, rtol=1e-6, atol=1e-8)
    for parameter, gradient in layer.parameters():
        expected = numeric_gradient(loss, parameter)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


def test_convolution_by_hand():
    layer = network.Conv3x3(2, 4, RNG, 1.0)
    x = RNG.standard_normal((3, 2, 5, 6)).astype(np.float32)
    y = layer.forward(x)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    assert y.shape == (3, 4, 3, 3)
    for n, k, i, j in np.ndindex(y.shape):
        window = padded[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        assert y[n, k, i, j] == pytest.approx((window * layer.weight[k]).sum(), abs=1e-5)


def test_cross_entropy_gradient():
    logits = np.random.default_rng(2).standard_normal((4, 3))
    labels = np.array([0, 2, 1, 2])
    loss, gradient = network.cross_entropy(logits, labels)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(p[np.arange(4), labels]).mean())
    expected = numeric_gradient(lambda: network.cross_entropy(logits, labels)[0], logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


def test_nothing_overflows_at_large_inputs():
    x = np.array([[-1e4, 0, 1e4]], np.float32)
    np.testing.assert_array_equal(network.Sigmoid().forward(x), [[0, 0.5, 1]])
    loss, gradient = network.cross_entropy(x, np.array([0]))
    assert loss == 2e4
    np.testing.assert_array_equal(gradient, [[-1, 0, 1]])


# Training and evaluation.


@pytest.fixture(scope="module")
def data():
    return digits.load_digits(np.random.default_rng(0))


def settings(model="mlp", steps=10):
    return training.Settings(model, steps, batch_size=60, learning_rate=1.0, seed=0)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_both_networks_start_from_the_same_weights(model, data):
    plain, normalized = (
        training.build(settings(model), data, clock) for clock in (None, network.Stopwatch())
    )
    weights = (
        [layer.weight for layer in net.layers if hasattr(layer, "weight")]
        for net in (plain, normalized)
    )
    for a, b in zip(*weights, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_batches_go_through_the_data_without_repeating(data):
    stream = training.batches(data, 60, np.random.default_rng(0))
    epoch = [next(stream)[0] for _ in range(1347 // 60)]
    assert len(np.unique(np.concatenate(epoch).reshape(-1, 64), axis=0)) == 60 * len(epoch)


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_population_statistics_are_those_of_algorithm_2(model, data):
    net = training.build(settings(model), data, network.Stopwatch())
    sample = [data.train_images[i : i + 60] for i in range(0, 300, 60)]
    twin = training.inference_twin(net, sample)
    first = next(i for i, layer in enumerate(net.layers) if hasattr(layer, "norm"))
    inputs = []
    for x in sample:
        for layer in net.layers[:first]:
            x = layer.forward(x)
        inputs.append(np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64))
    norm = twin.layers[first].norm
    means, variances = [x.mean(axis=0) for x in inputs], [x.var(axis=0, ddof=1) for x in inputs]
    np.testing.assert_allclose(norm.running_mean, np.mean(means, axis=0), atol=1e-6)
    np.testing.assert_allclose(norm.running_var, np.mean(variances, axis=0), rtol=1e-5)
    assert not norm.training
    # An example's result no longer depends on its batch.
    x = data.test_images[:20]
    alone = np.concatenate([twin.forward(x[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(twin.forward(x), alone, rtol=1e-4, atol=1e-5)


def test_evaluation_leaves_the_training_as_it_is(monkeypatch, data):
    net = training.build(settings(), data, network.Stopwatch())
    norms = [layer.norm for layer in net.layers if hasattr(layer, "norm")]
    before = [norm.state_dict() for norm in norms]
    twin = training.inference_twin(net, [data.train_images[:60]])
    training.look(twin, data)
    for norm, state in zip(norms, before, strict=True):
        assert norm.training
        for name, value in norm.state_dict().items():
            np.testing.assert_array_equal(value, state[name])

    seen = training.train(settings(), data, normalize=True, on_step=lambda: None)
    monkeypatch.setattr(training, "LOOKS", 1)
    unseen = training.train(settings(), data, normalize=True, on_step=lambda: None)
    assert (len(seen.steps), len(unseen.steps)) == (11, 2)
    assert seen.losses == unseen.losses


def test_typical_unit_is_the_middle_one():
    history = training.History()
    wandering = np.array([5.0, 1.0, 3.0, 9.0, 2.0])
    for look in range(3):
        history.percentiles.append(np.outer([0, look, 0], wandering))
    assert training.typical_unit(history) == 2
    np.testing.assert_array_equal(history.unit_percentiles(2), [[0, 0, 0], [0, 3, 6], [0, 0, 0]])
