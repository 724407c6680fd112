"""Decides where every row of every table lives, from what is stated alone: needs no torch, GPU or cluster."""
