"""Bad input gives exit status 2 and one line that names the option and a fix, before any data is read."""

import io

import pytest
import torch
from PIL import Image

from src.data.source import ImageSource
from tests.conftest import QUICK

# name -> overrides, and text that the error line must contain: the option and a fix
BAD = {
    "an option that the framework sets": (["model.num_classes=3"], ["model.num_classes", "leave it out"]),
    "an option that exists, with a plus": (
        ["+trainer.max_steps=2"],
        ["trainer.max_steps", "without the plus"],
    ),
    "options that an experiment sets for another loss": (
        ["experiment=mean_flow_digits", "loss=consistency"],
        ["loss.share", "no such option", "experiment=mean_flow_digits sets it", "~loss.share ~loss.power"],
    ),
    "patches that do not divide the images": (
        ["model=dit_tiny", "model.patch_size=3"],
        ["model.patch_size=3", "8 pixels", "choose 1 or 2"],
    ),
    "heads that do not divide the width": (["model=dit_tiny", "model.heads=3"], ["model.heads=3", "divisor"]),
    "levels that the images do not have": (["model=unet_adm_256"], ["channel_multipliers", "pad the images"]),
    "one score twice": (
        ["metrics=[fd_digits,fd_digits]"],
        ["metrics=[fd_digits,fd_digits]", "different scores"],
    ),
    "a score and none": (["metrics=[fd_digits,none]"], ["metrics=[fd_digits,none]", "without none"]),
    "a wrapper that is a number": (["+wrappers.a=3"], ["wrappers.a=3", "_target_"]),
    "a wrapper of another kind": (
        ["+wrappers.a={_target_: src.model.UNet}"],
        ["wrappers.a", "WrappedDenoiser"],
    ),
    "no choice of a group": (["data=null"], ["data=null", "choose from", "digits"]),
    "no folder for runs": (["runs=null"], ["runs=null", "folder"]),
    "a package that does not exist": (["trust=[nosuchpackage]"], ["trust=nosuchpackage", "imported"]),
    "accumulation by the trainer": (["+trainer.accumulate_grad_batches=2"], ["max_device_batch"]),
    "batches by the trainer": (
        ["+trainer.limit_train_batches=3"],
        ["trainer.limit_train_batches", "max_steps"],
    ),
    "epochs": (["+trainer.max_epochs=3"], ["trainer.max_epochs", "trainer.max_steps"]),
    "fast_dev_run": (["+trainer.fast_dev_run=true"], ["trainer.fast_dev_run", "debug=quick"]),
    "an option of another entry point": (["+label=3"], ["label: no such option"]),
    "guidance without a condition": (["guidance=classifier_free"], ["guidance", "conditioning=class"]),
    "guidance by no run": (["guidance=auto"], ["guidance.run is missing", "guidance.run=<run folder"]),
    "guidance by a missing run": (
        ["guidance=classifier", "guidance.run=nowhere"],
        ["guidance.run=nowhere", "no such run"],
    ),
    "momentum along steps that are repeated": (
        ["conditioning=class", "conditioning.dropout=0.1", "guidance=projected", "sampler=dopri5"],
        ["guidance.momentum=-0.5", "sampler=dopri5", "guidance.momentum=0"],
    ),
    "momentum along steps that are taken again": (
        ["conditioning=class", "conditioning.dropout=0.1", "guidance=projected", "sampler=restart"],
        ["guidance.momentum=-0.5", "sampler=restart", "guidance.momentum=0"],
    ),
    "projected guidance below 1": (
        ["conditioning=class", "conditioning.dropout=0.1", "guidance=projected", "guidance.scale=0.5"],
        ["guidance.scale must be at least 1, got 0.5"],
    ),
    "a strength of no guidance": (["guidance.scale=2"], ["guidance.scale: guidance=none has no options"]),
    "a classifier's loss for a denoiser": (["loss=classification"], ["loss", "model=encoder_tiny"]),
    "a denoiser's loss for a classifier": (
        ["model=encoder_tiny", "conditioning=class"],
        ["loss", "loss=classification"],
    ),
    "an autoencoder's loss for a denoiser": (["loss=reconstruction"], ["loss", "model=autoencoder_kl"]),
    "a denoiser's loss for an autoencoder": (["model=autoencoder_kl"], ["loss", "loss=reconstruction"]),
    "an autoencoder that halves an odd side": (
        ["experiment=autoencoder_digits", "model.channel_multipliers=[1,2,2,2,2]"],
        ["image_size 8", "at most 4 channel_multipliers"],
    ),
    "an autoencoder that does not compress": (
        ["experiment=autoencoder_digits", "model.latent_channels=5"],
        ["model.latent_channels=5", "choose 1 to 4"],
    ),
    "an autoencoder with classes": (
        ["experiment=autoencoder_digits", "conditioning=class"],
        ["does not read labels", "conditioning=none"],
    ),
    "a classifier without classes": (
        ["experiment=classifier_digits", "conditioning=none"],
        ["2 classes", "conditioning=class"],
    ),
    "classes without a condition": (["labels=3"], ["labels=3", "leave labels out", "conditioning=class"]),
    "a class that does not exist": (
        ["conditioning=class", "labels=[3,10]"],
        ["labels=10: there is no such class", "choose balanced", "0 to 9"],
    ),
    "a class by a name that does not exist": (
        ["data=fashion_mnist", "conditioning=class", "labels=[Bag,Hat]"],
        ["labels=Hat", "balanced", "0 to 9", "T-shirt/top, Trouser"],
    ),
    "accuracy without classes": (
        ["metrics=accuracy_digits"],
        ["metrics", "accuracy_digits", "conditioning=class"],
    ),
    "scores of classes without classes": (["per_class=true"], ["per_class=true", "conditioning=class"]),
    "unknown choice": (["schedule=cosin"], ["schedule=cosin", "cosine", "linear"]),
    "unknown group": (["schedul=cosine"], ["schedul", "schedule"]),
    "unknown option": (["batch_sise=3"], ["batch_sise", "batch_size"]),
    "unknown option of a group": (["sampler.etta=1"], ["sampler.etta", "sampler.eta"]),
    "option of another choice": (
        ["sampler=heun", "sampler.eta=0.5"],
        ["sampler.eta: sampler=heun has no eta; it has steps, s_churn, s_min, s_max, s_noise"],
    ),
    "option of another choice than the preset's": (
        ["preset=edm_paper", "sampler.order=2"],
        ["sampler.order: sampler=heun has no order; it has steps"],
    ),
    "option of an empty choice": (
        ["clipping=none", "clipping.bound=2"],
        ["clipping.bound: clipping=none has no options"],
    ),
    "option of one of several choices": (
        ["sampler=heun", "sampler.eta=0,1", "-m"],
        ["sampler=heun has no eta"],
    ),
    "option of some choices of a sweep": (
        ["sampler=heun,ddim", "sampler.eta=0", "-m"],
        ["sampler.eta: sampler=heun has no eta", "not every choice of the sweep has this option"],
    ),
    "added option that the class does not have": (["+sampler.order=2"], ["sampler.order", "eta"]),
    "added option for a class without options": (["+spacing.end=0.5"], ["spacing.end", "it has none"]),
    "text for a number": (["seed=hello"], ["seed", "hello", "integer"]),
    "text for a number in a group": (["sampler.eta=much"], ["sampler.eta", "much", "number"]),
    "text for a boolean or a number": (
        ["sampler=dpmpp_2m", "sampler.lower_order_final=often"],
        ["sampler.lower_order_final='often': input should be a valid boolean or a valid integer"],
    ),
    "negative seed": (["seed=-1"], ["seed", "-1", "greater"]),
    "too many downsamplings": (
        ["model.channel_multipliers=[1,1,1,1,1]"],
        ["model.", "image_size", "channel_multipliers"],
    ),
    "steps above T": (["sampler.steps=1001"], ["sampler.steps", "1000", "1001"]),
    "no steps": (["sampler.steps=0"], ["sampler.steps", "[1, 1000]"]),
    "duplicate steps": (
        ["spacing=quadratic", "sampler.steps=1000"],
        ["sampler.steps=1000", "distinct", "fewer"],
    ),
    "eta out of range": (["sampler.eta=1.5"], ["sampler.eta", "[0, 1]", "1.5"]),
    "decay out of range": (["ema.decay=1"], ["ema.decay", "[0, 1)"]),
    "channels that contradict the data": (
        ["+model.channels=3"],
        ["model.channels=3", "1", "follows the data"],
    ),
    "channels that the data does not have": (["data.channels=3"], ["data.channels must be 1", "got 3"]),
    "missing folder": (["data=image_folder", "metrics=none", "data.root=nowhere"], ["data.root", "nowhere"]),
    "folder not set": (["data=image_folder", "metrics=none"], ["data.root"]),
    "classes for unlabelled data": (
        ["data=image_folder", "metrics=none", "data.root=.", "class_conditional=true"],
        ["class_conditional", "no labels"],
    ),
    "missing checkpoint": (["ckpt=nowhere.ckpt"], ["ckpt=nowhere.ckpt", "no such"]),
    "no run to resume": (["ckpt=last"], ["ckpt=last", "name a run folder"]),
    "device batch of zero": (["max_device_batch=0"], ["max_device_batch=0", "greater than or equal to 1"]),
    "score for another image shape": (
        ["metrics=fd_fashion_mnist"],
        ["metrics", "fashion_mnist", "metrics=fid"],
    ),
    "bound with one step": (
        ["schedule.T=1", "variance=learned_range", "loss=hybrid"],
        ["loss: schedule.T=1", "at least 2", "loss=denoising"],
    ),
    "bits in training": (["metrics=nll"], ["metrics: bits per dimension", "src.evaluate", "metrics=none"]),
    "bits of the flow in training": (["metrics=nll_flow"], ["metrics: bits per dimension", "src.evaluate"]),
    "option that needs a plus sign": (
        ["model.out_channels=1"],
        ["model.out_channels", "+model.out_channels"],
    ),
    "too few channels": (
        ["+model.out_channels=1", "variance=learned_range", "loss=hybrid"],
        ["model.out_channels=1", "+model.out_channels=2"],
    ),
    "learned uncertainty with importance sampling": (
        ["weighting=learned_uncertainty", "time_sampling=importance"],
        ["time_sampling=importance", "choose time_sampling=uniform"],
    ),
    "beta out of range": (["schedule=linear", "schedule.T=10"], ["schedule.T", "beta"]),
    "foreign class": (["optimizer._target_=os.system"], ["optimizer._target_", "not allowed"]),
    "foreign class through an allowed module": (
        ["optimizer._target_=torch.optim.adam.torch.load"],
        ["optimizer._target_", "not allowed"],
    ),
    "class of another kind": (
        ["sampler._target_=src.diffusion.schedule.Linear"],
        ["sampler._target_", "Sampler"],
    ),
    "syntax": (["schedule=["], ["schedule=[", "quote"]),
    "text for the learning rate": (["optimizer.lr=hello"], ["optimizer", "hello"]),
    "clipping bound of zero": (["clipping.bound=0"], ["error: clipping.bound must be positive"]),
    "list without quotes": (["spacing.sections=10,15,20"], ["'spacing.sections=\"10,15,20\"'", "-m"]),
    "text for sections": (["spacing=sections", "spacing.sections=a"], ['"10,15,20"', '"ddim25"']),
    "negative learning rate": (["optimizer.lr=-1"], ["optimizer", "-1"]),
    "negative warm-up": (["lr_schedule.warmup_steps=-1"], ["lr_schedule", "warmup_steps", "-1"]),
    "zero steps of training": (["trainer.max_steps=0"], ["trainer.max_steps", "greater than 0"]),
    "text for the number of training steps": (["trainer.max_steps=hello"], ["trainer.max_steps", "integer"]),
    "negative gradient clipping": (
        ["trainer.gradient_clip_val=-1"],
        ["trainer.gradient_clip_val", "greater than 0"],
    ),
    "unknown precision": (["trainer.precision=fp7"], ["trainer", "fp7"]),
    "folder that cannot be created": (["runs=/proc/nowhere"], ["/proc/nowhere"]),
}


@pytest.fixture
def _no_data(monkeypatch):
    def refuse(self, name):
        raise AssertionError("data was read before the error was reported")

    monkeypatch.setattr(ImageSource, "split", refuse)


def assert_one_line(err: str, words: list[str]) -> None:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("_no_data")
def test_train_refuses_in_one_line(command, capsys, case):
    overrides, words = BAD[case]
    assert command("train", "logger=csv", *overrides) == 2
    assert_one_line(capsys.readouterr().err, words)


@pytest.mark.usefixtures("_no_data")
def test_batch_not_divisible_by_devices(command, capsys):
    overrides = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3", "batch_size=128"]
    assert command("train", "logger=csv", *overrides) == 2
    assert_one_line(capsys.readouterr().err, ["batch_size=128", "3 devices", "126 or 129"])


def test_no_gpu(command, capsys):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert command("train", "logger=csv", "trainer=gpu") == 2
    assert_one_line(capsys.readouterr().err, ["trainer", "gpu"])


def test_text_as_checkpoint_to_resume_from(command, capsys, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    assert command("train", "logger=csv", "ckpt=text.ckpt") == 2
    assert_one_line(capsys.readouterr().err, ["text.ckpt", "not a checkpoint"])


def test_nothing_left_to_train(command, only_run, capsys):
    assert command("train", *QUICK, "callbacks=none") == 0
    scores = (only_run() / "scores.json").read_text()
    capsys.readouterr()
    assert command("train", "ckpt=last", "trainer.max_steps=20") == 2
    assert_one_line(capsys.readouterr().err, ["trainer.max_steps=20", "step 20 already"])
    assert (only_run() / "scores.json").read_text() == scores


PICTURES = (
    "data=image_folder",
    "data.root=pictures",
    "data.image_size=8",
    "data.channels=1",
    "metrics=none",
)


def unreadable_folder(folder):
    folder.mkdir()
    for number in range(40):
        Image.new("L", (8, 8), number).save(folder / f"good_{number:02d}.png")
    (folder / "text.png").write_text("not an image")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (folder / "torn.jpg").write_bytes(buffer.getvalue()[:200])


def test_error_names_unreadable_images(command, capsys, tmp_path):
    unreadable_folder(tmp_path / "pictures")
    assert command("train", *QUICK, *PICTURES) == 2
    assert_one_line(
        capsys.readouterr().err.split("\n")[-2], ["2 ", "text.png", "torn.jpg", "data.on_error=skip"]
    )


def test_unreadable_images_are_skipped_and_counted(command, only_run, tmp_path):
    unreadable_folder(tmp_path / "pictures")
    assert command("train", *QUICK, *PICTURES, "data.on_error=skip", "data.holdout=0.2") == 0
    log = (only_run() / "train.log").read_text()
    assert "2 of 42" in log
    assert "text.png" in log
    assert "torn.jpg" in log


def test_empty_folder(command, capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    assert command("train", *QUICK, "data=image_folder", "data.root=pictures", "metrics=none") == 2
    assert_one_line(capsys.readouterr().err.split("\n")[-2], ["data.root", "pictures"])


def test_invalid_weights_file(command, capsys, tmp_path):
    (tmp_path / "weights.pth").write_text("hello")
    overrides = ["data=fashion_mnist", "metrics=fid", "metrics.features.weights=weights.pth"]
    code = command("train", *QUICK, *overrides)
    err = capsys.readouterr().err
    assert code == 2
    assert_one_line(err, ["weights.pth"])


@pytest.mark.parametrize("name", ["sample", "evaluate"])
class TestLoading:
    def test_no_run(self, command, capsys, name):
        assert command(name) == 2
        assert_one_line(capsys.readouterr().err, ["run", "run=..."])

    def test_missing_run(self, command, capsys, name):
        assert command(name, "run=nowhere") == 2
        assert_one_line(capsys.readouterr().err, ["run=nowhere", "no such"])

    def test_run_without_checkpoint(self, command, capsys, tmp_path, name):
        (tmp_path / "empty").mkdir()
        assert command(name, "run=empty") == 2
        assert_one_line(capsys.readouterr().err, ["run=empty", "no checkpoint"])

    def test_text_as_checkpoint(self, command, capsys, tmp_path, name):
        (tmp_path / "text.ckpt").write_text("hello")
        assert command(name, "run=text.ckpt") == 2
        assert_one_line(capsys.readouterr().err, ["text.ckpt", "not a checkpoint"])

    def test_hostile_checkpoint_executes_no_code(self, command, capsys, tmp_path, name):
        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "marker"), "w"))

        torch.save({"state_dict": Hostile()}, tmp_path / "hostile.ckpt")
        assert command(name, "run=hostile.ckpt") == 2
        assert_one_line(capsys.readouterr().err, ["hostile.ckpt", "not a checkpoint"])
        assert not (tmp_path / "marker").exists()

    def test_unknown_weights(self, command, capsys, name):
        assert command(name, "run=x", "weights=best") == 2
        assert_one_line(capsys.readouterr().err, ["weights", "'ema' or 'raw'"])

    def test_unknown_device(self, command, capsys, tmp_path, name):
        assert command("train", *QUICK, "callbacks=none") == 0
        run = next((tmp_path / "runs").iterdir())
        capsys.readouterr()
        assert command(name, f"run={run}", "device=toaster") == 2
        assert_one_line(capsys.readouterr().err, ["device=toaster", "auto"])
