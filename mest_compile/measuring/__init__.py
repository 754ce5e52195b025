"""How fast: benchmarks, rivals, tables, profiles."""
