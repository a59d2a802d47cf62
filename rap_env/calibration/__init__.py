"""Calibration: text to measure importance on, the windows drawn from it, and the check that no test item is in it."""

from rap_env.calibration.clusters import Clustering, clustered_windows, k_means
from rap_env.calibration.contamination import Overlap, find_overlaps, refuse_contamination
from rap_env.calibration.corpus import Corpus, hub_corpus, local_corpus, local_text, self_generated_corpus
from rap_env.calibration.sampling import consecutive_windows, random_windows

__all__ = [
    "Clustering",
    "Corpus",
    "Overlap",
    "clustered_windows",
    "consecutive_windows",
    "find_overlaps",
    "hub_corpus",
    "k_means",
    "local_corpus",
    "local_text",
    "random_windows",
    "refuse_contamination",
    "self_generated_corpus",
]
