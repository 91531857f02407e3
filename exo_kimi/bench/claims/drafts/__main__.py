"""`python -m exo_kimi.bench.claims.drafts`."""

import sys

from exo_kimi.bench.claims.drafts.measure import main

if __name__ == "__main__":
    sys.exit(main())
