"""One thread, no tracking, and the small models and batches that several test files share."""

import logging
import os
import sys

import pytest
import yaml

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads: threads that wait do not spin

import torch
from hypothesis import settings
from micro import MICRO, call, flags_of, furnish, record, vit_micro, wrap

import export
import main_imp_fillback
from models.vit import VisionTransformer

# the same examples in every run of the suite; HYPOTHESIS_PROFILE=explore searches freely
settings.register_profile("suite", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

torch.set_num_threads(1)  # the machine is shared, and sums come out in one order
os.environ["WANDB_MODE"] = "disabled"  # tests of tracking ask for it


@pytest.fixture(autouse=True)
def _logging_goes_again():
    """What a run sets up for its log is gone after a test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)


@pytest.fixture
def house(monkeypatch, tmp_path):
    """For runs of the command: the micro model is an `--arch`, the current folder is empty."""
    here = tmp_path / "cwd"
    here.mkdir()
    furnish(monkeypatch, here)


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    """seen("--struct", "imp") -> `micro.record` of the micro run with these flags, made once for all who look at it."""
    made = {}

    def look(*flags, code=0):
        key = (*map(str, flags), torch.get_default_dtype())
        if key not in made:
            made[key] = record(tmp_path_factory.mktemp("seen"), [*MICRO, *flags])
        assert made[key].code == code, made[key].err
        return made[key]

    return look


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
    """A file of initial weights without the zeros and ones that biases and norms start from."""
    generator = torch.Generator().manual_seed(9)
    weights = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in vit_micro().state_dict().items()}
    path = tmp_path_factory.mktemp("noisy") / "noisy.pt"
    torch.save(weights, path)
    return path


@pytest.fixture
def done(seen, noisy):
    """done("imp") -> what was seen of that run of RUNS."""

    def look(name):
        found = seen(*flags_of(name, noisy))
        found.args = yaml.safe_load((found.dir / "args.yaml").read_text())
        return found

    return look


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def train(house, tmp_path, monkeypatch):
    """train("--flags", name="a") -> the folder of the finished micro run."""
    monkeypatch.setattr(main_imp_fillback.report, "write", lambda _: None)  # pictures take longer than these runs

    def run(flags, name="run", base=MICRO):
        assert call([*base, *flags.split(), "--save_dir", tmp_path / name]) == 0
        return tmp_path / name

    return run


@pytest.fixture
def refused(house, capsys):
    """refused(flags, words): the micro run ends in one line that holds the words, before any work."""

    def check(flags, *words):
        capsys.readouterr()
        assert call([*MICRO, *flags.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert [word for word in words if word not in line] == [], line

    return check


@pytest.fixture
def around(monkeypatch):
    """around("step", before=f, after=g): f(owner, *arguments) and g(owner, *arguments) at a method of the run or of a
    state's training, whichever has it."""
    return lambda method, before=None, after=None: wrap(monkeypatch, method, before, after)


def _add_noise(model, seed=0, scale=0.2):
    """Move every parameter off its initial value in place, so that no zero bias and no unit gain hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter) * scale)
    return model


@pytest.fixture
def add_noise():
    return _add_noise


@pytest.fixture
def make_micro_vit():
    """Builder of a ViT small enough for plain loops: 8 px, patch 4, dim 12, 2 blocks of 3 heads and 24 neurons."""

    def make(seed=0, dtype=torch.float32, **overrides):
        geometry = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
        model = VisionTransformer(**{**geometry, "num_classes": 5, **overrides})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)  # what the builder drew does not matter
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        return _add_noise(model, seed, scale=0.4).to(dtype)

    return make


@pytest.fixture
def micro_vit(make_micro_vit):
    return make_micro_vit()


@pytest.fixture
def make_batch():
    """Random (images, labels) for the micro model, or of another size."""

    def make(images=6, seed=0, img_size=8, classes=5, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1000 + seed)
        pixels = torch.randn(images, 3, img_size, img_size, generator=generator, dtype=torch.float64)
        return pixels.to(dtype), torch.randint(0, classes, (images,), generator=generator)

    return make


@pytest.fixture
def one_batch(make_batch):
    """A train_loader: a list of one random batch for the micro model."""
    return [make_batch()]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """One small structured run; tests read it and never write into it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = "--dataset digits --arch vit_micro --train_limit 80 --epochs 1 --pruning_times 2 --batch_size 32 --amp off"
    flags += " --device cpu --vit_structured --vit_prune_target both --rate 0.6 --mlp_prune_ratio 0.5"
    with pytest.MonkeyPatch.context() as patch:
        furnish(patch, folder.parent)
        patch.setitem(sys.modules, "markdown", None)  # no report: pictures take longer than this run
        assert main_imp_fillback.main([*flags.split(), "--save_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def command(capsys):
    def run(*argv):
        capsys.readouterr()
        try:
            code = export.main([str(value) for value in argv])
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run
