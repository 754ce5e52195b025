"""One file a sparsity scheme; found by folder."""
