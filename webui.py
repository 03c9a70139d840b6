#!/usr/bin/env python3
"""A page in the browser for dreambooth_implementation.py: train, draw, compare, and a library of what was trained.

    python webui.py

The page gives the program's commands and shows what they print and draw; the modules are in the folder webui. It answers this
machine alone (127.0.0.1). Whoever can open it can start trainings: do not pass the port on.
"""

import sys

from webui.main import main

if __name__ == "__main__":
    sys.exit(main())
