"""The version stands once in the code, and everything that repeats it agrees."""

import re
from pathlib import Path

import yaml
from packaging.version import Version

import memcontrol_hf

ROOT = Path(__file__).parent.parent


def test_changelog_and_citation_name_the_version_that_is_built():
    version = Version(memcontrol_hf.__version__)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == str(version)
    released, state = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert released == version.base_version
    assert state == "unreleased" if version.is_devrelease else re.fullmatch(r"\d{4}-\d\d-\d\d", state)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'attr = "memcontrol_hf.__version__"' in project and not re.search(r'^version = "', project, re.MULTILINE)


def test_ruff_is_the_same_at_each_commit_and_in_ci():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={hooks['rev'].removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()
