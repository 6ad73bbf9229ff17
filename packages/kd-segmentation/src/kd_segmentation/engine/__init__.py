"""What several methods share, in torch alone."""
