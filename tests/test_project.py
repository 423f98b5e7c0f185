"""The files around the code: license, citation, changelog, and the checks that run on every change."""

import re
import tomllib
from datetime import date

import pytest
import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def targets(text: str) -> list[str]:
    """The targets that a script makes, in order, without those that only prepare the environment."""
    return [
        name
        for name in re.findall(r"^\s*(?:- run: )?make ([a-z-]+)", text, re.MULTILINE)
        if name != "install"
    ]


def test_the_license_is_the_declared_one():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "Apache License\n" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert re.search(r"Copyright \d{4} The diffusion-lab authors", text)
    assert "[name of copyright owner]" not in text


def test_the_citation_is_valid_and_of_this_version():
    """The keys that the Citation File Format 1.2.0 requires, and those that other files must agree with."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["cff-version"]) == "1.2.0"
    assert citation["type"] in ("software", "dataset")
    assert isinstance(citation["message"], str)
    assert citation["authors"]
    for author in citation["authors"]:
        assert {"name"} <= set(author) or {"family-names"} <= set(author)
    assert isinstance(citation["date-released"], date)
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert set(citation) <= {
        *("abstract", "authors", "cff-version", "date-released", "doi", "identifiers", "keywords", "license"),
        *(
            "message",
            "preferred-citation",
            "references",
            "repository-code",
            "title",
            "type",
            "url",
            "version",
        ),
    }


def test_the_changelog_has_every_version_newest_first():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    assert versions[1].startswith(f"## [{PROJECT['version']}] - ")
    for version in versions[1:]:
        assert re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version)
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_makes_what_ci_makes(path):
    wanted = targets((ROOT / ".ci" / "run").read_text())
    assert wanted == ["lint", "test"]
    workflow = yaml.safe_load(path.read_text())
    (job,) = workflow["jobs"].values()
    runs = "\n".join(step["run"] for step in job["steps"] if "run" in step)
    assert targets(runs) == wanted
    assert "secrets." not in path.read_text()
    assert workflow["permissions"] == {"contents": "read"}
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert oldest in job["strategy"]["matrix"]["python-version"]


def test_there_is_a_workflow():
    assert WORKFLOWS


def test_every_target_that_is_named_exists():
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in (".ci/run", ".github/CONTRIBUTING.md", ".github/workflows/tests.yml", "README.md"):
        text = (ROOT / name).read_text()
        # in prose a target is in backquotes, in scripts it begins a line
        named = set(re.findall(r"(?:`|run: |^)make ([a-z-]+)", text, re.MULTILINE))
        assert named, name
        assert named <= made, name


def test_ci_can_be_run():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()


def test_the_commit_hooks_are_what_lint_checks():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert (
        {hook["entry"].split()[1] for hook in hooks}
        == set(re.findall(r"ruff (\w+)", lint))
        == {"check", "format"}
    )
    for hook in hooks:
        assert hook["entry"].startswith(
            ".venv/bin/ruff "
        )  # what `make install` creates: nothing is downloaded
        assert hook["language"] == "system"


def test_links_of_the_project_files_lead_somewhere():
    for name in ("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md"):
        path = ROOT / name
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{name}: {target}"
