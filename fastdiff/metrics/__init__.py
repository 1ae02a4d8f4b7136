"""Measuring: a classifier's features, the Frechet distance in them, label agreement, and what evaluations cost."""

from fastdiff.metrics.classifier import Classifier, load_classifier, packaged_classifier
from fastdiff.metrics.evaluation import Reference, Row, evaluate, table
from fastdiff.metrics.frechet import Gaussian, Moments, frechet, gaussian

__all__ = [
    "Classifier",
    "Gaussian",
    "Moments",
    "Reference",
    "Row",
    "evaluate",
    "frechet",
    "gaussian",
    "load_classifier",
    "packaged_classifier",
    "table",
]
