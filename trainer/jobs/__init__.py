"""The jobs behind the command line, a module each: train, evaluate, plan."""
