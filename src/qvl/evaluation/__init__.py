"""Answers against labels: reads labelled pictures, asks, compares, measures, and fits calibrations."""
