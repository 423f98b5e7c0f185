"""Every choice of sampler, spacing and clipping in the configuration builds what its file describes."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from src.conditioning import Condition
from src.diffusion import sampler as samplers
from src.diffusion import spacing as spacings
from src.diffusion.clipping import DynamicThresholding, StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.guidance import AutoGuidance, ClassifierGuidance, Projected
from src.diffusion.parameterization import V
from src.diffusion.sampler import Dopri5, Sampler
from src.diffusion.schedule import Linear
from src.diffusion.spacing import Spacing, Trailing
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import Wavy, recorded_noise, standard_normal

CONF = Path(__file__).parents[3] / "conf"


def _files(group):
    return sorted((CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["sampler", "spacing", "clipping"])
def test_first_line_is_a_comment(group):
    for path in _files(group):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# "), path
        assert all(len(line) <= 120 for line in lines), path
        assert lines[1:] == [] or lines[1].startswith("_target_: src.diffusion."), path


@pytest.mark.parametrize("path", _files("sampler"), ids=lambda p: p.stem)
def test_samplers(path):
    config = OmegaConf.merge({"schedule": {"T": 30}}, {"sampler": OmegaConf.load(path)})
    numbers = OmegaConf.to_container(config, resolve=True)["sampler"]
    steps = numbers.pop("steps")
    assert isinstance(steps, int)
    sampler = instantiate(numbers)
    assert isinstance(sampler, Sampler)
    # the sampler generates images
    denoiser = Denoiser(Wavy(), Linear(), V())
    times = Trailing()(Linear(), 50)
    images = sampler(
        denoiser, standard_normal((2, 1, 4, 4)), times, noise=lambda x: recorded_noise()(x).to(x.dtype)
    )
    assert images.shape == (2, 1, 4, 4)
    assert images.isfinite().all()


# steps of an average velocity cannot be guided: tests/training/test_few_step.py
@pytest.mark.parametrize("path", [p for p in _files("sampler") if p.stem != "flow_map"], ids=lambda p: p.stem)
def test_samplers_with_guidance(path):
    """Autoguidance, projected guidance with a momentum and a classifier: finite images, and two evaluations for one."""
    config = OmegaConf.merge({"schedule": {"T": 30}}, {"sampler": OmegaConf.load(path)})
    numbers = OmegaConf.to_container(config, resolve=True)["sampler"]
    del numbers["steps"]
    sampler, times = instantiate(numbers), Trailing()(Linear(), 50)
    condition = Condition(labels=torch.tensor([0, 1]))

    def last(denoiser):
        def noise(x):
            return recorded_noise()(x).to(x.dtype)

        x_T = standard_normal((2, 1, 1, 2))
        *_, state = sampler.trajectory(denoiser, x_T, times, condition, noise)
        return state

    def exact():
        return MixtureDenoiser(three_modes(), Linear())

    class Classifier(torch.nn.Module):
        evaluated_images = 0

        def gradient(self, x_t, level, labels):
            self.evaluated_images += len(x_t)
            return -x_t

    adaptive = isinstance(sampler, Dopri5)
    if adaptive:
        sampler, times = Dopri5(tolerance=0.01), times[[0, -1]]
    plain = last(exact())
    for guided in (
        AutoGuidance(exact(), exact(), 2.0, rescale=0.5),
        Projected(exact(), 2.0, momentum=0.0 if adaptive else -0.5),
        ClassifierGuidance(exact(), Classifier(), 0.1),
    ):
        state = last(guided)
        assert state.x.isfinite().all()
        if not adaptive:
            assert state.evaluations == 2 * plain.evaluations


@pytest.mark.parametrize("name", sorted({OmegaConf.load(p)["_target_"] for p in _files("sampler")}))
def test_defaults_of_each_class_equal_those_of_one_of_its_files(name):
    parameters = inspect.signature(get_class(name)).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    files = [OmegaConf.to_container(OmegaConf.load(path), resolve=False) for path in _files("sampler")]
    assert any(
        file["_target_"] == name and {key: file.get(key) for key in defaults} == defaults for file in files
    )


def test_every_sampler_has_a_file():
    named = {OmegaConf.load(path)["_target_"].split(".")[-1] for path in _files("sampler")}
    classes = {
        name
        for name in samplers.__all__
        if isinstance(getattr(samplers, name), type) and issubclass(getattr(samplers, name), Sampler)
    }
    assert named == classes - {"Sampler"}


@pytest.mark.parametrize("path", _files("spacing"), ids=lambda p: p.stem)
def test_spacings(path):
    config = OmegaConf.merge({"sampler": {"steps": 10}}, {"spacing": OmegaConf.load(path)})
    spacing = instantiate(config.spacing)
    assert isinstance(spacing, Spacing)
    assert len(spacing(Linear(), 10)) == 11


def _documented(heading):
    """Yields (choice and overrides, Python expression) of each row of the table with this heading, docs/samplers.md."""
    lines = (CONF.parent / "docs" / "samplers.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if heading in line) + 2
    for line in lines[start:]:
        if not line.startswith("|"):
            return
        chosen, expression = (cell.strip() for cell in line.split("|")[1:3])
        for choice, made in zip(chosen.split(", "), expression.split("`, `"), strict=True):
            yield choice.strip("`"), made.strip("`")


@pytest.mark.parametrize(
    ("group", "module"), [("sampler", samplers), ("spacing", spacings)], ids=["sampler", "spacing"]
)
def test_documented_classes_equal_those_of_the_files(group, module):
    rows = list(_documented(f"class in `src.diffusion.{group}`"))
    assert {choice.split()[0] for choice, _ in rows} >= {path.stem for path in _files(group)}
    for choice, expression in rows:
        name, *overrides = choice.split()
        config = {"sampler": {"steps": 10}} | {group: OmegaConf.load(CONF / group / f"{name}.yaml")}
        config = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        numbers = {
            k: v for k, v in OmegaConf.to_container(config, resolve=True)[group].items() if k != "steps"
        }
        assert _described(instantiate(numbers)) == _described(eval(expression, vars(module))), choice


def _described(part):
    return type(part), {k: _described(v) if hasattr(v, "step") else v for k, v in vars(part).items()}


def test_clippings():
    made = {path.stem: instantiate(OmegaConf.load(path)) for path in _files("clipping")}
    assert made["none"] == {}
    denoiser = Denoiser(Wavy(), Linear(), V())
    assert isinstance(made["static"](denoiser), StaticClipping)
    assert isinstance(made["dynamic"](denoiser), DynamicThresholding)
    assert set(made) == {"none", "static", "dynamic"}


def test_the_adaptive_solver_reports_its_evaluations():
    sampler = instantiate(
        {k: v for k, v in OmegaConf.load(CONF / "sampler" / "dopri5.yaml").items() if k != "steps"}
    )
    assert isinstance(sampler, Dopri5)
    *_, state = sampler.trajectory(Denoiser(Wavy(), Linear(), V()), torch.randn(1, 1, 2, 2), [1000.0, 0.0])
    assert state.evaluations > 6


ROOT = "preset" if "- preset:" in (CONF / "train.yaml").read_text() else "+preset"


@pytest.mark.parametrize("path", _files("preset"), ids=lambda p: p.stem)
def test_presets(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")  # the origin of the preset
    schedule = "edm" if "schedule=edm" in lines[1] else "linear"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"{ROOT}={path.stem}", f"schedule={schedule}"])
    spacing = instantiate(config.spacing)
    numbers = OmegaConf.to_container(config.sampler, resolve=True)
    steps = numbers.pop("steps")
    assert isinstance(instantiate(numbers), Sampler)
    times = spacing(instantiate(config.schedule), steps)
    assert len(times) in (steps + 1, steps)  # quadratic spacing has 49 distinct times for 50 steps
    assert times[-1] == 0


# preset -> published sampler, spacing, clipping and variance
PUBLISHED = {
    # ermongroup/ddim, functions/denoising.py: generalized_steps does not clip, ddpm_steps does
    "ddim_paper_cifar10": ("DDIM", "Quadratic", None, None),
    "ddim_paper_celeba": ("DDIM", "Leading", None, None),
    "ddim_paper_sigma_hat": ("DDPM", "Quadratic", "StaticClipping", "Large"),
    # openai/improved-diffusion: respace.py with one section; p_mean_variance clips, ddim_sample derives eps anew
    "ddim_openai": ("DDIM", "Sections", "StaticClipping", None),
    "ddim_openai_strided": ("DDIM", "Sections", "StaticClipping", None),
    "ddim_diffusers": ("DDIM", "Leading", "StaticClipping", None),
    # yang-song/score_sde: vpsde_update_fn of the ancestral predictor adds noise of variance beta
    "score_sde_pc": ("PredictorCorrector", "UniformTime", None, "Large"),
    "edm_paper": ("Heun", "Karras", None, None),
    "ddpm_paper": ("DDPM", None, "StaticClipping", "Large"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_equal_the_published_settings(name):
    def kind(node):
        return node._target_.split(".")[-1] if node else None

    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain, config = (compose("train", more) for more in ([], [f"{ROOT}={name}"]))
    sampler, spacing, clipping, variance = PUBLISHED[name]
    assert kind(config.sampler) == sampler
    assert spacing is None or kind(config.spacing) == spacing
    assert kind(config.clipping) == clipping
    assert kind(config.variance) == (variance or kind(plain.variance))


@pytest.mark.parametrize(
    ("spacing", "end"), [([], 1e-3), (["spacing=uniform_time"], 1e-5), (["spacing=trailing"], None)]
)
@pytest.mark.parametrize("name", ["unipc_paper", "dpm_solver_paper", "score_sde_pc"])
def test_presets_for_vp_end_at_a_thousandth_unless_another_spacing_is_chosen(name, spacing, end):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"{ROOT}={name}", "schedule=vp", *spacing])
    steps = config.sampler.steps
    times = instantiate(config.spacing)(instantiate(config.schedule), steps)
    assert times[-2].item() == pytest.approx(end or 1 / steps, rel=1e-9)


def test_unipc_preset_has_the_order_of_the_paper():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"{ROOT}=unipc_paper", "schedule=vp"])
    chosen = config.sampler.order, config.sampler.bh, config.sampler.count_clean_step
    assert chosen == (3, 1, False)


def test_edm_preset_has_the_times_of_the_paper():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"{ROOT}=edm_paper", "schedule=edm"])
    times = instantiate(config.spacing)(instantiate(config.schedule), config.sampler.steps)
    sigma = (80 ** (1 / 7) + torch.arange(18).double() / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(times[:-1], sigma, rtol=1e-9, atol=0)
    assert config.clipping is None or dict(config.clipping) == {}
