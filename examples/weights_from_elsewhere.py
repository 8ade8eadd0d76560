"""Take batch norm from Keras, Flax and PyTorch, train on, and give the weights back.

Names, momentum, eps, the running variance's denominator and the channel axis differ from library to
library; `numbabn.conventions` knows them. The arrays here are as the libraries hand them out; none
of them has to be installed.
"""

import numpy as np

import numbabn
from numbabn.conventions import settings_from, settings_to, state_dict_from, state_dict_to

C = 128
rng = np.random.default_rng(0)
gamma, beta = rng.uniform(0.5, 1.5, C), rng.standard_normal(C)
mean, var = rng.standard_normal(C), rng.uniform(0.5, 2, C)
images = rng.standard_normal((16, 28, 28, C), dtype=np.float32)

# Keras: {variable.path: variable for variable in layer.weights}, and what the layer was made with.
keras = {"bn/gamma": gamma, "bn/beta": beta, "bn/moving_mean": mean, "bn/moving_variance": var}
from_keras = numbabn.BatchNorm(C, **settings_from("keras", {"momentum": 0.99}))
from_keras.load_state_dict(state_dict_from("keras", keras))
print("Keras:  ", from_keras)

# Flax: what module.init returns.
flax = {"params": {"scale": gamma, "bias": beta}, "batch_stats": {"mean": mean, "var": var}}
from_flax = numbabn.BatchNorm(C, **settings_from("flax", {"momentum": 0.99, "epsilon": 1e-3}))
from_flax.load_state_dict(state_dict_from("flax", flax))
print("Flax:   ", from_flax)

# PyTorch: module.state_dict(), or the part of a network's. Channels first there, last here.
names = ("weight", "bias", "running_mean", "running_var")
torch = {f"layer1.0.bn1.{n}": a for n, a in zip(names, (gamma, beta, mean, var), strict=True)}
settings = settings_from("pytorch", {"momentum": 0.01, "eps": 1e-3}) | {"axis": -1}
from_torch = numbabn.BatchNorm(C, **settings)
from_torch.load_state_dict(state_dict_from("pytorch", torch))
print("PyTorch:", from_torch)

# The same layer three times. In training the first two keep the biased variance, PyTorch's not.
layers = (from_keras, from_flax, from_torch)
y = from_keras.eval()(images)
for layer in layers:
    np.testing.assert_array_equal(layer.eval()(images), y)
    layer.train()(images)
np.testing.assert_array_equal(from_keras.running_var, from_flax.running_var)
count = images.size // C
moved = [layer.running_var - 0.99 * var.astype(np.float32) for layer in layers]
ratio = np.median(moved[2] / moved[0])
print(f"PyTorch's batch variance is {ratio:.5f} of Keras', n / (n - 1) = {count / (count - 1):.5f}")
np.testing.assert_allclose(ratio, count / (count - 1), rtol=2e-5)

# And back: layer.set_weights(list(...)) in Keras, module.apply({...}, x) in Flax.
weights = state_dict_to("keras", from_keras.state_dict())
print("back to Keras:", list(weights), settings_to("keras", {"momentum": 0.01, "eps": 1e-3}))
variables = state_dict_to("flax", from_keras.state_dict())
print("back to Flax: ", {group: list(arrays) for group, arrays in variables.items()})
np.testing.assert_array_equal(variables["batch_stats"]["var"], from_keras.running_var)
