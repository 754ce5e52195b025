"""C sources of the programs that run a kernel on an emulated ARM machine; `mest_compile.emulation` builds them when they are needed."""
