"""Mathematics and mechanics that several methods share."""
