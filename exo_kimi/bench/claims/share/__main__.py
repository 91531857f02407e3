"""`python -m exo_kimi.bench.claims.share`."""

import sys

from exo_kimi.bench.claims.share.run import main

if __name__ == "__main__":
    sys.exit(main())
