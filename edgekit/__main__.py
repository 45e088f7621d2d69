"""`python -m edgekit`."""

import sys
from pathlib import Path

# Python looks for modules in the current folder first, whose files are anybody's: --code alone names code to import.
if not sys.flags.safe_path and sys.path and Path(sys.path[0] or ".").resolve() == Path.cwd():
    del sys.path[0]

from edgekit.cli.app import main

main()
