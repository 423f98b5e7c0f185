"""Folders of diffusers: the transformer of DiT, and schedulers against the package's own levels."""

import diffusers
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from src.app.import_weights import choices
from src.conditioning import Condition
from src.diffusion.schedule import Sigmoid
from src.interop.diffusers_folder import (
    CLOSE,
    TABLES,
    UNET,
    folder_at,
    network_of,
    process_of,
    transformer_copies,
    unet,
)
from src.interop.links import write_all
from src.interop.network import Network
from src.interop.pipelines import _betas
from tests.interop.test_published import LABELS, ours_of
from tests.test_conf import composed


@pytest.fixture
def transformer(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.1)
    weights = theirs.state_dict()
    for name, original in transformer_copies(2).items():
        weights[name].copy_(weights[original])
    theirs.save_pretrained(tmp_path / "transformer", safe_serialization=True)
    return theirs


@torch.no_grad()
def test_transformer_has_equal_outputs_and_comes_back(transformer, tmp_path):
    weights = transformer.state_dict()
    network = network_of(folder_at(tmp_path), weights)
    assert (network.num_classes, network.outputs, network.side) == (5, 2, 8)
    ours = ours_of(network, 8)
    ours.load_state_dict(network.read(weights))
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 5])
    expected = transformer(x, LABELS, class_labels=labels).sample
    assert expected.std() > 0.05
    found = ours(x, LABELS, Condition(labels=labels))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1, expected.abs().max().item()))
    back = write_all(network.links, network.read(weights))
    back |= {name: back[original] for name, original in transformer_copies(2).items()}
    assert back.keys() == weights.keys() - {"pos_embed.pos_embed"}
    assert all(torch.equal(back[name], weights[name]) for name in back)
    name = next(iter(transformer_copies(2)))
    with pytest.raises(ValueError, match="all blocks share one embedding"):
        network_of(folder_at(tmp_path), {**weights, name: weights[name] + 1})


def config_of(process):
    """The training with these choices."""
    return composed("train", *choices(Network({"_target_": "src.model.UNet"}, [], 1), process, None, ()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
        },
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
        {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample_range": 2.0},
        {"num_train_timesteps": 500, "beta_start": 2e-4, "beta_end": 0.04, "variance_type": "fixed_large"},
    ],
)
def test_schedulers_have_the_levels_of_the_package(options):
    theirs = diffusers.DDPMScheduler(**options)
    process = process_of({**theirs.config, "_class_name": "DDPMScheduler"})
    config = config_of(process)
    levels = instantiate(config.schedule).alphabar[1:]
    torch.testing.assert_close(levels, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    assert config.clipping.bound == options.get("clip_sample_range", 1.0)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_ours_are_recognised(name):
    schedule = TABLES[name](400)
    process = process_of({"num_train_timesteps": 400, **_betas(schedule)})
    found = instantiate(config_of(process).schedule)
    torch.testing.assert_close(found.alphabar, schedule.alphabar, rtol=0, atol=CLOSE)


def test_schedules_that_are_none_of_ours_are_named_unless_chosen():
    for scheduler, words in (
        ({"trained_betas": [0.1]}, "trained_betas is no table of ours"),
        (_betas(Sigmoid(40, tau=0.7)), "schedule=sigmoid schedule.tau=0.7"),
        ({"beta_schedule": "laplace"}, "beta_schedule=laplace"),
        ({"rescale_betas_zero_snr": True}, "add schedule=zero_terminal_snr"),
    ):
        with pytest.raises(ValueError, match=words):
            process_of(scheduler)
        assert "schedule" not in process_of(scheduler, {"schedule"})
    with pytest.raises(ValueError, match="prediction_type=flow"):
        process_of({"prediction_type": "flow"}, {"schedule"})
    process_of({"prediction_type": "flow"}, {"parameterization"})


@pytest.mark.parametrize(
    ("key", "value", "group"),
    [
        ("_class_name", "PNDMScheduler", "sampler"),
        ("set_alpha_to_one", False, "sampler"),
        ("steps_offset", 1, "spacing"),
        ("thresholding", True, "clipping"),
    ],
)
def test_settings_that_are_not_converted_are_reported_unless_chosen(key, value, group, caplog):
    usual = dict(diffusers.DDIMScheduler().config) | {"_class_name": "DDIMScheduler"}
    process_of(usual)
    process_of(usual | {key: value}, {group})
    assert not caplog.records
    process_of(usual | {key: value})
    (record,) = caplog.records
    assert f"{key}={value}" in record.getMessage()
    assert f"{group}=" in record.getMessage()


def test_only_schedulers_with_clip_sample_clip_without_saying_so():
    for kind, clipping in (("DDIMScheduler", "static"), ("DPMSolverMultistepScheduler", "none")):
        assert process_of({"_class_name": kind})["clipping"] == clipping


def test_a_last_row_is_a_class_if_the_data_have_as_many_classes():
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    ours = {key: value for key, (value, _) in UNET.items()}
    config = {**ours, **blocks, "block_out_channels": [8], "num_class_embeds": 5}
    network = unet(config)
    assert network.num_classes == network.for_data(4).num_classes == network.for_data(6).num_classes == 4
    rows = torch.randn(5, 3)
    weights = {"class_embedding.weight": rows}
    assert torch.equal(network.read(weights)["class_embedding.weight"], rows)
    of_five = network.for_data(5)
    assert of_five.num_classes == 5
    found = of_five.read(weights)["class_embedding.weight"]
    assert torch.equal(found, torch.cat((rows, torch.zeros(1, 3))))
    assert unet(config | {"num_class_embeds": None}).for_data(1).num_classes == 0
