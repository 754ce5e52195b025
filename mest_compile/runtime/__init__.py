"""Execution of a compiled step."""
