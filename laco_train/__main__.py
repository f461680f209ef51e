"""`python -m laco_train`."""

import sys

from laco_train.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    if "laco_train.cli.ranks" in sys.modules:  # else there is one process, and torch may not be loaded
        from laco_train.cli.ranks import leave

        leave(code)
    sys.exit(code)
