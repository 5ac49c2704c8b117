"""Run the command line with `python -m safesteer`, where its script is not on the path."""

from safesteer.cli import main

if __name__ == "__main__":
    main()
