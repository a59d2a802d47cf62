"""Calibration: text to measure importance on, the windows drawn from it, and the check that no test item is in it."""

from rap_env.calibration.clusters import Clustering, clustered_windows
from rap_env.calibration.contamination import Overlap, count_unchecked, find_overlaps, normalised, refuse_contamination
from rap_env.calibration.corpus import Corpus, hub_corpus, local_corpus, local_text, packaged_corpus
from rap_env.calibration.sampling import consecutive_windows, random_windows, window_kinds

__all__ = [
    "Clustering",
    "Corpus",
    "Overlap",
    "clustered_windows",
    "consecutive_windows",
    "count_unchecked",
    "find_overlaps",
    "hub_corpus",
    "local_corpus",
    "local_text",
    "normalised",
    "packaged_corpus",
    "random_windows",
    "refuse_contamination",
    "window_kinds",
]
