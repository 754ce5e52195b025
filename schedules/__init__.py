"""How kernels run fast: one file an operator family and kind of device, found by folder."""
