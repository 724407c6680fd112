"""The command `python -m benchmarks.crash`."""

from benchmarks.crash.campaign import main

if __name__ == "__main__":
    main()
