"""Otsu's threshold for several classes, as the papers about moving things use it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_BINS, _MOST_CLASSES = 256, 4


def adaptive_threshold(values: Tensor) -> float:
    """The highest threshold of 2, 3 or 4 classes, whichever parts the values best.

    For each number of classes n, thresholds that make the variance between classes largest (Otsu,
    "A Threshold Selection Method from Gray-Level Histograms"; Liao et al., "A Fast Algorithm for
    Multilevel Thresholding") on 256 bins from the least to the largest value. The n with the
    largest variance of the classes' means, over √n, is taken (`adaptive_multiotsu_variance` of
    Easi3R, used by VGGT4D). Values that are all alike have themselves for a threshold.

    Cost: some hundred thousand steps, whatever the number of values.
    """
    array = values.detach().cpu().numpy().reshape(-1)
    if array.min() == array.max():
        return float(array[0])
    counts, edges = np.histogram(array, bins=_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    best, found = -np.inf, float(array.max())
    for classes in range(2, _MOST_CLASSES + 1):
        thresholds = centres[_cuts(counts, classes)]
        which = np.digitize(array, bins=thresholds)
        if len(np.unique(which)) < classes:
            continue  # a class without values has no mean
        means = [array[which == number].mean() for number in range(classes)]
        score = float(np.var(means)) / classes**0.5
        if score > best:
            best, found = score, float(thresholds[-1])
    return found


def _cuts(counts: NDArray[np.integer], classes: int) -> list[int]:
    """The last bins of all classes but the highest; of equally good ones the lowest."""
    filled = np.flatnonzero(counts)
    if len(filled) <= classes:
        return [int(bin) for bin in filled[:-1]]
    share = counts / counts.sum()
    mass = np.concatenate([[0.0], np.cumsum(share)])
    moment = np.concatenate([[0.0], np.cumsum(share * np.arange(_BINS))])
    # What a class from bin i to bin j adds: (Σ i·p)² / Σ p; the constant rest does not matter.
    first, last = np.indices((_BINS, _BINS))
    weight, sum_ = mass[last + 1] - mass[first], moment[last + 1] - moment[first]
    adds = np.where((last >= first) & (weight > 0), sum_**2 / np.where(weight > 0, weight, 1), 0.0)
    adds[last < first] = -np.inf
    # Best sums of the classes that begin with a bin, from the highest class down.
    rest = np.append(adds[:, -1], -np.inf)
    choices = []
    for _ in range(classes - 1):
        sums = adds + rest[1:][None]
        choices.append(sums.argmax(1))
        rest = np.append(sums.max(1), -np.inf)
    cuts, begin = [], 0
    for choice in reversed(choices):
        cuts.append(int(choice[begin]))
        begin = cuts[-1] + 1
    return cuts
