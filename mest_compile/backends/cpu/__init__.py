"""Processors: TVM's LLVM makes the code."""
