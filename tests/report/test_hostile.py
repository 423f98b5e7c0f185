"""Damaged and hostile files in a run folder are listed as unreadable; the report neither stops nor hangs."""

import pytest

from src.report import command

# 9^11 values in a few hundred bytes
ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12))
COST = "step,train/samples,train/images_per_second,train/loss"


@pytest.mark.parametrize(
    "curves",
    [
        f"{COST}\ninf,NaN,1e-320,1e999\n",
        f"{COST}\n-1,1e14,1e-300,x\n",
        f"step,train/loss_q\u00b2,train/loss_q{'9' * 5000}\n1,1,1\n",
        "step,step,,x\n1,2,3,4,5,6\n",
        "[" * 1000,
    ],
)
def test_a_page_is_made(tmp_path, monkeypatch, capsys, curves):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "one" / "csv" / "version_\u00b2"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(curves)
    (tmp_path / "runs" / "one" / "config.yaml").write_text(ALIASES)
    assert command.main("report", ["runs/one"]) == 0
    assert command.main("runs", []) == 0
    assert "config.yaml: more than" in capsys.readouterr().out
