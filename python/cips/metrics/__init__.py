"""Measuring generators against real images: Fréchet and kernel distances, precision, recall, inception score.

Features and formulas are torch-fidelity's; here images are made, features shared among processes and kept, and results
named after what they were measured with.
"""

from __future__ import annotations

from .evaluation import Draw, Evaluation, Evaluator
from .extractors import Extractor, open_extractor
from .options import METRICS, parse_metrics

__all__ = ["Draw", "Evaluation", "Evaluator", "Extractor", "METRICS", "open_extractor", "parse_metrics"]
