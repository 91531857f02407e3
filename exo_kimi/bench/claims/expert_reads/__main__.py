"""`python -m exo_kimi.bench.claims.expert_reads`."""

import sys

from exo_kimi.bench.claims.expert_reads.measure import main

if __name__ == "__main__":
    sys.exit(main())
