"""A Frechet distance of images that a sampler holds: measured where they are, beside writing them as PNGs and reading these again."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from t2i_experts.bench.drawn import DIFFERENT, draw_jpegs
from t2i_experts.bench.machine import bench_device, describe
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave
from t2i_experts.cascade.picture import save_png, to_pil
from t2i_experts.evaluation.features import FeatureExtractor, FeatureOptions, load_features
from t2i_experts.evaluation.gathering import FeatureGatherer
from t2i_experts.evaluation.inception import InceptionFID
from t2i_experts.evaluation.pictures import open_pictures
from t2i_experts.evaluation.protocol import Comparison, MeasuredSet, Pace, compare, measure_images, measure_pictures
from t2i_experts.evaluation.squeezenet import SqueezeNet
from t2i_experts.shards.images import whole
from t2i_experts.shards.parallel import cores

NETWORKS: dict[str, type[nn.Module]] = {"inception": InceptionFID, "squeezenet": SqueezeNet}


def bench_fid(
    images: int = 5000,
    *,
    side: int = 1024,
    features: str = "inception",
    batch_size: int = 32,
    workers: int | None = None,
    repeats: int = 3,
    device: str | None = None,
) -> Result:
    """Mean and covariance of the features of `images` pictures of side x side, which are drawn for the occasion and held on the device.

    The baseline writes PNGs and reads them, with as many threads as there are cores, or `workers`. Then the network alone, and the sums
    alone, whose row has its share of the network's time. Weights are random, which changes no time.

    Raises RuntimeError unless both ways give the same features.
    """
    for name, value, least in (("images", images, 2), ("side", side, 1), ("batch-size", batch_size, 1), ("workers", workers, 1)):
        if value is not None and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")
    if features not in NETWORKS:
        raise ValueError(f"--features={features!r}; allowed: {', '.join(NETWORKS)}")
    place = bench_device(device)
    pace = Pace(place, batch_size, workers or cores())
    held = _pictures(images, side).to(place)
    with tempfile.TemporaryDirectory() as name:
        extractor = _random_network(features, Path(name) / "weights.pth", place)
        files, memory = _through_files(held, extractor, pace, Path(name)), measure_images(held, extractor, pace)
        apart = compare(files, memory, Comparison())["distance"] / float(memory.gaussian.covariance.trace())
        if apart > 1e-6:
            raise RuntimeError(f"the features of files and of the same images in memory differ: {apart:.2g} of their variance")
        found = torch.randn(images, extractor.dimension, device=place)
        timings = interleave(
            {
                "PNG files": lambda: _through_files(held, extractor, pace, Path(name)),
                "in memory": lambda: measure_images(held, extractor, pace),
                "network alone": lambda: [extractor.encode(extractor.prepare(some)) for some in held.split(batch_size)],
                "sums alone": lambda: _sums(found, extractor, pace),
            },
            place,
            repeats=repeats,
            warmup=0,  # all networks have been called
        )
    rows = [Row(name, timing, more={"images/s": images / timing.median}) for name, timing in timings.items()]
    rows[1] = Row("in memory", timings["in memory"], ratio=timings["PNG files"].median / timings["in memory"].median, more=rows[1].more)
    share = timings["sums alone"].median / timings["network alone"].median
    rows[3] = Row("sums alone", timings["sums alone"], more={"of the network's time": f"{share:.2%}"})
    settings = {"images": images, "side": side, "features": features, "batch size": batch_size, "workers": pace.workers, "repeats": repeats}
    return Result("fid", describe(place), settings, rows)


def _pictures(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8: so many different ones, again and again."""
    drawn = [torch.from_numpy(np.array(whole(data))).permute(2, 0, 1) for data in draw_jpegs(min(count, DIFFERENT), side, quality=95)]
    return torch.stack([drawn[i % len(drawn)] for i in range(count)])


def _random_network(features: str, path: Path, device: torch.device) -> FeatureExtractor:
    torch.manual_seed(0)
    torch.save(NETWORKS[features]().state_dict(), path)
    return load_features(features, FeatureOptions(weights=str(path)), device)


def _through_files(images: Tensor, extractor: FeatureExtractor, pace: Pace, folder: Path) -> MeasuredSet:
    """As one does who has a sampler and a program that measures folders."""
    with ThreadPoolExecutor(pace.workers) as pool:
        for start in range(0, len(images), 256):
            some = images[start : start + 256].cpu()
            paths = [folder / "pictures" / f"{start + i:06d}.png" for i in range(len(some))]
            for _ in pool.map(lambda image, path: save_png(to_pil(image), path), some, paths):
                pass
    return measure_pictures(open_pictures(folder / "pictures", "A"), extractor, pace)


def _sums(found: Tensor, extractor: FeatureExtractor, pace: Pace) -> None:
    """What becomes of features, without the network that makes them."""

    class Given:
        dimension, record = extractor.dimension, extractor.record

        def prepare(self, images: Tensor) -> Tensor:
            return images

        encode = prepare

    gathered = FeatureGatherer(Given(), pace.device)
    for some in found.split(pace.batch):
        gathered.add(some, [""] * len(some))
    gathered.finish()
    gathered.statistics.gaussian()
