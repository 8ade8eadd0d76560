"""Train a small residual network on handwritten digits in JAX, with numbabn's batch normalization.

Needs ``pip install ".[jax,sklearn]"``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from numbabn.jax import batch_norm

CHANNELS, CLASSES, BATCH, STEPS, RATE = 32, 10, 128, 100, 0.5


def initialize(rng):
    """Give the weights, which are learned, and the running statistics, which follow the data."""

    def normal(*shape, fan_in):
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * np.sqrt(2 / fan_in))

    kernels = [normal(CHANNELS, c, 3, 3, fan_in=9 * c) for c in (1, CHANNELS, CHANNELS)]
    norms = [{"weight": jnp.ones(CHANNELS), "bias": jnp.zeros(CHANNELS)} for _ in kernels]
    dense = normal(CHANNELS, CLASSES, fan_in=CHANNELS)
    running = [(jnp.zeros(CHANNELS), jnp.ones(CHANNELS)) for _ in kernels]
    return {"kernels": kernels, "norms": norms, "dense": dense}, running


def network(weights, running, x, training):
    """Give logits and the new running statistics: JAX's arrays are never written."""
    new_running = []
    shortcuts = [None, None, 0]  # the third layer adds what the first one gave
    outputs = []
    for kernel, norm, (mean, var), shortcut in zip(
        weights["kernels"], weights["norms"], running, shortcuts, strict=True
    ):
        x = jax.lax.conv(x, kernel, window_strides=(1, 1), padding="SAME")
        # One sweep over memory: normalize, add the shortcut, ReLU, and update the statistics.
        x, mean, var = batch_norm(
            x, mean, var, **norm, training=training, activation="relu",
            residual=None if shortcut is None else outputs[shortcut],
        )  # fmt: skip
        outputs.append(x)
        new_running.append((mean, var))
    return x.mean(axis=(2, 3)) @ weights["dense"], new_running


def loss_of(weights, running, x, labels):
    """Give the cross entropy, and what is no gradient's business beside it."""
    logits, running = network(weights, running, x, training=True)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -chosen.mean(), running


@jax.jit
def train_step(weights, running, x, labels):
    """Take one step of gradient descent."""
    (loss, running), gradients = jax.value_and_grad(loss_of, has_aux=True)(
        weights, running, x, labels
    )
    weights = jax.tree.map(lambda w, g: w - RATE * g, weights, gradients)
    return weights, running, loss


@jax.jit
def accuracy(weights, running, x, labels):
    """Judge the network in eval mode, by its running statistics."""
    logits, _ = network(weights, running, x, training=False)
    return (logits.argmax(axis=1) == labels).mean()


def main():
    """Train, and print how it goes."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.25, random_state=0)

    rng = np.random.default_rng(0)
    weights, running = initialize(rng)
    for step in range(STEPS):
        batch = rng.choice(len(x), BATCH, replace=False)
        weights, running, loss = train_step(weights, running, x[batch], y[batch])
        if step % 25 == 0 or step == STEPS - 1:
            right = accuracy(weights, running, x_test, y_test)
            print(f"step {step:3}  loss {loss:.3f}  test accuracy {right:.3f}")

    assert loss < 0.2
    assert right > 0.95

    # The same layer under vmap: the gradient of each of eight batches by itself.
    batches = x[: 8 * BATCH].reshape(8, BATCH, 1, 8, 8), y[: 8 * BATCH].reshape(8, BATCH)
    gradient = partial(jax.grad(loss_of, has_aux=True), weights, running)
    gradients, _ = jax.jit(jax.vmap(gradient))(*batches)
    one, _ = gradient(batches[0][3], batches[1][3])
    np.testing.assert_allclose(gradients["dense"][3], one["dense"], atol=1e-5)
    norms = jnp.sqrt((gradients["dense"] ** 2).sum(axis=(1, 2)))
    print("norms of eight batches' gradients:", *(f"{norm:.3f}" for norm in norms))


if __name__ == "__main__":
    main()
