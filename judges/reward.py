"""A reward model as judge: its rewards are the scores."""

from pathlib import Path

import torch

from data.batch import collate
from data.processor import Processor
from judges.scores import Judge, Score
from model.reward import RewardModel


def reward_judge(reward: RewardModel, processor: Processor, root: Path | None = None) -> Judge:
    """Every answer is scored with the end token after it, as the reward model was trained, even one that was
    cut off: PPO's `missing_eos_penalty` decides what that costs."""

    @torch.no_grad()
    def judge(records: list[dict], answers: list[list[str]]) -> list[list[Score]]:
        rows = [{**record, "answer": processor.refused.sub("", text)}  # special tokens that the policy spelt out
                for record, texts in zip(records, answers, strict=True) for text in texts]
        batch = collate(rows, {"answer": dict(image="image", response="answer")}, processor, root, end=True)
        device = reward.head.weight.device
        features = reward.scorer.model.vision_features(batch.pixels.to(device))
        rewards = iter(reward(batch.packed.to(device), features).tolist())
        return [[Score(next(rewards)) for _ in texts] for texts in answers]

    return judge
