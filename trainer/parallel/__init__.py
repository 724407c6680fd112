"""What knows of several ranks, besides `trainer.parallelize`, which spreads a single-process model over them."""
