"""Where candidates are timed: one file a runner, found by folder."""
