"""Metrics, baselines, plots and the report."""
