"""``numbabn demo``: train the paper's network on digits, with and without batch normalization."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from . import training
from .agreement import TOLERANCE, worst_errors
from .command import (
    CommandError,
    add_json_option,
    output_file,
    positive_number,
    require,
    whole_number,
    write_json,
)
from .digits import Digits, load_digits, load_folder
from .network import Stopwatch
from .training import History, Settings

TITLES = {
    "mlp": "three hidden layers of 100 sigmoid units",
    "conv": "two convolutions of 16 and 32 channels with sigmoids",
}
# On the digits the best, of 0.5, 1 and 2 and over seeds 0 to 2, for the networks without
# normalization, so that the comparison does not flatter it.
LEARNING_RATES = {"mlp": 2.0, "conv": 1.0}
FORMATS = (".png", ".pdf", ".svg")


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="train a network on handwritten digits, with and without batch normalization",
        description=(
            "Train a network of sigmoid units on handwritten digits twice, without and with "
            "batch normalization, from the same initial weights, on the same batches and at the "
            "same learning rate. Show the test accuracies side by side and draw them in the "
            "manner of Figure 1 of Ioffe & Szegedy, 2015."
        ),
    )
    add = parser.add_argument
    models = "; ".join(f"{name}: {title}" for name, title in TITLES.items())
    add("--model", choices=TITLES, default="mlp", help=f"{models} (default: %(default)s)")
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="where the four IDX files of MNIST or its kin lie, gzipped or not "
        "(default: the digits that come with scikit-learn)",
    )
    add(
        "--steps",
        type=whole_number(1),
        default=2000,
        metavar="N",
        help="training steps (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=whole_number(2),
        default=60,
        metavar="N",
        help="images per step (default: %(default)s)",
    )
    add(
        "--learning-rate",
        type=positive_number,
        metavar="F",
        help="of plain gradient descent, the same with and without (default: "
        + ", ".join(f"{rate} for {model}" for model, rate in LEARNING_RATES.items())
        + ")",
    )
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of all that is random; the same seed gives the same result (default: %(default)s)",
    )
    add(
        "--plot",
        type=_picture_file,
        default=Path("demo.png"),
        metavar="FILE",
        help="where to draw the picture: .png, .pdf or .svg (default: %(default)s)",
    )
    add_json_option(parser, "the settings and all series")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check one batch against the oracle, train both networks, show what came out."""
    require("demo", "matplotlib", "rich", "sklearn", "threadpoolctl")
    # Between the small kernels NumPy works alone: threads that spin for the next kernel would take
    # a core from it, and stall it for milliseconds when another program wants that core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Slow to import, and not there without the extra.
    from rich.console import Console
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from . import figure, report

    learning_rate = args.learning_rate or LEARNING_RATES[args.model]
    settings = Settings(args.model, args.steps, args.batch_size, learning_rate, args.seed)
    digits = load_folder(args.data) if args.data else load_digits(settings.rng(training.SPLIT))
    if settings.batch_size > len(digits.train_images):
        raise CommandError(
            f"--batch-size: expected at most the {len(digits.train_images)} training images, "
            f"got {settings.batch_size}"
        )
    console = Console(stderr=args.json == Path("-"), highlight=False, markup=False, emoji=False)
    console.print(
        f"Data      {digits.name}, {digits.height}x{digits.width} pixels: "
        f"{len(digits.train_images)} to train on, {len(digits.test_images)} to test on\n"
        f"Network   {TITLES[settings.model]}\n"
        f"Training  {_training(settings)}",
        soft_wrap=True,
    )
    # The matrices are small: threads of BLAS would cost more than they save.
    with threadpool_limits(1, user_api="blas"):
        with console.status("Compiling the kernels, checking a batch"):
            errors = _check(settings, digits)
        console.print(
            "Check     one batch, forward and backward, against the float64 oracle: "
            f"agrees within {TOLERANCE:g}\n          largest errors: {errors}",
            soft_wrap=True,
        )
        histories = []
        for normalize, name in (False, "without"), (True, "with"):
            with report.progress(console, f"{name} batch normalization", settings.steps) as step:
                history = training.train(settings, digits, normalize=normalize, on_step=step)
            histories.append(history)
    plain, normalized = histories
    console.print(report.results(plain, normalized))
    unit = training.typical_unit(plain)
    title = f"{digits.name}: {TITLES[settings.model]}"
    figure.draw(args.plot, title, _training(settings), plain, normalized, unit)
    console.print(f"Picture: {args.plot.resolve()}", soft_wrap=True)
    if args.json is not None:
        write_json(args.json, _document(settings, digits, plain, normalized, unit))
    return 0


def _picture_file(text: str) -> Path:
    path = output_file(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected a name ending in {', '.join(FORMATS)}, got {text!r}"
        )
    return path


def _training(settings: Settings) -> str:
    return (
        f"{settings.steps} steps, batches of {settings.batch_size}, "
        f"learning rate {settings.learning_rate:g}, seed {settings.seed}"
    )


def _check(settings: Settings, digits: Digits) -> str:
    """Hold one batch against the oracle, and compile every kernel before the timing starts."""
    network = training.build(settings, digits, Stopwatch())
    stream = training.batches(digits, settings.batch_size, settings.rng(training.BATCHES))
    images, labels = next(stream)
    training.look(training.inference_twin(network, [images]), digits)
    worst = worst_errors(network, images, labels)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    if not all(error <= TOLERANCE for error in worst.values()):
        raise CommandError(
            f"one batch differs from the oracle by more than {TOLERANCE:g}: {errors}", code=1
        )
    return errors


def _document(
    settings: Settings, digits: Digits, plain: History, normalized: History, unit: int
) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(settings),
        "data": {
            "name": digits.name,
            "train_images": len(digits.train_images),
            "test_images": len(digits.test_images),
            "height": digits.height,
            "width": digits.width,
            "classes": digits.classes,
        },
        "goal": training.GOAL,
        "unit": unit,
        "without": _series(plain, unit),
        "with": _series(normalized, unit),
    }


def _series(history: History, unit: int) -> dict[str, Any]:
    percentiles = zip(training.PERCENTILES, history.unit_percentiles(unit).tolist(), strict=True)
    return {
        "steps": history.steps,
        "accuracy": history.accuracy,
        "losses": history.losses,
        "percentiles": {f"{percentile}": series for percentile, series in percentiles},
        "steps_to_goal": history.steps_to(training.GOAL),
        "seconds": history.seconds,
        "seconds_in_numbabn": history.numbabn_seconds,
    }
