"""What explains a run: its plan before it starts, its report when it ends."""

from .findings import write_report
from .plan import peak_tokens_per_second, plan_run

__all__ = ["peak_tokens_per_second", "plan_run", "write_report"]
