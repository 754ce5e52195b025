"""C sources of the programs that run a kernel on an emulated ARM machine; `devices.emulation` builds them when they are
needed."""
