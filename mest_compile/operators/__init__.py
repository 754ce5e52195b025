"""Training operators, one file each: kernel problems, their float64 references, and how the operator enters the
training graph."""
