"""What a run needs, before it starts.

`plan`: blocks, sizes and memory, from a model's configs alone. `stages`: how many images each stage trains, measures
and generates.
"""

from .plan import Plan, load_architecture, plan
from .stages import Stage, audit_stage, figures_stage, stages_table

__all__ = ["Plan", "Stage", "audit_stage", "figures_stage", "load_architecture", "plan", "stages_table"]
