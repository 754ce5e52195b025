"""Convolutions and linear layers: families of kernels and their indices."""
