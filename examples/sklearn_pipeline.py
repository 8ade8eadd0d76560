"""Scale columns and channels with batch normalization's statistics in scikit-learn's pipelines.

Needs ``pip install ".[sklearn]"``. The data come with scikit-learn.
"""

import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_sample_images
from sklearn.decomposition import PCA
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from numbabn.sklearn import BatchNormScaler

# 1. Columns: measurements of cells, some below 0.01, some above 1000.
X, y = load_breast_cancer(return_X_y=True)
model = LogisticRegression(max_iter=1000)
scaled = cross_val_score(make_pipeline(BatchNormScaler(), model), X, y).mean()
print(f"columns: cross-validated accuracy {scaled:.3f}")
assert scaled > 0.97

# 2. Exactness: the same measurements as float32, far from zero.
far = (X + 1e6).astype(np.float32)
deviations = far.astype(np.float64) - far.mean(axis=0, dtype=np.float64)
expected = deviations / np.maximum(deviations.std(axis=0), 1e-300)
moved = deviations.any(axis=0)  # so far away, some columns are constant in float32
for scaler in (BatchNormScaler(), StandardScaler()):
    error = np.abs(scaler.fit_transform(far) - expected)[:, moved].max()
    print(f"float32 at an offset of 1e6: {type(scaler).__name__:15} errs by {error:.1e}")
    if isinstance(scaler, BatchNormScaler):
        assert error < 1e-5

# 3. Channels, more data than one batch: patches of two photographs, red, green and blue.
rng = np.random.default_rng(0)
with tempfile.TemporaryDirectory() as folder:
    shape = (100_000, 8 * 8 * 3)
    patches = np.memmap(Path(folder, "patches"), np.float32, "w+", shape=shape)
    half = len(patches) // 2
    for i, photo in enumerate(load_sample_images().images):
        chosen = extract_patches_2d(photo, (8, 8), max_patches=half, random_state=i)
        patches[i * half : (i + 1) * half] = chosen.reshape(half, -1)

    # Flattened from (N, 8, 8, 3): three channels, each with one mean and one scale.
    scaler = BatchNormScaler(channels=3, axis=-1)
    for start in range(0, len(patches), 8192):
        scaler.partial_fit(patches[start : start + 8192])
    whole = BatchNormScaler(channels=3, axis=-1).fit(patches)
    np.testing.assert_allclose(scaler.mean_, whole.mean_, rtol=1e-13)
    np.testing.assert_allclose(scaler.var_, whole.var_, rtol=1e-13)
    print(f"channels: mean {scaler.mean_.round(1)}, scale {scaler.scale_.round(1)}, in batches")

    sample = patches[rng.choice(len(patches), 4000, replace=False)]
    pipeline = make_pipeline(FrozenEstimator(scaler), PCA(16)).fit(sample)  # not fitted anew
    kept = pipeline[-1].explained_variance_ratio_.sum()
    print(f"16 components keep {kept:.1%} of the patches' variance")
    assert kept > 0.9

    # And back: what the components keep, as colours again.
    restored = pipeline.inverse_transform(pipeline.transform(sample[:1000]))
    error = np.abs(restored - sample[:1000]).mean()
    print(f"restored from them, colours of 0 to 255 are off by {error:.1f} on average")
    assert error < 15
    del patches
