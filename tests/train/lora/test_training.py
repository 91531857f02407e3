"""An adapter's training: twenty conversations by heart, resumed as if it had never stopped, and mlx-lm says the same with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import deepseek_v3
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from exo_kimi.checkpoint.adapters.manifest import resolve_adapter
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.compress.texts.encoding import Encoder
from exo_kimi.errors import UsageError
from exo_kimi.models.adapters import attach
from exo_kimi.runtime.loading.adapters import arrays_of
from exo_kimi.runtime.loading.loader import load
from exo_kimi.train.lora.command import LoraData, TrainedLora, read_rows, train_lora
from tests.train.lora.conftest import RECIPE


def test_twenty_conversations_are_known_by_heart_here_and_in_mlx_lm(
    base: Path, rows: Path, trained: TrainedLora
) -> None:
    assert trained.last_loss < 0.1 < 1 < trained.first_loss
    encoder = Encoder.from_directory(base)
    ours = load(base, dtype="float32")
    attach(ours, arrays_of(resolve_adapter(trained.directory, Checkpoint(base)).read()))
    theirs, _ = load_model(base, get_model_classes=lambda config: (deepseek_v3.Model, deepseek_v3.ModelArgs))
    theirs = load_adapters(theirs, str(trained.directory))
    theirs.eval()
    for text in read_rows(rows, encoder):
        ids, places = text.ids[:-1], np.flatnonzero(text.counted[1:])
        for model in (ours, theirs):
            chosen = np.array(mx.argmax(model(mx.array(ids)[None])[0], axis=-1))[places]
            assert chosen.tolist() == text.ids[1:][places].tolist()


def test_dora_is_mlx_lm_s(base: Path, rows: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, fine_tune_type="dora", iters=8)
    found = train_lora(base, tmp_path / "dora", LoraData(train=rows), recipe, backend="numpy")
    assert found.last_loss < found.first_loss - 1
    ours = load(base, dtype="float32")
    attach(ours, arrays_of(resolve_adapter(found.directory, Checkpoint(base)).read()))
    theirs, _ = load_model(base, get_model_classes=lambda config: (deepseek_v3.Model, deepseek_v3.ModelArgs))
    theirs = load_adapters(theirs, str(found.directory))
    theirs.eval()
    tokens = mx.arange(30)[None]
    expected = np.array(theirs(tokens))
    assert np.abs(np.array(ours(tokens)) - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("backend", ["mlx", "numpy"])
def test_a_resumed_training_is_the_training(base: Path, rows: Path, tmp_path: Path, backend: str) -> None:
    recipe = replace(RECIPE, iters=5, batch_size=7, dropout=0.1 if backend == "mlx" else 0.0)
    whole = train_lora(base, tmp_path / "whole", LoraData(train=rows), recipe, backend=backend)
    train_lora(base, tmp_path / "parts", LoraData(train=rows), replace(recipe, iters=2), backend=backend)
    parts = train_lora(base, tmp_path / "parts", LoraData(train=rows), recipe, backend=backend)
    assert parts.checksum == whole.checksum and parts.last_loss == whole.last_loss
    with pytest.raises(UsageError, match="went further"):
        train_lora(base, tmp_path / "parts", LoraData(train=rows), replace(recipe, iters=2), backend=backend)
    with pytest.raises(UsageError, match="another recipe, base or data"):
        train_lora(base, tmp_path / "parts", LoraData(train=rows), replace(recipe, seed=1), backend=backend)


def test_rows_of_mlx_lm_s_folder_are_read_and_the_valid_ones_measured(base: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows.read_text())
    (tmp_path / "valid.jsonl").write_text('{"prompt": "Name thing 3", "completion": "amber coral"}\n')
    found = train_lora(base, tmp_path / "out", LoraData.at(tmp_path), replace(RECIPE, iters=1), backend="numpy")
    assert found.valid is not None and "±" in found.valid[0]


def test_a_row_without_an_assistant_is_refused_with_its_line(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    with pytest.raises(UsageError, match="not a text"):
        read_rows(file, Encoder.from_directory(base))
    file.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n'
    )
    with pytest.raises(UsageError, match="no row has a token to learn"):
        read_rows(file, Encoder.from_directory(base))
