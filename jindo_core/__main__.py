"""`python -m jindo_core <command>`: the command line, for torchrun, which starts modules."""

from __future__ import annotations

import sys

from jindo_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
