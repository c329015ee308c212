"""Copy of diffusers' tests and the command line that runs them."""

import subprocess
from pathlib import Path

import pytest

from dit_accel.bench.diffusers_tests import FOLDERS, PLUGINS, VARIANTS, DiffusersTests, take_tests

PIPELINES = Path(__file__).parents[2] / "pipelines"


def git(folder, *arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(
        ["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Git repository with two commits of one test."""
    folder = tmp_path / "diffusers"
    (folder / "tests").mkdir(parents=True)
    git(folder, "init", "-q")
    for text in ("first", "second"):
        (folder / "tests" / "test_x.py").write_text(text)
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", text)
    return folder


@pytest.mark.parametrize(("revision", "text"), [(None, "second"), ("HEAD~1", "first")])
def test_the_tests_of_a_commit_are_copied_with_the_plugins(repository, tmp_path, revision, text):
    copy = tmp_path / "copy"
    copy.mkdir()
    commit = take_tests(repository, revision, copy, PIPELINES)
    assert commit == git(repository, "rev-parse", revision or "HEAD")
    assert (copy / "tests" / "test_x.py").read_text() == text
    for name in PLUGINS:
        assert (copy / name).read_text() == (PIPELINES / name).read_text()


@pytest.mark.parametrize("revision", ["none", None])
def test_a_repository_without_the_tests_is_refused(repository, tmp_path, revision):
    if revision is None:
        git(repository, "rm", "-rq", "tests")
        git(repository, "commit", "-q", "-m", "none")
    with pytest.raises(SystemExit, match=f"{repository.name}.*{revision}"):
        take_tests(repository, revision, tmp_path, PIPELINES)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--diffusers .*absent"):
        take_tests(tmp_path / "absent", None, tmp_path, PIPELINES)


@pytest.mark.parametrize(("name", "accepted"), [("variants", VARIANTS), ("folders", FOLDERS)])
def test_unknown_names_are_refused(tmp_path, name, accepted):
    tests = DiffusersTests(tmp_path, **{name: ("other",)})
    with pytest.raises(SystemExit, match=f"--{name} other.*{next(iter(accepted))}"):
        tests.run(PIPELINES)


def test_each_variant_has_a_baseline_of_plain_pipelines():
    for variant in VARIANTS.values():
        plain = VARIANTS[variant.against]
        assert not plain.ours
        assert plain.settings is None
        assert plain.large == variant.large
