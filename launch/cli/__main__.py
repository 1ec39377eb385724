"""`python -m resilient.launch.cli`: the command line where the script `resilient` is not on the path."""

import sys

from resilient.launch.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
