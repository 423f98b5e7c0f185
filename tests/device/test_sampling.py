"""Sampling runs on the device alone: no stray CPU tensor, no wait before the end, no float64 where there is none."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from src.data.codec import Pixels
from src.diffusion.denoiser import WrappedDenoiser
from tests.device.lane import lane
from tests.device.parts import choices, parts

# These choose their steps by the errors that they see, so that each step waits.
ADAPTIVE = {"dopri5"}
NEEDS = {"flow_map": ["model.second_time=true", "clipping=none"]}
STEPS = 6  # room for what a multi-step method starts with, and for a restart


class Guided(WrappedDenoiser):
    """Classifier-free guidance: the network is called with the condition and without it."""

    def forward(self, x_t, level, condition=None, to=None):
        plain = self.inner(x_t, level, condition.dropped(), to)
        given = self.inner(x_t, level, condition, to)
        return given.with_x0(torch.lerp(plain.x0, given.x0, 2.0))


def guided(*overrides, steps=STEPS):
    """A denoiser and a recipe with guidance inside the clipping."""
    made = parts(*overrides, f"sampler.steps={steps}")
    recipe = replace(made.recipe, wrappers=(Guided, *made.recipe.wrappers))
    return made.module.denoiser.eval(), recipe


def states(device, denoiser, recipe):
    """All states of a trajectory, without what the sampler does after the last one."""
    denoiser.to("cuda")
    walk = recipe.trajectory(denoiser, range(2))
    found = [next(walk)]  # moves the condition
    device.waits.clear()
    found += [next(walk) for _ in range(recipe.steps)]
    return found


@pytest.mark.parametrize("sampler", [name for name in choices("sampler") if name not in ADAPTIVE])
def test_no_step_waits(sampler):
    denoiser, recipe = guided(f"sampler={sampler}", *NEEDS.get(sampler, []))
    with lane(float64=False) as device:
        *_, last = states(device, denoiser, recipe)
        assert last.x.device.type == "cuda"
        assert last.x.dtype == torch.float32
        assert last.evaluations >= 2 * (recipe.steps - 1)
        assert device.waits == []


@pytest.mark.parametrize("sampler", sorted(ADAPTIVE))
def test_an_adaptive_solver_waits_to_choose_its_steps(sampler):
    denoiser, recipe = guided(f"sampler={sampler}", steps=1)
    with lane(float64=False) as device:
        with pytest.raises(DataDependentOutputException):
            states(device, denoiser, recipe)
        assert device.waits
    denoiser, recipe = guided(f"sampler={sampler}", steps=1)
    with lane(float64=False, answers=True) as device:
        assert states(device, denoiser, recipe)[-1].x.device.type == "cuda"


@pytest.mark.parametrize(
    "group",
    [
        "clipping",
        "parameterization",
        "variance",
        *(pytest.param(group, marks=pytest.mark.slow) for group in ("schedule", "spacing")),
    ],
)
def test_no_part_of_a_recipe_waits(group):
    for choice in choices(group):
        loss = "loss=vlb" if choice.startswith("learned") else "loss=denoising"
        schedule = "schedule=vp" if choice.endswith("_vp") else "schedule=cosine"
        chosen = [schedule, "parameterization=v", loss, "sampler=ddpm", f"{group}={choice}"]
        denoiser, recipe = guided(*chosen, steps=2)
        with lane(float64=False) as device:
            states(device, denoiser, recipe)
            assert device.waits == [], choice


def test_images_are_made_on_the_device_and_checked_once_at_the_end():
    denoiser, recipe = guided("sampler=ddim", steps=4)
    with lane(float64=False, answers=True) as device:
        denoiser.to("cuda")
        device.waits.clear()
        made = list(recipe.images(denoiser, range(5), batch_size=3))
        assert [len(batch.images) for batch in made] == [3, 2]
        assert all(batch.images.device.type == "cuda" for batch in made)
        assert all(batch.images.dtype == torch.uint8 for batch in made)
        reads = [wait for wait in device.waits if "_local_scalar_dense" in wait]
        assert len(set(reads)) == 1, "one line looks at the values"
        assert len(device.waits) - len(reads) <= len(made), "at most one copy for each batch: its condition"


@pytest.mark.parametrize(("drawn_there", "copies"), [(True, 0), (False, 1)])
def test_noise_drawn_on_the_device_is_not_copied(drawn_there, copies):
    denoiser, recipe = guided("sampler=ddpm", steps=2)
    recipe = replace(recipe, device_noise=drawn_there)
    with lane(float64=False) as device:
        denoiser.to("cuda")
        noise = recipe.start(denoiser, range(2)).noise
        x = torch.empty(2, *recipe.codec.shape, device="cuda")
        device.copies.clear()
        assert noise(x).device.type == "cuda"
        assert len(device.copies) == copies


def test_a_codec_stays_on_the_device():
    codec = Pixels((3, 4, 4))
    with lane(float64=False) as device:
        images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device="cuda")
        x = codec.encode(images)
        back = codec.decode(x)
        assert (x.device.type, x.dtype) == ("cuda", torch.float32)
        assert (back.device.type, back.dtype) == ("cuda", torch.uint8)
        assert device.waits == []
