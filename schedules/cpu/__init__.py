"""Kernel texts of processors."""
