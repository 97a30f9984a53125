"""RMSNorm with its weight stored around zero.

Shapes: x [..., I], weight [I].

    out = x / √(mean x² + eps) · (1 + weight)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZeroCentredRMSNorm(nn.RMSNorm):
    """What Gemma and Qwen3-Next store: weight decay then pulls the gain to one. Computed in float32 (float64 stays), so
    that 1 + weight is not rounded to bfloat16."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, self.normalized_shape, 1.0 + self.weight.to(wide.dtype), self.eps).to(x.dtype)
