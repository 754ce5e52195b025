"""Kernel texts of OpenCL devices."""
