"""The view for wandb has the curves of a run; nothing is sent."""

import pytest

from src.tools import wandb_workspace
from tests.report.simulated import write_run


def lines_of(section) -> list[list[str]]:
    return [[getattr(name, "name", name) for name in panel.y] for panel in section.panels]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", steps=50, logger__wandb__project="digits")


@pytest.fixture
def called(monkeypatch, run):
    """Runs the command line with further arguments after the run; returns its exit status."""

    def call(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["wandb_workspace", str(run), "--entity", "me", *arguments])
        try:
            wandb_workspace.main()
        except SystemExit as end:
            return end.code
        return 0

    return call


def test_each_curve_has_one_panel_and_the_levels_of_noise_share_one(run):
    curves = wandb_workspace.curves_of(run)
    view = wandb_workspace.workspace_of(curves, "me", "digits")
    by_name = {section.name: section for section in view.sections}
    assert list(by_name) == ["scores", "samples", "loss", "training"]
    assert lines_of(by_name["scores"]) == [["fd_digits"]]
    quarters = [f"train/loss_q{i}" for i in range(4)]
    assert lines_of(by_name["loss"]) == [["train/loss"], ["val/loss_ema"], quarters]
    assert all(panel.log_y for panel in by_name["loss"].panels)
    assert by_name["samples"].panels[0].media_keys == ["samples"]
    lines = [line for name in ("scores", "loss", "training") for line in lines_of(by_name[name])]
    assert sorted(curve for line in lines for curve in line) == curves


def test_what_is_sent_names_the_project_of_the_run(called, monkeypatch, capsys):
    from wandb_workspaces.workspaces import internal

    sent = []

    def upsert(view):
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr(internal, "upsert_view2", upsert)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.url", "the address")
    assert called() == 0
    assert (sent[0].entity, sent[0].project) == ("me", "digits")
    assert '"fd_digits"' in sent[0].model_dump_json()
    assert "View saved: the address" in capsys.readouterr().err
    assert called("--project", "another") == 0
    assert sent[1].project == "another"


def test_what_is_missing_is_said(called, run, monkeypatch, capsys):
    monkeypatch.setattr("netrc.netrc", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert called() == 2
    assert "wandb did not take the view: No API key" in capsys.readouterr().err
    curves = run / "csv" / "version_0" / "metrics.csv"
    curves.write_bytes(b"\xff")
    assert called() == 2
    assert "its configuration or its curves cannot be read" in capsys.readouterr().err
    curves.unlink()
    assert called() == 2
    assert "has no curves yet" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert called() == 2
    assert "no run folder" in capsys.readouterr().err


def test_the_package_is_named_if_it_is_not_installed(called, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    assert called() == 2
    assert 'pip install -e ".[workspace]"' in capsys.readouterr().err
