"""Values of ${oc.env:...} reach the objects but are never written."""

from PIL import Image

from tests.faults.processes import run, run_folder, train

SECRET = "s3cr3t-token-of-mine"


def test_secret_is_not_written(tmp_path):
    pictures = tmp_path / SECRET
    pictures.mkdir()
    for number in range(40):
        Image.new("L", (8, 8), 5 * number).save(pictures / f"{number:02d}.png")
    # both files cause log messages that name the folder
    (pictures / "notes.txt").write_text("not an image")
    Image.new("L", (4, 4)).save(pictures / "small.png")
    data = (
        "data=image_folder",
        "data.root=${oc.env:MY_PICTURES}",
        "name=${oc.env:MY_PICTURES}",
        "logger=wandb",
        "data.image_size=8",
        "data.channels=1",
        "metrics=none",
        f"data.cache={tmp_path}/index",
    )
    place = tmp_path / "place"
    variables = {"MY_PICTURES": f"{pictures}/", "WANDB_MODE": "offline"}
    # the value of `name` has a slash, which is invalid in a name; only the interpolation itself is checked
    assert train(place, *data, **variables).status == 0
    for path in (place / "runs").rglob("*"):
        assert SECRET not in str(path.relative_to(place))
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    (output,) = (path.read_text() for path in place.glob("output_*"))
    assert SECRET not in output
    assert "data.root=${oc.env:MY_PICTURES}: left out 1 other files" in output
    assert "1 of 41 images are smaller" in output
    assert "${oc.env:MY_PICTURES}" in (run_folder(place) / "config.yaml").read_text()
    # sampling resolves the interpolation of the stored configuration
    assert run(place, "sample", f"run={run_folder(place)}", "n=2", **variables).status == 0


def test_secret_is_not_in_error_messages(tmp_path):
    command = train(tmp_path, "data=image_folder", "metrics=none", "data.root=${oc.env:TOKEN}", TOKEN=SECRET)
    assert command.status == 2
    assert SECRET not in command.output
    assert "${oc.env:TOKEN}" in command.output


def test_unset_variable_is_a_user_error(tmp_path):
    command = train(tmp_path, "data=image_folder", "metrics=none", "data.root=${oc.env:NOT_SET_ANYWHERE}")
    assert command.status == 2
    assert "NOT_SET_ANYWHERE is not set" in command.output.splitlines()[-1]


def test_folder_options_accept_only_non_secret_variables(tmp_path):
    command = train(tmp_path, "cache=${oc.env:TOKEN}/statistics", TOKEN=SECRET)
    assert command.status == 2
    assert "DIFFUSION_LAB_" in command.output
    assert (
        train(tmp_path, "cache=${oc.env:DIFFUSION_LAB_HERE}", DIFFUSION_LAB_HERE=f"{tmp_path}/here").status
        == 0
    )
    assert list((tmp_path / "here").iterdir())
