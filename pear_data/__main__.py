"""`python -m pear_data`: the command line."""

from pear_data.cli import main

if __name__ == "__main__":
    main()
