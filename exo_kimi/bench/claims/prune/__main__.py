"""`python -m exo_kimi.bench.claims.prune`."""

import sys

from exo_kimi.bench.claims.prune.measure import main

if __name__ == "__main__":
    sys.exit(main())
