"""greenprune: distributed training that removes what a network does not need, while it trains, and meters it."""
