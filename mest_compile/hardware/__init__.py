"""Targets, this machine, and what a kind of device has to answer."""
