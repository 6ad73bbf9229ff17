"""Mathematics that the methods of this package share."""
