"""Everything that does not know which model it trains."""
