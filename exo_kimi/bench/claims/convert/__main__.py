"""`python -m exo_kimi.bench.claims.convert`."""

import sys

from exo_kimi.bench.claims.convert.measure import main

if __name__ == "__main__":
    sys.exit(main())
