"""A reward model: LLaVA with one linear layer on the state of the answer's last token.

Ouyang et al. 2022, arXiv 2203.02155; for LLaVA: Sun et al. 2023, arXiv 2309.14525. Training:
losses/reward_model.py.

    r(v, x, y) = w . h_EOS + b        h_EOS: final decoder state at the end of prompt, image and answer

The head starts from N(0, 1 / (D + 1)) with bias 0. On disk a reward model is a folder with `model/` (llava-hf
layout) and `reward_head.safetensors`.

Shapes: N sequences, D decoder width.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from common import BadInput
from model.checkpoint import fill, load_llava
from model.logprobs import Packed, Scorer
from model.tensors import list_file, save_tensors
from model.vlm import VLM

HEAD = "reward_head.safetensors"


class RewardModel(nn.Module):
    """Packed sequences -> one reward each.

    The last token of a packed response is a label, never an input, and the reward is to be read where the
    answer's own last token is: `data.batch.collate(..., end=True)` repeats that token.
    """

    def __init__(self, model: VLM, autocast: torch.dtype | None = None):
        super().__init__()
        self.scorer = Scorer(model, autocast)
        language = model.language_model
        if language.lm_head.weight is not language.model.embed_tokens.weight:
            language.lm_head.requires_grad_(False)  # never used: it would get no gradient
        width = model.config.text.hidden_size
        self.head = nn.Linear(width, 1).to(model.device)
        nn.init.normal_(self.head.weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, packed: Packed, features: Tensor) -> Tensor:
        """packed: from `pack`; features of `VLM.seen` -> rewards (N,), fp32."""
        with self.scorer._precision():
            states = self.scorer.states(packed, features)  # (tail tokens, D)
        ends = torch.tensor(packed.lengths).cumsum(0) - 1
        last = packed.sources[ends.to(packed.sources.device)]  # the state that predicts the token too many
        return self.head(states[last].float())[:, 0]


def save_reward_head(reward: RewardModel, folder: Path) -> None:
    """Write the head next to `model/`."""
    save_tensors({"weight": reward.head.weight, "bias": reward.head.bias}, folder / HEAD)


def load_reward_model(folder: Path, dtype: torch.dtype = torch.float32, device="cpu",
                      autocast: torch.dtype | None = None) -> RewardModel:
    """Read a folder that `train.py --loss reward_model` wrote; frozen. BadInput naming the file and the tensor
    that is missing or does not fit."""
    folder = Path(folder)
    if not (folder / HEAD).is_file():
        raise BadInput(f"{folder / HEAD}: not found; train a reward model first:"
                       " python train.py --loss reward_model")
    reward = RewardModel(load_llava(folder / "model", dtype, device), autocast)
    fill(reward.head, {stored.name: stored for stored in list_file(folder / HEAD)}, folder, torch.float32, device)
    return reward.requires_grad_(False).eval()
