"""Command `dit-accel env`."""

import json

from .command import run


def test_env_names_versions(capsys):
    assert run("env", "--format", "json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "diffusers", "processor"} <= set(facts)
