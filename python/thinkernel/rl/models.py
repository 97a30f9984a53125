"""The miniatures that the demo trains, the base models that ship with the library, and a run's trained model."""

from __future__ import annotations

from pathlib import Path

import torch

from thinkernel.models import ModelConfig, Transformer, load, preset
from thinkernel.rl import checkpoint, tokenizer

MODELS: dict[str, ModelConfig] = {
    # The first layer attends densely, so that a run goes through the dense and the sparse latent attention.
    # A problem with its worked solution takes 49 tokens on average (32 to 70), more than twice top_k.
    "deepseek_v32": preset("deepseek_v32_mini", vocab_size=tokenizer.VOCAB_SIZE, layers=3, dense_attention=1, top_k=16),
    "qwen3": preset("qwen3_mini", vocab_size=tokenizer.VOCAB_SIZE, layers=3),
}
BASE_FOLDER = Path(__file__).parent / "base"


def base_path(name: str) -> Path:
    return BASE_FOLDER / f"{name}.safetensors"


def load_base(path: Path) -> Transformer:
    """The model at `path`, in float32 (the files are float16, half the size)."""
    return load(path, dtype=torch.float32)


def load_run_or_base(run: Path | None, base: str | None) -> Transformer:
    """The trained model of a run's folder (of its last checkpoint while it is unfinished), or a shipped base model."""
    if run is None:
        return load_base(base_path(str(base)))
    if (run / "model.safetensors").exists():
        return load(run / "model.safetensors")
    if (run / "checkpoint.pt").exists():
        state = checkpoint.load(run / "checkpoint.pt")
        model = Transformer(ModelConfig.from_dict(state["model_config"]))
        model.load_state_dict(state["model"])
        return model
    raise ValueError(f"--run: {run} holds neither model.safetensors nor checkpoint.pt; takes a `thinkernel demo` folder")
