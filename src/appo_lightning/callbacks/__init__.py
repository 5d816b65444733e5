"""Lightning callbacks, one idea each."""

from appo_lightning.callbacks.advantage_scaling import ProcedureAdvantageScaling
from appo_lightning.callbacks.files import EvaluationReport, ExportPolicy, RolloutWriter
from appo_lightning.callbacks.heap import FrozenHeap
from appo_lightning.callbacks.progress import RolloutProgressBar
from appo_lightning.callbacks.resume import AtomicCheckpointIO, GracefulStop, RandomState
from appo_lightning.callbacks.statistics import BranchStatistics, CreditStatistics, RolloutStatistics
from appo_lightning.callbacks.tool_efficiency import ToolCallEfficiency
from appo_lightning.callbacks.tripwires import Tripwires
from appo_lightning.callbacks.weight_sync import SamplerWeightSync

__all__ = [
    "AtomicCheckpointIO",
    "BranchStatistics",
    "CreditStatistics",
    "EvaluationReport",
    "ExportPolicy",
    "FrozenHeap",
    "GracefulStop",
    "ProcedureAdvantageScaling",
    "RandomState",
    "RolloutProgressBar",
    "RolloutStatistics",
    "RolloutWriter",
    "SamplerWeightSync",
    "ToolCallEfficiency",
    "Tripwires",
]
