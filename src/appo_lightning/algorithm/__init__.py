"""The method as pure functions of tensors; torch only."""

from appo_lightning.algorithm.advantages import (
    branch_advantage,
    dual_group_advantage,
    future_influence,
    group_advantage,
    scale_by_influence,
)
from appo_lightning.algorithm.branching import (
    BranchingScore,
    Scope,
    branch_candidates,
    branching_score,
    future_value,
    select_branch_points,
    share_branches,
)
from appo_lightning.algorithm.criteria import (
    Criterion,
    CriterionScore,
    score_criterion,
    suppress_noise,
    tool_boundary_mask,
)
from appo_lightning.algorithm.losses import (
    KLPenalty,
    PolicyLoss,
    clipped_policy_loss,
    kl_penalty,
    masked_importance_weight,
    truncated_importance_weight,
)
from appo_lightning.algorithm.masked import (
    discounted_suffix_sum,
    gamma_from_half_life,
    masked_mean,
    masked_std,
    masked_zscore,
)

__all__ = [
    "BranchingScore",
    "Criterion",
    "CriterionScore",
    "KLPenalty",
    "PolicyLoss",
    "Scope",
    "branch_advantage",
    "branch_candidates",
    "branching_score",
    "clipped_policy_loss",
    "discounted_suffix_sum",
    "dual_group_advantage",
    "future_influence",
    "future_value",
    "gamma_from_half_life",
    "group_advantage",
    "kl_penalty",
    "masked_importance_weight",
    "masked_mean",
    "masked_std",
    "masked_zscore",
    "scale_by_influence",
    "score_criterion",
    "select_branch_points",
    "share_branches",
    "suppress_noise",
    "tool_boundary_mask",
    "truncated_importance_weight",
]
