"""The machine at hand: its memory, and the rates that the planner needs."""
