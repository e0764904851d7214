"""`t2i-experts generate PROMPT`."""

from __future__ import annotations

import itertools
import json
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.drawing import check_dtype, given_sampling, open_pipeline, pipeline_settings, what_decides
from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import BatchSize, Compile, Device, Dtype, Guidance, Json, Model, Sampler, Steps, Threshold, check_counts

if TYPE_CHECKING:
    from t2i_experts.cascade.pipeline import CascadePipeline
    from t2i_experts.config import SamplingConfig

_SHOWN = 40  # characters that a warning lists


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw. Empty: the model's own choice.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line, instead of PROMPT.")] = None,
    out: Annotated[Path, typer.Option(help="A .png file for one picture, or a folder.")] = Path("pictures"),
    num: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed, prompt and settings give the same picture.")] = 0,
    negative: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    style: Annotated[Path | None, typer.Option(help="A reference picture whose style is taken over.")] = None,
    model: Model = None,
    size: Annotated[int | None, typer.Option(help="Side of the picture in pixels: the model's own, or an error.")] = None,
    width: Annotated[
        int | None, typer.Option(help="In pixels, with --height: for models that were trained with aspect-ratio buckets.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, with --width: one of the model's buckets, or an error.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            metavar="LEAF:guidance=G,steps=N",
            help="Of one expert of an ensemble, such as E^9_511:guidance=7,steps=6; repeatable.",
            show_default=False,
        ),
    ] = None,
    sampler: Sampler = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    as_json: Json = False,
) -> None:
    """Make pictures from a prompt."""
    texts = read_prompts(prompt, prompts, negative)
    check_counts(num=num, batch_size=batch_size, size=size, width=width, height=height)
    if seed < 0:
        raise ValueError(f"--seed={seed} must not be negative")
    if (width is None) != (height is None) or None not in (size, width):
        raise ValueError(f"give --width and --height together, and not with --size; received {size=}, {width=}, {height=}")
    check_dtype(dtype)
    if style is not None:
        _refuse_no_file("--style", style, "a picture")
    jobs = [(text, copy) for text in texts for copy in range(num)]
    paths = picture_paths([text for text, _ in jobs], out, seed)
    given = given_sampling(steps=steps, guidance=guidance, sampler=sampler, threshold=threshold, experts=expert or ())

    with without_collecting():  # torch, which takes seconds: what can be wrong without it has been checked
        from t2i_experts.cascade.picture import read_image, save_png, to_pil

    started = time.monotonic()
    try:
        reference = None if style is None else read_image(style)
    except ValueError as error:
        raise ValueError(f"--style={style}: {error}") from error
    shape = picture_shape(model, size, width, height)
    pipeline = open_pipeline(model, device, dtype, compile=compile)
    settings = pipeline_settings(pipeline, given)
    refuse_what_would_be_ignored(pipeline, settings, negative, style)
    read = [*dict.fromkeys([*texts, negative])]
    warn_of_lone_expert(pipeline)
    warn_of_truncation(pipeline, read)
    warn_of_unknown_characters(pipeline, [text for text in read if text.strip()])
    make_folder(paths[0].parent)
    pictures: list[dict[str, Any]] = []
    with _progress_bar(-(-len(jobs) // batch_size) * pipeline.base.steps(settings), disable=as_json) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = range(start, min(start + batch_size, len(jobs)))
            images = pipeline(
                [jobs[i][0] for i in batch],
                negative=negative,
                style=reference,
                seed=seed,
                indices=batch,
                shape=shape,
                sampling=settings,
                progress=lambda done, steps, denoised: bar.update(),
            )
            for i, image in zip(batch, images, strict=True):
                facts = {"prompt": jobs[i][0], "negative": negative, "seed": seed, "index": i, "style": style and str(style)}
                save_png(to_pil(image), paths[i], {**facts, **what_decides(pipeline, settings)})
                pictures.append({"path": str(paths[i]), **facts})
    if as_json:
        seconds = round(time.monotonic() - started, 3)
        print(json.dumps({"pictures": pictures, "seconds": seconds, **what_decides(pipeline, settings)}, ensure_ascii=False))
    else:
        for picture in pictures:
            print(picture["path"])


def read_prompts(prompt: str | None, file: Path | None, negative: str = "") -> list[str]:
    """The prompts of the command line: PROMPT, or the lines of a UTF-8 file (blank lines are skipped).

    Raises ValueError for both or neither, for a file that cannot be read, and for a PROMPT or negative prompt that is no text.
    """
    if (prompt is None) == (file is None):
        received = "neither" if file is None else f"both, PROMPT={prompt!r} and --prompts={file}"
        raise ValueError(f"give either PROMPT or --prompts FILE; received {received}")
    for name, text in (("PROMPT", prompt or ""), ("--negative", negative)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}={text!r} is not valid UTF-8 text") from None
    if file is None:
        assert prompt is not None
        return [prompt]
    _refuse_no_file("--prompts", file, "a text file with a prompt on each line")
    from t2i_experts.shards.format import not_utf8

    try:
        lines = [line.strip() for line in file.read_bytes().decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts={file}: {not_utf8(error)}") from error
    except OSError as error:
        raise ValueError(f"--prompts={file}: cannot be read: {error.strerror}") from error
    if not any(lines):
        raise ValueError(f"--prompts={file} holds no prompt")
    return [line for line in lines if line]


def picture_paths(texts: list[str], out: Path, seed: int) -> list[Path]:
    """Where each picture goes: `out` itself if it is a .png, else OUT/NUMBER-WORDS-SEED.png, under a new name
    if that file exists. Raises ValueError if they cannot go there."""
    nearest = next((parent for parent in out.parents if parent.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise ValueError(f"--out={out}: {nearest} is a file, not a folder")
    if out.suffix.lower() == ".png":
        if len(texts) > 1:
            raise ValueError(f"--out={out} is one file for {len(texts)} pictures; give a folder")
        if out.is_dir():
            raise ValueError(f"--out={out} is a folder; its name must not end in .png")
        return [out]
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif"):
        raise ValueError(f"--out={out}: pictures are PNG files; give a name that ends in .png, or a folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; give a .png file or a folder")
    digits = len(str(len(texts) - 1))
    number = [f"{i:0{digits}d}-" if len(texts) > 1 else "" for i in range(len(texts))]
    return [_unused(out / f"{number[i]}{slug(text)}-{seed}.png") for i, text in enumerate(texts)]


def _unused(path: Path) -> Path:
    """The path, or with -2, -3... before its ending if there are such files: a picture in a folder is never overwritten."""
    names = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def make_folder(folder: Path) -> None:
    """Makes the folder that the pictures go to. Raises ValueError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: the folder {folder} cannot be made: {error.strerror}") from error


def slug(text: str, length: int = 48) -> str:
    """A prompt as part of a file name: its letters with their marks and its digits, of any script, in NFC, joined by hyphens."""
    lower = unicodedata.normalize("NFC", text.lower())
    kept = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in lower)
    words = (word for word in kept.split() if any(unicodedata.category(character)[0] != "M" for character in word))
    return "-".join(words)[:length].strip("-") or "picture"


def _refuse_no_file(option: str, path: Path, wanted: str) -> None:
    """Raises ValueError for a path that is not there, or a folder."""
    if not path.exists() or path.is_dir():
        raise ValueError(f"{option}={path}: {'it is a folder, not a file' if path.is_dir() else 'no such file'}; give {wanted}")


def picture_shape(model: str | None, size: int | None, width: int | None, height: int | None) -> tuple[int, int] | None:
    """(width, height) of the pictures; None, as the model has it, if none is given. Raises ValueError if the model has no such pictures,
    before its weights are read."""
    from t2i_experts.cascade.model_folder import find_model, read_configs
    from t2i_experts.cascade.stage import check_shape

    if size is not None:
        shape, received = (size, size), f"--size={size}"
    elif width is not None and height is not None:
        shape, received = (width, height), f"--width={width} --height={height}"
    else:
        return None
    check_shape(read_configs(find_model(model))[0], shape, received)
    return shape


def refuse_what_would_be_ignored(pipeline: CascadePipeline, settings: SamplingConfig, negative: str, style: Path | None) -> None:
    """Raises ValueError for an option that would not change the picture, or cannot."""
    from t2i_experts.diffusion.guidance import ScaleBySigma
    from t2i_experts.experts.sampling import guidance_scale

    scale = guidance_scale(settings, pipeline.base.leaves)  # of several experts: the common one may be nobody's
    scales = set(scale.scales) if isinstance(scale, ScaleBySigma) else {scale}
    if negative.strip() and scales == {1}:
        raise ValueError(f"--negative={negative!r} has no effect with guidance 1; give --guidance another value, such as 4")
    if style is not None and all(encoder.reads != "image" for encoder in pipeline.model.conditioner.encoders.values()):
        raise ValueError(
            f"--style={style}: this model has no encoder of pictures; its encoders: {', '.join(pipeline.model.conditioner.names)}"
        )


def warn_of_lone_expert(pipeline: CascadePipeline) -> None:
    """Says on stderr that a model is one expert of an ensemble, which has not been trained on most of what a picture needs."""
    from t2i_experts.config.expert_rules import whole

    quantiles = pipeline.base.config.noise.quantiles
    if not pipeline.base.leaves and not whole(quantiles):
        print(
            f"warning: this model is an expert for a part of the noise, the quantiles {' to '.join(quantiles)}, and draws no picture "
            "alone; `t2i-experts experts assemble` makes a model of it and the others",
            file=sys.stderr,
        )


def warn_of_truncation(pipeline: CascadePipeline, texts: list[str]) -> None:
    """Says on stderr which prompts are longer than an encoder reads, and from which words on."""
    for name, tokens in pipeline.model.conditioner.tokenizer(texts).items():
        for text, cut in zip(texts, tokens.truncated, strict=True):
            if cut is not None:
                print(f"warning: {name} reads the prompt only up to character {cut}: ...{text[max(0, cut - 40) : cut]!r}", file=sys.stderr)


def warn_of_unknown_characters(pipeline: CascadePipeline, texts: list[str]) -> None:
    """Says on stderr, once for each encoder, which letters, digits and symbols its vocabulary lacks, if its tokeniser can tell."""
    for name, tokenizer in pipeline.model.conditioner.tokenizer.tokenizers.items():
        unknown: Callable[[str], str] | None = getattr(tokenizer, "unknown", None)  # a plugin's need not have it
        found = {text: [c for c in unknown(text) if _is_sign(c)] for text in texts} if unknown else {}
        lacking = "".join(dict.fromkeys(character for characters in found.values() for character in characters))
        if not lacking:
            continue
        some = lacking if len(lacking) <= _SHOWN else f"{lacking[:_SHOWN]}..."
        mute = [text for text, characters in found.items() if characters and not any(_is_sign(c) and c not in characters for c in text)]
        others = f"; the prompt {mute[0]!r} has no others" if len(mute) == 1 else f"; {len(mute)} prompts have no others" if mute else ""
        print(f"warning: {name}'s vocabulary lacks these characters, and it can hardly read them: {some!r}{others}", file=sys.stderr)


def _is_sign(character: str) -> bool:
    """Whether a character says something by itself: letters, numbers and symbols do; marks, punctuation and space do not."""
    return unicodedata.category(character)[0] in "LNS"


def _progress_bar(total: int, *, disable: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="step", file=sys.stderr, disable=disable, dynamic_ncols=True, leave=False)
