"""One file per paper; none yet."""
