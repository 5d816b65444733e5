"""What a response earns."""

from appo_lightning.rewards.answers import answer_f1, normalise_answer
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.rewards.mathematics import MathReward
from appo_lightning.rewards.tagged import AnswerReward, TaggedReward

__all__ = ["AnswerReward", "MathReward", "Reward", "Score", "TaggedReward", "answer_f1", "normalise_answer"]
