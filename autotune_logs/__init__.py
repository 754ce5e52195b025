"""Tuning records, one file a target, measured on real hardware only."""
