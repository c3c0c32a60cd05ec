"""A plain install: data and training work, and what needs an extra is an error that says how to install it."""

import subprocess
import sys

import pytest

from hf_csm.cli import main
from hf_csm.config import TrainingConfig
from hf_csm.errors import require_extra
from hf_csm.testing.ravdess import write_ravdess


HIDDEN = {"aiohttp", "prometheus_client", "sphn", "swift_f0", "tensorboard", "wandb", "trackio"}


@pytest.fixture
def plain_install(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] in HIDDEN or name.startswith("hf_csm.serving.server"):
            monkeypatch.delitem(sys.modules, name)
    for module in HIDDEN:
        monkeypatch.setitem(sys.modules, module, None)


def error_of(capsys):
    problem, remedy = capsys.readouterr().err.strip().splitlines()[-2:]
    return problem, remedy


def test_serving_needs_its_extra(plain_install, capsys):
    assert main(["serve", "nowhere"]) == 1
    problem, remedy = error_of(capsys)
    assert "hf-csm serve needs aiohttp" in problem
    assert "pip install 'hf-csm[serve]'" in remedy


def test_preparing_works_and_prosody_needs_its_extra(plain_install, tmp_path, capsys):
    raw = write_ravdess(tmp_path / "raw", actors=(1,), emotions=("sad",), intensities=(1,), layout="actors")
    argv = ["prepare", "ravdess", "--raw", str(raw), "--out", str(tmp_path / "out"), "--num-workers", "1"]
    assert main([*argv, "--prosody"]) == 1
    problem, remedy = error_of(capsys)
    assert "swift_f0" in problem
    assert "pip install 'hf-csm[prosody]'" in remedy
    assert main(argv) == 0


def test_the_default_trackers_need_no_extra(plain_install):
    assert TrainingConfig().trackers == []


def test_only_the_server_imports_modules_of_an_extra():
    code = (
        "import importlib, pkgutil, sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(HIDDEN)}))\n"
        "import dataset_builders, hf_csm\n"
        "for package in (hf_csm, dataset_builders):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not module.name.startswith('hf_csm.serving.server.'):\n"
        "            importlib.import_module(module.name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_extra_that_is_installed_is_no_error():
    require_extra("serve", "hf-csm serve", "json")
