"""Calibrations: from a model's own confidence to how often such answers are right, and what not to tell."""

from qvl.calibration.calibration_file import Calibration

__all__ = ["Calibration"]
