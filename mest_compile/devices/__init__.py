"""Steps on another machine, and machines that are emulated."""
