"""Start the web UI, as `salmonn demo` does: python demo/app.py [--model A] [--port 7860] ..."""

import sys

from salmonn.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
