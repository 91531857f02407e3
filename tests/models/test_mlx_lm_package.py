"""mlx-lm without its `__init__`."""

import subprocess
import sys

CODE = """
import sys
from exo_kimi.models.mlx_lm_package import skip_mlx_lm_init
skip_mlx_lm_init()
import exo_kimi.runtime.stage.process
import mlx_lm.models.switch_layers
print([name for name in ("transformers", "huggingface_hub", "torch", "mlx_lm.utils") if name in sys.modules])
"""


def test_a_stage_imports_nothing_of_mlx_lm_but_its_models() -> None:
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n", "each of them costs a stage's start a second"


def test_an_mlx_lm_that_is_imported_stays() -> None:
    code = "import mlx_lm; from exo_kimi.models.mlx_lm_package import skip_mlx_lm_init as s; s(); print(mlx_lm.load)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("<function load")
