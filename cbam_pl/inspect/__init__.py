"""Looking into a network: its gates, scores of its maps, and drawings."""
