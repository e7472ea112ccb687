"""Every test is offline and on the CPU unless it carries a marker."""

import os
import sys
from pathlib import Path

# before anything of Hugging Face or axolotl is imported
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    AXOLOTL_DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_DISABLED="true",
)
sys.path.insert(0, str(Path(__file__).parent))

import pytest

ROOT = Path(__file__).parents[1]
SMOLLM2 = Path(os.environ.get("BAPO_TEST_MODEL_DIR", ROOT / ".models/SmolLM2-135M-Instruct"))


@pytest.fixture(scope="session")
def chatml():
    from tiny import make_tokenizer

    return make_tokenizer("chatml")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct; `make test` puts it there."""
    if not (SMOLLM2 / "READY").exists():
        pytest.skip(f"no model in {SMOLLM2}: run `make model`")
    return SMOLLM2


@pytest.fixture(autouse=True)
def _scratch(tmp_path, monkeypatch):
    """Caches of `datasets` go to the test's folder, and relative outputs land there too."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield
    # a command of ours that ran in this process has set it; the next test's axolotl would be silent
    os.environ.pop("AXOLOTL_LOG_LEVEL", None)
    if accelerate := sys.modules.get("accelerate.state"):
        # shared by all trainers of a process; a loader that an earlier test left would count as active
        accelerate.GradientState._reset_state()
