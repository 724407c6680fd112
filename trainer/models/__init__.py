"""The HSTU models: layer, tower, ranker and retriever, all single-process code."""
