"""``python -m bayeslora``: the command line, where its script is not on the path."""

from bayeslora.app.cli import main

if __name__ == "__main__":
    main()
