"""`python -m salmonn`: the command line."""

from salmonn.cli import main

if __name__ == "__main__":
    main()
