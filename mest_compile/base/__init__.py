"""What everything stands on: errors, registries, files."""
