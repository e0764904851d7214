"""`t2i-experts eval judge`: does a model draw what its prompts say? A detector that knows emoji scenes looks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.drawing import check_dtype, given_sampling, open_pipeline, pipeline_settings, what_decides
from t2i_experts.cli.generate import make_folder, slug
from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.measuring import machine
from t2i_experts.cli.options import BatchSize, Device, Dtype, Guidance, Json, Model, Sampler, Steps, Threshold, check_counts, one_voice
from t2i_experts.cli.progress import no_bar, progress_bar

if TYPE_CHECKING:
    from t2i_experts.cascade.pipeline import CascadePipeline
    from t2i_experts.config import SamplingConfig
    from t2i_experts.evaluation.judge import Judge
    from t2i_experts.evaluation.judging import Judged

_SHOWN = 96  # pictures on the sheet


@one_voice()
def judge(
    model: Model = None,
    judge: Annotated[
        str, typer.Option(help="A judge's folder, as scripts/train_judge.py writes it; the default ships with this package.")
    ] = "embedded:judge",
    num: Annotated[int, typer.Option(help="Prompts, with one picture each.")] = 200,
    seed: Annotated[int, typer.Option(help="Chooses the prompts and the noise.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the pictures, a sheet of them with verdicts, and result.json.")] = None,
    as_json: Json = False,
) -> None:
    """Draw emoji scenes from prompts and count which claims of the prompts hold.

    A claim is one thing that a prompt says: an object, its colour, how often, left of, right of, above, below, the style, the background.
    The judge, a small detector, says what it sees; what it confirms and rejects on real scenes stands beside every score. Four of each ten
    prompts ask for combinations that the training scenes never show.

    On several GPUs or hosts: accelerate launch -m t2i_experts eval judge ...; the processes share the pictures.
    """
    check_counts(num=num, batch_size=batch_size)
    if seed < 0:
        raise ValueError(f"--seed={seed} must not be negative")
    check_dtype(dtype)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out={out} exists already: name a new folder")
    given = given_sampling(steps=steps, guidance=guidance, sampler=sampler, threshold=threshold)

    with without_collecting():
        from t2i_experts.evaluation.composition import load_prompts
        from t2i_experts.evaluation.judge import load_judge
        from t2i_experts.evaluation.judging import draw_and_judge, table
        from t2i_experts.evaluation.processes import open_processes
        from t2i_experts.evaluation.records import made_by

    started = time.monotonic()
    with open_processes() as processes:

        def load() -> tuple[Judge, CascadePipeline, SamplingConfig]:
            trained = load_judge(judge)
            if not trained.accuracy:
                raise ValueError(f"--judge={judge!r} does not say how accurate it is on real scenes, without which its scores mean nothing")
            own = device if processes.count == 1 else str(processes.device(device))
            pipeline = open_pipeline(model, own, dtype)
            trained.check_independent(pipeline.model.provenance)
            settings = pipeline_settings(pipeline, given)
            trained.network.to(pipeline.device)
            return trained, pipeline, settings

        trained, pipeline, settings = processes.together(load)
        if out is not None:
            processes.together(lambda: make_folder(out) if processes.main else None)  # what cannot be written is known before the work
        with (progress_bar if processes.main else no_bar)("drawing") as progress:
            judged = draw_and_judge(
                pipeline,
                trained,
                load_prompts(num, seed),
                seed=seed,
                sampling=settings,
                batch_size=batch_size,
                progress=progress,
                processes=processes,
            )
    if judged is None:
        return
    result = {
        **made_by("eval judge"),
        "scores": judged.scores(),
        "by_split": {split: judged.scores(split) for split in ("held-out", "validation")},
        "judge": {"source": judge, "fingerprint": trained.fingerprint, "accuracy": trained.accuracy},
        "prompts": {"count": num, "sha256": judged.prompts_hash},
        "num": num,
        "seed": seed,
        **what_decides(pipeline, settings),
        "settings": {"batch_size": batch_size},
        **machine(pipeline.device),
        "seconds": round(time.monotonic() - started, 3),
    }
    if out is not None:
        _write(out, judged, result)
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else table(judged, trained))


def _write(folder: Path, judged: Judged, result: dict[str, Any]) -> None:
    """The pictures, NUMBER-PROMPT.png, sheet.png and result.json with the verdict on each picture."""
    from t2i_experts.cascade.picture import save_png, to_pil
    from t2i_experts.charts import draw_captioned
    from t2i_experts.evaluation.records import write_json

    facts = {key: result[key] for key in ("seed", "sampling", "model", "dtype", "device", "t2i_experts")}
    pictures = []
    for i, (image, verdict) in enumerate(zip(judged.images, judged.verdicts(), strict=True)):
        name = f"{i:05d}-{slug(verdict['prompt'])}.png"
        save_png(to_pil(image), folder / name, {"prompt": verdict["prompt"], "index": i, **facts})
        pictures.append({"picture": name, **verdict})
    shown = [(to_pil(image), caption) for image, caption in zip(judged.images[:_SHOWN], judged.captions()[:_SHOWN], strict=True)]
    draw_captioned(shown, columns=8, side=160, lines=8).save(folder / "sheet.png")
    write_json(folder / "result.json", {**result, "pictures": pictures})
