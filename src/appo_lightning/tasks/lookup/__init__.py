"""The embedded world: private facts, questions of a few hops, demonstrations and a policy small enough for a CPU."""

from appo_lightning.tasks.lookup.create import create_tiny_policy
from appo_lightning.tasks.lookup.demonstrations import LookupDemonstration, LookupDemonstrations
from appo_lightning.tasks.lookup.source import LookupTasks

__all__ = ["LookupDemonstration", "LookupDemonstrations", "LookupTasks", "create_tiny_policy"]
