"""`t2i-experts eval`: what a model's pictures are worth, one sub-command for each measure."""

from __future__ import annotations

from t2i_experts.cli.eval_judge import judge
from t2i_experts.cli.options import group

app = group("eval", "Measure what a model's pictures are worth.")

app.command("judge")(judge)
