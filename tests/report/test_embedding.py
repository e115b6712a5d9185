"""Embeddings: neighborhoods kept, few points by PCA, against scikit-learn."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from bacon_fast.report.embedding import embed


def test_tsne_keeps_classes_together():
    digits = load_digits(n_class=4)
    points, kind = embed(digits.data[:200])
    assert kind == "t-SNE" and points.shape == (200, 2)
    assert KNeighborsClassifier(5).fit(points, digits.target[:200]).score(points, digits.target[:200]) > 0.97


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (1, 4), (2, 1), (3, 8), (20, 60), (200, 1)])
def test_few_points_or_dimensions_fall_back_to_pca(rows, columns):
    values = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)
    points, kind = embed(values)
    assert kind == "PCA" and points.shape == (rows, 2) and np.isfinite(points).all()
    count = min(2, rows, columns)
    if rows > 1:
        expected = PCA(count).fit_transform(values)
        # Axes are determined up to their sign, and only where there is variance.
        np.testing.assert_allclose(np.abs(points[:, :count]), np.abs(expected), atol=1e-4)
    assert not points[:, count:].any()


def test_collapsed_features_have_no_neighborhoods():
    points, kind = embed(np.ones((100, 8)), normalize=True)
    assert kind == "PCA" and np.abs(points).max() < 1e-5


def test_normalized_embedding_ignores_the_length_of_the_rows():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(12, 5))
    scaled = values * rng.uniform(0.1, 10, size=(12, 1))
    np.testing.assert_allclose(embed(scaled, normalize=True)[0], embed(values, normalize=True)[0], atol=1e-5)
    assert np.abs(embed(scaled)[0] - embed(values)[0]).max() > 0.1
