"""What the files around the package say of it is so: version, licence, citation, contributing."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from helpers.paths import ROOT

import mpo_tn

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_citation_and_package_are_of_one_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert str(CITATION["version"]) == mpo_tn.__version__
    paper = CITATION["references"][0]
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Gao", "Zhao", "Xie", "Lu", "Wen"]
    assert "2106.02205" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["url"].endswith("2106.02205")


def test_the_licence_is_the_one_that_is_named() -> None:
    assert PROJECT["license"] == CITATION["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:6] == ["Apache", "License", "Version", "2.0,", "January", "2004"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert not [line for line in PROJECT["classifiers"] if line.startswith("License ::")]  # an expression replaces them


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_of_make_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    used = set(re.findall(r"^make (?:\w+=\S+ )*(\w+)", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"quick", "test"} <= used <= targets
