"""OpenCL devices: TVM makes OpenCL C, their driver compiles it."""
