"""Features of many dimensions on a plane."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

MIN_TSNE_POINTS = 30
PCA_BEFORE_TSNE = 50


def embed(values: np.ndarray, *, normalize: bool = False) -> tuple[np.ndarray, str]:
    """Two coordinates for each row of [N, D]: t-SNE, or PCA when there are too few rows for neighborhoods.

    Args:
        values: float [N, D].
        normalize: scale rows to unit length first, so that the cosine decides who is a neighbor.

    Returns:
        ([N, 2], "t-SNE" or "PCA").
    """
    values = np.asarray(values, dtype=np.float32)
    if normalize:
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    # Fewer distinct rows than neighbors (a collapsed or tiny test set) make the neighborhoods meaningless.
    if values.shape[1] >= 2 and len(np.unique(values, axis=0)) >= MIN_TSNE_POINTS:
        if min(values.shape) > PCA_BEFORE_TSNE:
            values = PCA(PCA_BEFORE_TSNE, random_state=0).fit_transform(values)
        perplexity = min(30.0, (len(values) - 1) / 3)
        return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(values), "t-SNE"
    coordinates = np.zeros((len(values), 2), dtype=np.float32)
    if values.size:
        left, scale, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
        coordinates[:, : len(scale)] = (left * scale)[:, :2]
    return coordinates, "PCA"
