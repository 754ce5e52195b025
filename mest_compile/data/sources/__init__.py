"""One file a kind of data set; each registers its names with @source."""
