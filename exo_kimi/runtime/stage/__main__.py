"""`python -m exo_kimi.runtime.stage`: a stage as a leader's child, which imports no more than it needs."""

import sys

from exo_kimi.models.mlx_lm_package import skip_mlx_lm_init

if __name__ == "__main__":
    skip_mlx_lm_init()
    from exo_kimi.runtime.stage.process import main

    sys.exit(main())
