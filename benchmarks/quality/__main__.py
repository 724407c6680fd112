"""The command `python -m benchmarks.quality`."""

from benchmarks.quality.tables import main

if __name__ == "__main__":
    main()
