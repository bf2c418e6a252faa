"""Embeddings of images: their nearest neighbours, and their places in a plane."""

import warnings
from threading import Timer
from typing import Any, Literal, get_args

import numpy as np

from train.errors import UsageError, unknown
from train.runtime import say

Projection = Literal["pca", "tsne", "umap"]
PATIENCE = 5.0  # seconds before a reader is told why nothing happens


def neighbours(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `k` rows of `bank` [N, F] that are most similar to each of `queries` [Q, F], by cosine.

    Returns:
      (indices int [Q, k], similarities float32 [Q, k] in [-1, 1]), most similar first; ties go to the lower index.
    """
    similarity = _unit(queries) @ _unit(bank).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return nearest, np.take_along_axis(similarity, nearest, axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def project(features: np.ndarray, method: Projection, seed: int = 0) -> np.ndarray:
    """Place features [N, F] in a plane, float32 [N, 2].

    `pca` shows the two directions of largest variance; `tsne` (https://jmlr.org/papers/v9/vandermaaten08a.html) and
    `umap` (https://arxiv.org/abs/1802.03426, extra `umap`) keep near points near, and their distances between groups
    mean little. The same seed gives the same picture.

    Raises:
      UsageError: an unknown method, fewer than 4 images, or umap-learn is not installed.
    """
    if method not in get_args(Projection):
        raise unknown("projection", method, get_args(Projection))
    if len(features) < 4:
        raise UsageError(f"{method} needs 4 images or more, got {len(features)}")
    slow = Timer(PATIENCE, say, ["note: umap compiles its code at its first use in a process, which may take a minute"])
    slow.daemon = True
    if method == "umap":
        slow.start()
    try:
        return np.asarray(_reducer(method, len(features), seed).fit_transform(features), np.float32)
    finally:
        slow.cancel()


def _reducer(method: Projection, count: int, seed: int) -> Any:
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, svd_solver="full")
    if method == "tsne":
        from sklearn.manifold import TSNE

        return TSNE(2, perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed)
    try:
        with warnings.catch_warnings(action="ignore"):  # it says that TensorFlow is not installed
            from umap import UMAP
    except ImportError:
        raise UsageError('umap needs umap-learn: pip install -e ".[umap]"') from None
    return UMAP(n_components=2, n_neighbors=min(15, count - 1), random_state=seed, n_jobs=1)
