"""`t2i-experts eval`: what pictures are worth, as numbers with their whole protocol; one module a sub-command."""

from __future__ import annotations

from t2i_experts.cli.eval_clip import clip
from t2i_experts.cli.eval_coco import coco
from t2i_experts.cli.eval_compare import compare
from t2i_experts.cli.eval_fid import fid
from t2i_experts.cli.eval_judge import judge
from t2i_experts.cli.eval_nearest import nearest
from t2i_experts.cli.eval_score import score
from t2i_experts.cli.eval_sweep import sweep
from t2i_experts.cli.options import group

app = group("eval", "Measure what pictures are worth, with all that it takes to repeat a number.")

app.command()(fid)
app.command()(clip)
app.command()(score)
app.command()(coco)
app.command()(sweep)
app.command()(judge)
app.command()(nearest)
app.command()(compare)
