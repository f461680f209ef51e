"""`python -m laco_train`."""

import sys

from laco_train.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
