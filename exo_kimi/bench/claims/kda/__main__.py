"""`python -m exo_kimi.bench.claims.kda`."""

import sys

from exo_kimi.bench.claims.kda.measure import main

if __name__ == "__main__":
    sys.exit(main())
