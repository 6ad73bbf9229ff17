"""Mathematics and containers that methods share."""
